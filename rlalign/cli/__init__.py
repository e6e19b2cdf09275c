"""The command line: ``rlalign train | pretrain | evaluate | export | list | check | schema | submit
| ...``.

app.py      the commands by name, and what every one of them does with an error: exit codes and
            messages
common.py   options and printing that several commands share
streams.py  the terminal: encodings, closed streams, readers who have gone
train.py    train and pretrain
fit.py      fit-reward: a reward model from preferences
sample.py   sample: pictures without training
evaluate.py evaluate: any model by folder or name
export.py   export: a run's policy for plain diffusers, or in one file for ComfyUI
convert.py  convert: a published pickle of a reward as safetensors
encode.py   encode: a run's prompts as embeddings in a file
random_model.py  random-model: a pipeline folder of random weights
look.py     list, check and schema: what starts nothing
check/      what check says: memory by part, cards, the time of a round
rllib.py    rllib: a run file under RLlib's PPO
serve.py    serve-reward: a reward behind HTTP
vote.py     vote: the page where people choose between pictures
ballots.py  ballots: what people chose, exported, and whose votes count
operate.py  submit, status, logs, stop and scale: runs that are under way

Sits on top and may import everything, inside functions: ``rlalign list`` answers without torch. To
add a command: a function whose docstring is its help, and a line in app.py.
"""

from __future__ import annotations

from rlalign.cli.app import main

__all__ = ["main"]
