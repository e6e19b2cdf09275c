"""What is optimised: one file per objective.

An algorithm is a recipe (a frozen pydantic model: fields are its settings). It says what it
``eats``, makes that batch from a round's scored samples (``make_batch``), and gives a loss with
gradients on slices of it (``loss``); the learner does the rest and knows no algorithm by name.

Beside the algorithms lie helpers of the shelf alone: _objectives.py and _advantages.py (pure
functions), _memory.py (statistics and replayed transitions).

May import core, diffusion, ``policies.base`` and ``rewards.base``; never a policy or a reward by
name. To add one: write ``x.py`` with one class derived from ``base.Algorithm``, its settings with
defaults, and a docstring whose ``Source:`` names paper and equation. ``name: x`` finds it,
``rlalign list algorithms`` shows it, and tests/core/test_recipes.py covers it. Outside this
repository: ``name: my_lab.algorithms:Mine``.
"""
