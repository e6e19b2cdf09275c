"""The rules that change weights: one file per optimiser, named in a run file as
``learner: {optimizer: {name: FILE}}``.

base.py        what an optimiser is, and its state as tensors with names
adamw.py       torch's AdamW, the default
adafactor.py   transformers' Adafactor: a row and a column of second moments a matrix
adamw_8bit.py  bitsandbytes' AdamW, whose moments are bytes

To add one: a file with one class that derives from ``Optimizer`` and gives ``build`` and
``bytes_of_state``. The learning rate, its warm-up and the largest gradient are settings of the
learner.
"""
