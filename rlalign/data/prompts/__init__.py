"""Where prompts come from: one file per source, named in a run file as ``prompts: {name: FILE}``.

base.py says what a source is and turns its prompts into units of work; shapes.py, list.py and
file.py are sources. May import core, diffusion.noise and data; knows no policy, reward or
algorithm. To add one: a file with one class that derives from ``Prompts`` and gives ``pool`` and
``held_out``.
"""
