"""The parts of a run that know no Run: each takes what it needs as arguments.

learner.py     one update: shards, accumulation, clipping, averages
optimizers/    the rules that change weights: one file each
evaluate.py    fixed prompts and noise: summaries, comparisons, diversity, KL
guard.py       over-optimisation: what is counted, and what is done then
limits/        what a guard watches: one file each
checkpoint.py  saving and resuming, written whole or not at all
shard_files.py tensors that several processes hold, in a file of each
folders.py     what a folder that is to be written holds already
metrics.py     a run's lines: metrics.jsonl, evaluations.jsonl, TensorBoard

May import policies, rewards (their bases) and everything below; knows no algorithm by name and no
Run.
"""
