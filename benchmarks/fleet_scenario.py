"""What the model of a fleet is told, and what it says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of work for each message. Zero everywhere is the ideal."""

    order: float = 0.0
    """The coordinator's, for a unit of an order."""
    call: float = 0.0
    """The coordinator's, for giving a unit to a worker."""
    member: float = 0.0
    """The same, more for every worker of its pool: the search for the least busy one."""
    answer: float = 0.0
    """The coordinator's, from a rollout's answer to the questions to the rewards."""
    score: float = 0.0
    """The coordinator's, for a reward's answer."""
    gather: float = 0.0
    """The coordinator's, for a unit's result on its way to the learner."""
    hop: float = 0.0
    """From one process to another; no work of anybody."""
    worker: float = 0.0
    """Of a rollout worker's process, for a unit beside the rollout."""
    reward: float = 0.0
    """Of a reward worker's process, for a call beside the scores."""
    fetch: float = 0.0
    """The learner's, for taking over a unit's samples."""
    beside: float = 0.0
    """Of all other processes and threads, for a unit. Nobody waits for it but by the cores."""

    @property
    def coordinator(self) -> float:
        """Of one unit with one reward in a small pool."""
        return self.order + self.call + self.answer + self.score + self.gather


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Seconds that work takes: log-normal about a mean, keyed by round and place in it, so that a
    model and a real fleet can have the same ones."""

    mean: float
    spread: float = 0.0
    """Standard deviation of the logarithm: 0 always the mean, 1 has one in twenty above 3.1
    times it."""
    seed: int = 0

    def round(self, number: int, count: int) -> np.ndarray:
        """Of a round's units, seconds (count,)."""
        draws = np.random.default_rng((self.seed, number)).standard_normal(count)
        return self.mean * np.exp(self.spread * draws - self.spread**2 / 2)


@dataclass(frozen=True, kw_only=True)
class Network:
    """What travels between nodes. Without a rate everything is there at once."""

    rate: float = math.inf
    """Bytes a second out of a node, and as many into it."""
    workers_per_node: int = 8
    how: Literal["pull", "swarm", "tree"] = "pull"
    """How weights spread. pull: each node asks one of those that have all of them, chosen blindly
    at the moment when it needs them, as Ray's object store does. swarm: the same for one chunk
    after the other, in an order of the node's own. tree: chunks along a tree of nodes, as soon as
    they are there."""
    fanout: int = 2
    chunk: float = 64e6


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A run and its fleet."""

    workers: int
    units: int
    """Of a round."""
    rounds: int = 3
    rollout: Draws
    rewards: Sequence[Draws] = (Draws(mean=0.0),)
    reward_workers: int = 4
    """Of each reward."""
    units_per_call: int = 1
    update: float = 0.0
    """Seconds of the learner for a round."""
    max_staleness: int = 0
    checkpoint_every: int = 0
    """Rounds; none is ordered ahead across a checkpoint. 0 is never."""
    in_flight: int = 2
    coordinators: int = 1
    """Each has its part of the workers and of a round's units."""
    weights: float = 0.0
    """Bytes."""
    samples: float = 0.0
    """Bytes of a unit that the learner fetches."""
    media: float = 0.0
    """Bytes of a unit that a reward fetches."""
    learners: int = 1
    """Nodes over which the learner's fetching is spread."""
    network: Network = Network()
    deaths: float = 0.0
    """Of a rollout worker, per second."""
    kills: Sequence[tuple[float, int]] = ()
    """(second, number of the worker), beside those by chance."""
    restart: float = 0.0
    """Seconds from a worker's death until it works again."""
    notice: float = 0.0
    """Seconds from a death until the coordinator knows of it."""
    cores: float = math.inf
    """That all processes share, as on one machine."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a scenario."""

    rounds: tuple[float, ...]
    """When each round's update ended, seconds from the start."""
    use: dict[str, float]
    """Part -> share of the time in which it was at work; of several, of the busiest."""
    retries: int
    """Units given out again."""
    attempts: int
    """Of the unit that took most."""
    wasted: float
    """Seconds of rollouts that died with their worker."""
    spread: float
    """Seconds from the publication of weights until the last node had them, at most."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.rounds[-1]

    @property
    def per_round(self) -> float:
        """Seconds of a round, the first one aside where there are more."""
        if len(self.rounds) == 1:
            return self.rounds[0]
        return (self.rounds[-1] - self.rounds[0]) / (len(self.rounds) - 1)
