"""A run on Ray: the driver, the actors' owner, and the coordinator between rollouts, rewards and
learner.

train.py        the driver: runs the learner under Ray Train
fleet.py        creates and owns the actors
supervisor.py   keeps them as wanted
nodes.py        where they are, which nodes will be taken away, for how long each was used
scaling.py      decides how many are wanted, where that is automatic
coordinator.py  one asyncio actor: which unit is where, tries, versions; holds references and small
                facts only
production.py   a unit's way through the pools, and what is counted on it
collect.py      the learner's side of the coordinator: the Collect of rlalign.alignment
"""
