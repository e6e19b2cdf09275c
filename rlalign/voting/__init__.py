"""``rlalign vote``: people choose between pictures; where the pictures come from, and which are
compared.

settings.py  the vote file: campaign, prompts, source of pictures, shares, rule, page
pictures.py  a picture with its bytes; what a source of pictures is
sources/     where pictures come from: files, a policy, a run
queue.py     keeps pairs ahead of those who vote, and says why there are none
pairing.py   which pictures of a caption make an item, gold items and shared ones
choice.py    which item comes next, by a fitted reward
filter.py    pictures that nobody is shown
judges.py    simulated people: a hidden utility, noise, lapses, a left bias
imports.py   votes that were given elsewhere
serve.py     the campaign as a whole: store, source, queue, page

May import everything below it; torch inside functions only; no Ray.
"""
