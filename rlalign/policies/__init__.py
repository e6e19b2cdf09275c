"""What is aligned: one file per model family.

A ``Family`` is five verbs without state (prompts under a plan to conditions, latents with words to
predictions, latents to media and back, sizes) and what it declares: noise path, prediction type,
pipeline classes, LoRA targets. Words are records of named tensors (``diffusion/condition.py``),
whatever a family tells its denoiser. A recipe (``PolicyRecipe``) names a checkpoint and how it is
trained; ``build(device)`` gives the family, ``load(device)`` the ``Policy`` around it: weights,
precision, guidance, replicas, the reference, a meter. Policies are all of this one class.

_family.py    what a family says
_policy.py    the one live policy
_recipe.py    settings of every family, and how a policy is made of them
_pipeline.py  what the families of diffusers' pipelines share; _pipeline_recipe.py their settings,
              _words.py where the words of prompts come from, _first_frames.py their pictures,
              _experts.py two denoisers in one pipeline

May import core, diffusion and networks; diffusers and transformers inside functions only, so that
listing costs nothing. To add one: write ``x.py`` with one public recipe derived from
``base.PolicyRecipe`` and a family derived from ``base.Family`` (of a pipeline:
``base.PipelineRecipe`` and ``base.PipelineFamily``); name the source in the docstring; test it
against diffusers' own pipeline. Nothing in diffusion/ changes. Outside this repository:
``name: my_lab.policies:Mine``.
"""
