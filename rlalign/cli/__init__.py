"""The command line: ``rlalign train | pretrain | evaluate | export | list | check | schema | submit
| ...``.

app.py    the commands by name, and what every one of them does with an error: exit codes and
          messages
streams.py  the terminal: encodings, closed streams, readers who have gone
train.py  train and pretrain
models.py evaluate and export: any model by folder or name
random_model.py  random-model: a pipeline folder of random weights
columns.py two columns of names and values
look.py   list, check and schema: what starts nothing
rllib.py  rllib: a run file under RLlib's PPO
serve.py  serve-reward: a reward behind HTTP
operate.py submit, status, logs, stop and scale: runs that are under way

Sits on top and may import everything, inside functions: ``rlalign list`` answers without torch. To
add a command: a function whose docstring is its help, and a line in app.py.
"""

from __future__ import annotations

from rlalign.cli.app import main

__all__ = ["main"]
