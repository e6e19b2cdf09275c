"""What is aligned: one file per model family.

A recipe (``PolicyRecipe``) names a checkpoint and how it is trained (LoRA rank); ``load(device)``
gives the live ``Policy``: prompts under a plan to conditions, latents with words to predictions,
latents to media and back, its noise path and its prediction type. Words are records of named
tensors (``diffusion/condition.py``), whatever a family tells its denoiser. Everything else
(weights, replicas, the reference; guidance, where a family does not ``combine`` in its own way) is
in ``base.py`` and shared.

May import core, diffusion and networks; diffusers and transformers inside functions only, so that
listing costs nothing. To add one: write ``x.py`` with one public recipe derived from
``base.PolicyRecipe`` and a live class derived from ``base.Policy``; name the source in the
docstring; test it against diffusers' own pipeline. Nothing in diffusion/ changes. Outside this
repository: ``name: my_lab.policies:Mine``.
"""
