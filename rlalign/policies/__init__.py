"""What is aligned: one file per model family.

A recipe (``PolicyRecipe``) names a checkpoint and how it is trained (LoRA rank); ``load(device)`` gives the live ``Policy``:
words to conditions, latents to predictions, latents to pictures and back, its noise path and its prediction type. Everything
else (guidance, weights, replicas, the reference) is in ``base.py`` and shared.

May import diffusion, lora, records and registry; diffusers and transformers inside functions only, so that listing costs
nothing. To add one: write ``x.py`` with one public recipe derived from ``base.PolicyRecipe`` and a live class derived from
``base.Policy``; name the source in the docstring; test it against diffusers' own pipeline. Nothing in diffusion/ changes.
Outside this repository: ``name: my_lab.policies:Mine``.
"""
