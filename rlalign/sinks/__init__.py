"""Where a run's numbers and pictures go beside its own files.

base.py         what a sink is, and what it is told of the run
tensorboard.py  the default
wandb.py, mlflow.py
                extras, imported where a run file asks for them

To add a sink, write one file here, and its test. ``rlalign/learning/log.py`` feeds them, each on a
thread of its own, so that none of them stops a run. ``metrics.jsonl`` is the truth; sinks are for
looking at.
"""
