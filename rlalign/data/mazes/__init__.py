"""The embedded task of plans: a ball in a maze, told by way points where to roll.

maps.py            the mazes, where their walls are, and plans on the latent's scale
simulator.py       the ball's motion along many plans at once
routes.py          ways from cell to cell, one of each kind that a maze has
demonstrations.py  plans that lead from a start to a goal, for pretraining

Maps and dynamics are PointMaze's, as facts. NumPy alone; nothing here needs torch. Lengths are
metres, times seconds; x grows to the right and y upwards, (0, 0) is the map's middle.

Letters: B plans, H way points, T time steps, R rows, C columns.
"""
