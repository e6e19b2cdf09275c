"""What ``rlalign check`` says of a run file and a sample file.

describe.py  the rows: what is loaded or counted, and what it comes to
empty.py     a policy without weights, where a checkpoint is not at hand
passes.py    what a pass takes, counted without doing it: bytes that are alive, and arithmetic
work.py      the passes of a run
memory.py    what each role holds, by part
room.py      how that is told, and whether there is so much
cards.py     on which cards that fits, and what takes less
rounds.py    how long a round takes, by what was measured
"""
