"""One run from its file to its report, without Ray.

loop.py         produce, score, make a batch, learn: one loop, in one process or on a cluster
_rounds.py      one round of it, and what a run holds between two
cursors.py      which votes of people a round sees, where it learns from such
refit.py        the reward that a run fits anew on them between rounds
collect.py      what differs between the two (``Collect``), and how one process does it
assemble.py     the live parts of a run, and what is refused before it starts
control.py      what others ask of a run while it works (stop, scale), and how it stands
costs.py        what a run has taken so far
models.py       a policy that somebody named: a run folder, a pipeline folder, a plug-in
words.py        one process encodes prompts for all others: this one
encode.py       the words of a run's prompts in a file
environment.py  denoising as a Gymnasium environment
execution.py    a planner's plans followed in the simulator, with plans anew on the way

May import everything below; ``rlalign.runtime`` puts the same loop on a cluster.
"""
