"""What a guard watches: one file per limit, named in a run file as ``guard: {limits: [{name:
FILE}]}``.

base.py       what a limit is
held_out.py   a held-out reward that falls while the trained one rises
kl.py         the KL to the pretrained model
diversity.py  the diversity of the pictures

To add one: a file with one class that derives from ``Limit`` and gives ``observe``; it reads the
summary of an evaluation. ``rlalign/learning/guard.py`` counts what is crossed and acts.
"""
