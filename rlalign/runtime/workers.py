"""The actors that do the work. They hold a policy or a scorer and nothing of the run's state: any
of them may die."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import ray
import torch

from rlalign.alignment.models import Model, ready_policy
from rlalign.config import RuntimeSettings
from rlalign.core.garbage import pause_collection
from rlalign.core.records import Plan, Space
from rlalign.core.registry import UserError
from rlalign.engine import Work
from rlalign.engine.local import LiveRewards, do_and_count
from rlalign.engine.shared import SharedPolicy, read_words
from rlalign.networks.devices import usable
from rlalign.networks.embeddings import Reader
from rlalign.networks.precision import here, start_thread
from rlalign.rewards.base import FittedScorer, Reward
from rlalign.runtime.began import BEGAN
from rlalign.runtime.engine import SEATS
from rlalign.runtime.gauges import shown
from rlalign.runtime.rewards import RemoteRewards, RewardActors
from rlalign.runtime.weights import Manifest, expect, receive, receive_tensors


@contextlib.contextmanager
def naming_the_node() -> Iterator[None]:
    """On a cluster of several nodes a UserError from inside says on which one it was: a file may be
    on another."""
    try:
        yield
    except UserError as error:
        if sum(bool(node["Alive"]) for node in ray.nodes()) < 2:
            raise
        raise UserError(
            f"{error} (on node {ray.util.get_node_ip_address()} of the cluster)"
        ) from error


class Worker:
    """What a pool asks of an actor.

    A UserError of a subclass's constructor is raised where the worker is first asked for something:
    of an actor whose constructor fails, Ray passes on a text alone.
    """

    label = "worker"
    ready_at = 0.0
    """When the constructor was done, seconds since the epoch."""
    refusal: UserError | None = None
    """What the constructor raised."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "__init__" not in cls.__dict__:
            return
        begin: Callable[..., None] = cls.__init__

        @functools.wraps(begin)
        def begin_or_refuse(self: Worker, *args: Any, **kwargs: Any) -> None:
            try:
                with pause_collection():
                    begin(self, *args, **kwargs)
            except UserError as error:
                self.refusal = error
            gc.freeze()  # what is loaded by now stays

        cls.__init__ = begin_or_refuse

    def ping(self) -> str:
        """Alive, and able to work."""
        if self.refusal is not None:
            raise self.refusal
        return "pong"

    def apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a function on the worker."""
        return function(self, *args, **kwargs)

    def process_id(self) -> int:
        """The operating system's process."""
        return os.getpid()

    def node_id(self) -> str:
        """Ray's id of the node."""
        return ray.get_runtime_context().get_node_id()

    def loading_seconds(self) -> float:
        """From when the process was told what it is until it could work: imports and weights."""
        return self.ready_at - BEGAN

    def __repr__(self) -> str:
        return self.label


@dataclass(frozen=True, kw_only=True)
class PolicySource:
    """What a policy worker loads, where it computes, and whom it asks for scores."""

    model: Model
    runtime: RuntimeSettings
    interpolation: float = 1.0
    rewards: RewardActors | None = None
    """None where its work asks for none."""
    reader: Reader | None = None
    """Gives the words of prompts; None where the policy has text encoders or a file."""
    shapes: tuple[tuple[Plan, int], ...] = ()
    """Plans, each with the rows of a piece, that compiled code is made for before it is ready."""


