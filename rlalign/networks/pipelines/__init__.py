"""Pipeline folders in diffusers' format: found, loaded part by part, and checked before use.

``loading.py`` reads a folder or a hub id, ``files.py`` says whether its files are there and whole,
``schedulers.py`` which schedulers and settings are read, and ``fitting.py`` whether the parts of a
pipeline are what a policy asks of them. What would be misread is refused by name.
"""
