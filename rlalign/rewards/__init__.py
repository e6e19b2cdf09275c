"""Towards what it is aligned: one file per score.

A reward is a recipe (a frozen pydantic model: fields are its settings); ``load(device)`` gives the
live scorer, a callable ``(media_BFCHW in [0, 1], prompts) -> score_B`` in float32, larger is
better. base.py holds what all share: weight, label, what happens when a score fails, and the
weighted total. ``differentiable`` says whether gradients pass.

May import core, data, networks and diffusion; knows no policy and no algorithm. Heavy or optional
libraries are imported inside ``load``. To add one: write ``x.py`` with one class derived from
``base.Reward`` and a docstring whose ``Source:`` names paper and equation. ``name: x`` finds it,
``rlalign list rewards`` shows it, and tests/core/test_recipes.py covers it. A function of your own
needs no file: ``name: function``. A class outside this repository: ``name:
my_lab.rewards:Sharpness``.
"""