class PolicyWorker(Worker):
    """Holds a policy and does pieces of work, each under the weights that come with it or that are
    there.

    Where Ray gives it threads, the next piece reads its words, and has its weights brought to the
    node, while one asks the policy; it asks the policy while that one waits for scores or goes into
    the object store. The policy is asked by one at a time.
    """

    def __init__(self, source: PolicySource, label: str, **how: Any) -> None:
        """``how`` are further keywords of ``PolicyRecipe.load``."""
        torch.set_num_threads(source.runtime.rollout.threads)
        self.label = label
        with naming_the_node():
            device = usable(source.runtime.device, "runtime.device")
            self._policy = ready_policy(
                source.model, device, source.interpolation, reader=source.reader, **how
            )
        for plan, rows in source.shapes:
            self._policy.warm_up(plan, rows)
        asked = source.rewards
        rewards = [RemoteRewards(asked) if asked else LiveRewards(()) for _ in range(SEATS)]
        self._shared = SharedPolicy(self._policy, rewards)
        self._tag: tuple[str, int] | None = None
        self._thread = threading.local()
        self._begin = (source.runtime.rollout.threads, here(self._policy.device))
        self.ready_at = time.time()

    def do(
        self,
        work: Work,
        tag: tuple[str, int] | None = None,
        *manifests: Manifest,
    ) -> tuple[Any, ...]:
        """The parts of the value, and last the facts of the piece (what of ``Cost`` is not 0; what
        the last scorer that failed said): so many objects, each of which goes only where it is
        needed.

        ``tag`` is that of the weights that are meant; None for whatever the worker has. It need not
        be told where those are that it holds; None in place of the facts says that it holds others.
        """
        start = time.monotonic()
        expect(manifests)  # while the piece before this one is still being done

        # Ray has several threads for calls, and what torch is set to is a thread's own
        if not hasattr(self._thread, "begun"):
            start_thread(*self._begin)
            self._thread.begun = True
        under = f" under {tag[0]} v{tag[1]}" if tag is not None else ""
        with self._shared.seat(tag) as (policy, rewards, turn):
            read_words(work, policy)
            turn.take()
            with shown(f"{work.unit.key}{under}"):
                if not self._take_over(tag, manifests):
                    return (*[None] * work.parts, None)
                done = do_and_count(work, policy, rewards)
            # words and taking over weights are work too, waiting for another piece is not
            seconds = time.monotonic() - start - turn.waited

        parts = done.value if work.parts > 1 else (done.value,)
        cost = replace(done.cost, seconds=seconds)
        spent = {name: amount for name, amount in vars(cost).items() if amount}
        return *parts, (spent, done.reason)

    def _take_over(self, tag: tuple[str, int] | None, manifests: Sequence[Manifest]) -> bool:
        """Takes over the weights that are meant, where it does not hold them. False where it holds
        others and was not told where these are."""
        if tag is None or tag == self._tag:
            return True
        if not manifests:
            return False
        self._tag = None  # until all of them are there
        self._policy.set_rows(receive(manifests, self._policy.device))
        self._tag = tag
        return True


class RewardWorker(Worker):
    """Holds one reward's scorer; scores samples, or differentiates their scores."""

    def __init__(self, reward: Reward, device: str, threads: int, label: str) -> None:
        torch.set_num_threads(threads)
        self.label = label
        self._reward = reward
        with naming_the_node():
            scorer = reward.load_scorer(usable(device, "runtime.device"))
        scorers = {reward.title: scorer}
        self._scorer = scorer
        self._tag: tuple[str, int] | None = None
        self._strict = LiveRewards([reward], scorers=scorers, strict=True)
        self._lenient = LiveRewards([reward], scorers=scorers)
        self.ready_at = time.time()

    def score(
        self,
        samples: Mapping[Space, np.ndarray],
        prompts: Sequence[str],
        unit: str = "",
        drop: bool = False,
        tag: tuple[str, int] | None = None,
        *manifests: Manifest,
    ) -> tuple[np.ndarray, float, str]:
        """(raw scores (B,) float32 of samples, seconds, what the scorer last said when it failed).

        A failing score is answered by the reward's own error policy, and with ``drop`` is NaN.
        ``unit`` names the samples. ``tag`` is that of the weights that are meant, where a run fits
        the reward anew; they come along, and stay in shared memory for who has them.
        """
        start = time.monotonic()
        rewards = self._lenient if drop else self._strict
        if tag is not None and tag != self._tag and manifests:
            scorer = cast(FittedScorer, self._scorer)
            scorer.set_weights(receive_tensors(manifests))
            self._tag = tag
        with shown(f"{self._reward.title} of {unit or 'samples'}"):
            found = rewards.score_arrays(samples, prompts)
        return found.raw[self._reward.title], time.monotonic() - start, rewards.reason

    def score_units(
        self,
        prompts: Sequence[Sequence[str]],
        units: Sequence[str],
        drop: bool,
        given: Sequence[Any],
        *samples: Mapping[Space, np.ndarray],
    ) -> list[tuple[np.ndarray, float, str]]:
        """What ``score`` says of each unit's samples, in one call of the scorer, with an equal
        share of the seconds for each sample. Those of different shapes are scored unit by unit."""
        given = [ray.get(one) if isinstance(one, ray.ObjectRef) else one for one in given]
        space = self._reward.sees
        arrays = [one[space] for one in samples]
        if len({array.shape[1:] for array in arrays}) > 1:
            asked = zip(samples, prompts, units, strict=True)
            return [self.score(one, texts, unit, drop, *given) for one, texts, unit in asked]

        # as one unit, and taken apart again
        ends = np.cumsum([len(array) for array in arrays])
        score_B, seconds, reason = self.score(
            {space: np.concatenate(arrays)},
            [prompt for texts in prompts for prompt in texts],
            ", ".join(units),
            drop,
            *given,
        )
        parts = np.split(score_B, ends[:-1])
        return [(part, seconds * len(part) / len(score_B), reason) for part in parts]

    def gradient(
        self, samples_B: np.ndarray, prompts: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(raw scores (B,), d score / d samples) of what the reward sees, in floats."""
        given_B = torch.from_numpy(np.array(samples_B))
        with shown(f"gradient of {self._reward.title}"):
            value_B, gradient = self._lenient.gradient_of(self._reward, given_B, prompts)
        return value_B, gradient.numpy()
