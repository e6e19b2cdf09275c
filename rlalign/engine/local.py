"""Pieces of work on threads of this process, and rewards that are loaded here."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlalign.core.finite import WEAKER, NotFinite, all_finite, refuse, watching
from rlalign.core.media import as_arrays
from rlalign.core.records import Plan, Space
from rlalign.core.registry import UserError
from rlalign.core.turns import give_turn, waited_seconds
from rlalign.engine.base import Cost, Engine, Rewards, Scores, Work, WorkResult
from rlalign.engine.pieces import latent_dtype
from rlalign.engine.shared import SharedPolicy, read_words
from rlalign.policies.base import Policy
from rlalign.rewards.base import Reward, Scorer, score, spaces_of, total


class LiveRewards:
    """Rewards whose scorers are in this process: a ``Rewards``. A failing score is missing,
    whatever its ``on_error``, unless they are strict."""

    def __init__(
        self,
        rewards: Sequence[Reward],
        held_out: Sequence[Reward] = (),
        scorers: Mapping[str, Scorer] | None = None,
        *,
        strict: bool = False,
    ) -> None:
        """``scorers`` by title are taken as they are; without them the rewards are loaded on the
        CPU. ``strict``: what fails is answered by each reward's own ``on_error``."""
        self._rewards = [r if strict else drop_errors(r) for r in rewards]
        self._held_out = [r if strict else drop_errors(r) for r in held_out]
        if scorers is None:
            scorers = {r.title: r.load_scorer("cpu") for r in (*rewards, *held_out)}
        self._scorers = {title: self._with_reason(scorer) for title, scorer in scorers.items()}
        self.queries = self.gradients = self.missing = 0
        self.reason = ""
        """What the last scorer that failed said."""
        self.lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        """Held while scorers score, by those who share one."""

    def asked(self, held_out: bool) -> list[Reward]:
        """The rewards that are followed, and the held-out ones where asked for."""
        return [*self._rewards, *(self._held_out if held_out else [])]

    def spaces(self, *, held_out: bool = False) -> frozenset[Space]:
        return spaces_of(self.asked(held_out))

    def scores(
        self,
        samples: Mapping[Space, torch.Tensor],
        prompts: Sequence[str],
        *,
        held_out: bool = False,
    ) -> Scores:
        return self.score_arrays(as_arrays(samples), prompts, held_out=held_out)

    def score_arrays(
        self, samples: Mapping[Space, np.ndarray], prompts: Sequence[str], *, held_out: bool = False
    ) -> Scores:
        let_others_ask()
        raw: dict[str, np.ndarray] = {}
        seconds: dict[str, float] = {}
        with self.lock:
            for reward in self.asked(held_out):
                start = time.monotonic()
                scorer = self._scorers[reward.title]
                raw[reward.title] = score(reward, scorer, samples[reward.sees], prompts)
                seconds[reward.title] = time.monotonic() - start
        return self.counted(raw)._replace(seconds=seconds)

    def counted(self, raw: Mapping[str, np.ndarray]) -> Scores:
        """Raw scores with their total; adds to the counts."""
        self.queries += sum(len(v) for v in raw.values())
        self.missing += int(sum((~np.isfinite(v)).sum() for v in raw.values()))
        return Scores(raw, total(self._rewards, raw))

    def gradient(
        self, samples: Mapping[Space, torch.Tensor], prompts: Sequence[str]
    ) -> tuple[np.ndarray, dict[Space, torch.Tensor]]:
        total_B = np.zeros(len(prompts), dtype=np.float32)
        pulls: dict[Space, torch.Tensor] = {s: torch.zeros_like(v) for s, v in samples.items()}
        for reward in self._rewards:
            value_B, gradient = self.gradient_of(reward, samples[reward.sees], prompts)
            total_B = total_B + np.float32(reward.weight) * value_B
            pulls[reward.sees] = pulls[reward.sees] + reward.weight * gradient
        self.queries += len(prompts) * len(self._rewards)
        self.gradients += len(prompts)
        return total_B, pulls

    def gradient_of(
        self, reward: Reward, samples_B: torch.Tensor, prompts: Sequence[str]
    ) -> tuple[np.ndarray, torch.Tensor]:
        """((B,) raw scores, d score / d samples) of one reward, of what it sees."""
        with torch.enable_grad(), self.lock:
            given_B = samples_B.detach().float().requires_grad_()
            value_B = self._scorers[reward.title](given_B, prompts)
            if not value_B.requires_grad:
                raise UserError(
                    f"rewards.{reward.title} gives no gradient; name another, such as bradley_terry"
                )
            (gradient,) = torch.autograd.grad(value_B.sum(), given_B)
        known_B = torch.isfinite(value_B.detach())
        # a picture without a score has nowhere to go
        if not bool(known_B.all()):
            gradient = torch.where(known_B.reshape(-1, *([1] * (gradient.ndim - 1))), gradient, 0.0)
        refuse(
            gradient,
            f"the gradient of rewards.{reward.title}",
            "take another reward, or a sampler that needs no gradient",
        )
        return value_B.detach().float().cpu().numpy(), gradient.to(samples_B.dtype)

    def _with_reason(self, scorer: Scorer) -> Scorer:
        def asked(samples_B: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            try:
                return scorer(samples_B, prompts)
            except Exception as error:  # whatever it is, it is passed on
                self.reason = f"{type(error).__name__}: {error}"
                raise

        return asked


def let_others_ask() -> None:
    """Lets the next piece have the policy while this one waits for scores, unless a gradient goes
    on through the policy afterwards: two graphs at once would take twice the memory."""
    if not torch.is_grad_enabled():
        give_turn()


def drop_errors(reward: Reward) -> Reward:
    """The reward where a failing score is missing and ends nothing."""
    return reward.model_copy(update={"on_error": "drop"}) if reward.on_error == "raise" else reward


def do_and_count(work: Work, policy: Policy, rewards: Rewards) -> WorkResult:
    """Does a piece of work and counts what it took."""
    before = _read_meters(policy, rewards)
    start = time.monotonic() - waited_seconds()
    value = do_finite(work, policy, rewards)
    cost = _read_meters(policy, rewards) - before
    cost = replace(cost, seconds=time.monotonic() - waited_seconds() - start)
    return WorkResult(value, cost, getattr(rewards, "reason", ""))


def _read_meters(policy: Policy, rewards: Rewards) -> Cost:
    return Cost(
        denoiser_calls=policy.meter.calls,
        backward_calls=policy.meter.backward_calls,
        reward_queries=rewards.queries,
        gradient_calls=rewards.gradients,
        missing_scores=rewards.missing,
    )


def do_finite(work: Work, policy: Policy, rewards: Rewards) -> Any:
    """The value of a piece of work. Where one of its tensors is not finite, it is done again with
    an eye on every part.

    Raises NotFinite in the name of the part at fault.
    """
    try:
        value = work.do(policy, rewards)
        if work.explains_itself or all_finite(value):
            return value
    except NotFinite:
        if work.explains_itself:
            raise
        # it may have come from further up than where it was seen
    with watching("in sampling"):
        work.do(policy, rewards)
    raise NotFinite(
        "sampling: latents are not finite (NaN or infinity), and every answer of the policy is;"
        f" {WEAKER}"
    )


class LocalEngine(Engine):
    """Threads of this process, each with a replica of the policy and rewards of its own."""

    def __init__(
        self,
        policy: Policy,
        rewards: Sequence[Rewards],
        *,
        rows: int,
        threads: int = 1,
        parallel: bool = True,
        seats: int = 1,
    ) -> None:
        """One lane for each ``seats`` of ``rewards``, with ``threads`` threads inside an operation.
        With two seats a lane's policy makes the next piece while one waits for its scores."""
        self.path = policy.path
        self.dtype = latent_dtype(policy)
        self.rows = rows
        self.cost = Cost()
        self.reason = ""
        self._policy = policy
        # a lane is a replica of the policy with rewards of its own
        self._lanes: list[SharedPolicy] = []
        for start in range(0, len(rewards), seats):
            own = rewards[start : start + seats]
            _share_scorers(own)
            self._lanes.append(SharedPolicy(policy.replica() if start else policy, own))
        self._choosing = threading.Lock()
        self._pool = None
        if parallel:
            limit = {"initializer": torch.set_num_threads, "initargs": (threads,)}
            self._pool = ThreadPoolExecutor(len(rewards), "sample", **limit)

    @classmethod
    def with_lanes(
        cls,
        policy: Policy,
        rewards: Callable[[], Rewards],
        *,
        workers: int,
        rows: int,
        threads: int = 1,
        seats: int = 1,
    ) -> LocalEngine:
        """One lane for each of ``workers``, with rewards of its own for each seat; on a GPU one
        lane is enough."""
        lanes = workers if policy.device == "cpu" else 1
        made = [rewards() for _ in range(lanes * seats)]
        return cls(policy, made, rows=rows, threads=threads, seats=seats)

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        return self._policy.latent_shape(plan)

    def submit(self, work: Work) -> Future[WorkResult]:
        """Starts a piece; whoever takes its result adds to the cost."""
        if self._pool is not None:
            return self._pool.submit(self._do, work)
        done: Future[WorkResult] = Future()
        done.set_result(self._do(work))
        return done

    def perform(self, works: Sequence[Work]) -> list[WorkResult]:
        return list((self._pool.map if self._pool else map)(self._do, works))

    def _do(self, work: Work) -> WorkResult:
        with self._choosing:
            lane = min(self._lanes, key=lambda lane: lane.taken)
            lane.taken += 1
        try:
            with lane.seat() as (policy, rewards, turn):
                if lane.seats > 1:
                    read_words(work, policy)
                    turn.take()
                return do_and_count(work, policy, rewards)
        finally:
            with self._choosing:
                lane.taken -= 1


def _share_scorers(some: Sequence[Rewards]) -> None:
    """Has those who share a lane score one after the other, as one alone would."""
    lock = threading.Lock()
    for one in some if len(some) > 1 else ():
        if isinstance(one, LiveRewards):
            one.lock = lock
