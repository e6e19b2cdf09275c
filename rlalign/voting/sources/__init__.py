"""Where the pictures come from that people choose between: ``source`` of a vote file.

files.py   samples and pictures: a run's grids, a Parquet set, a folder (no torch)
policy.py  a policy that draws when pictures are needed, and one picture drawn again
run.py     the policy of a run that is still learning, as its newest checkpoint has it

``pictures.PictureSource`` says what each of them can be asked.
"""
