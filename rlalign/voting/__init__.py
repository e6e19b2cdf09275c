"""``rlalign vote``: people choose between pictures; where the pictures come from, and which are
compared.

settings.py  the vote file: campaign, prompts, source of pictures, shares, rule, page
made.py      a picture with its bytes; what a source of pictures is
files.py     pictures that are there: a run's samples, a Parquet set, a folder (no torch)
drawn.py     pictures that a policy draws when they are needed, and one of them drawn again
followed.py  the policy of a run that is still learning, as its newest checkpoint has it
queue.py     keeps pairs ahead of those who vote, and says why there are none
pairing.py   which pictures of a caption make an item, gold items and shared ones
choice.py    which item comes next, by a fitted reward
filtered.py  pictures that nobody is shown
judges.py    simulated people: a hidden utility, noise, lapses, a left bias
serve.py     the campaign as a whole: store, source, queue, page

May import everything below it; torch inside functions only; no Ray.
"""
