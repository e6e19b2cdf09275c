"""What everything stands on: the records that travel, the recipes that YAML names, and small ground
that every room uses.

records.py   Plan, Unit, Trajectory, Scored, Weights: frozen, with the shape of each field in its
             docstring
batches.py   the four batches that algorithms learn from
registry.py  recipes and the shelves of plug-ins; UserError
finite.py    what is not a number is refused where it arises
locations.py settings that name files, and what a relative path means
files.py     text files that a user gives; files and folders that are written whole
media.py     uint8, floats, images; pictures that a user gives
clips.py     clips as files, and clips that a user gives
pictures.py  grids of pictures or clips with captions and scores
garbage.py   Python's search for garbage, out of the way while much is loaded
heap.py      freed memory, kept for the next pass on a CPU
progress.py  bars on a terminal, plain lines elsewhere
moved.py     the modules' names before they were in rooms

Imports no other room. To add a record, write it here only where two rooms exchange it.
"""
