"""Where prompts and pictures come from: the drawn shapes, prompt lists, preference pairs.

May import core and diffusion. ``shapes.py`` (NumPy alone) is the task of the embedded tiny model;
the files of ``prompts/`` are a shelf: to add a source of prompts, write one file there, and its
name is the name in the YAML.
"""
