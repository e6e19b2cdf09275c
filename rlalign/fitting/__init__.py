"""Training that is no alignment: denoisers from pictures, rewards from preferences.

denoiser/       ``rlalign pretrain``
reward/         ``rlalign fit-reward``
checkpoints.py  the state of a stage: what both resume from

May import everything below the Run.
"""
