"""Alignment without training: one file per test-time method.

A sampler is a recipe (a frozen pydantic model: fields are its settings) with one verb, ``sample``:
policy, scorers, prompts and plan in, scored samples and their cost out. The cost counts denoiser
calls, reward queries and seconds, so that methods are compared at equal price.

May import core, diffusion, engine, ``policies.base`` and ``rewards.base``; never a policy or a
reward by name. To add one: write ``x.py`` with one class derived from ``base.Sampler``, its
settings with defaults, and a docstring whose ``Source:`` names paper and equation. ``name: x``
finds it, and ``rlalign list samplers`` shows it. Outside this repository: ``name:
my_lab.samplers:Mine``.
"""
