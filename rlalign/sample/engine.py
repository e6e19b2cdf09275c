"""Pieces of work on threads of this process, and rewards that are loaded here."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from rlalign.models import Model
from rlalign.policies.base import Policy
from rlalign.records import Plan
from rlalign.registry import UserError
from rlalign.rewards.base import Reward, Scorer, score, total
from rlalign.work import Cost, Engine, Rewards, Scores, Work


class LiveRewards:
    """Rewards whose scorers are in this process: a ``Rewards``. A failing score is missing, whatever its ``on_error``."""

    def __init__(
        self, rewards: Sequence[Reward], held_out: Sequence[Reward] = (), scorers: Mapping[str, Scorer] | None = None
    ) -> None:
        """``scorers`` by title are taken as they are; without them the rewards are loaded on the CPU."""
        self._rewards = [_dropping(r) for r in rewards]
        self._held_out = [_dropping(r) for r in held_out]
        loaded = scorers if scorers is not None else {r.title: r.load("cpu") for r in (*rewards, *held_out)}
        self._scorers = {title: self._heard(scorer) for title, scorer in loaded.items()}
        self.queries = self.gradients = self.missing = 0
        self.reason = ""
        """What the last scorer that failed said."""

    def scores(self, media_BFCHW: torch.Tensor, prompts: Sequence[str], *, held_out: bool = False) -> Scores:
        asked = [*self._rewards, *(self._held_out if held_out else [])]
        pixels_BFCHW = as_uint8(media_BFCHW)
        raw = {r.title: score(r, self._scorers[r.title], pixels_BFCHW, prompts) for r in asked}
        return self.counted(raw)

    def counted(self, raw: Mapping[str, np.ndarray]) -> Scores:
        """Raw scores with their total; adds to the counts."""
        self.queries += sum(len(v) for v in raw.values())
        self.missing += int(sum((~np.isfinite(v)).sum() for v in raw.values()))
        return Scores(raw, total(self._rewards, raw))

    def gradient(self, media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> tuple[np.ndarray, torch.Tensor]:
        total_B, pull = np.zeros(len(prompts), dtype=np.float32), torch.zeros_like(media_BFCHW)
        for reward in self._rewards:
            value_B, gradient = self.gradient_of(reward, media_BFCHW, prompts)
            total_B, pull = total_B + np.float32(reward.weight) * value_B, pull + reward.weight * gradient
        self.queries += len(prompts) * len(self._rewards)
        self.gradients += len(prompts)
        return total_B, pull

    def gradient_of(
        self, reward: Reward, media_BFCHW: torch.Tensor, prompts: Sequence[str]
    ) -> tuple[np.ndarray, torch.Tensor]:
        """((B,) raw scores, d score / d media) of one reward."""
        with torch.enable_grad():
            media = media_BFCHW.detach().float().requires_grad_()
            value_B = self._scorers[reward.title](media, prompts)
            if not value_B.requires_grad:
                raise UserError(f"rewards.{reward.title} gives no gradient; name another, such as bradley_terry")
            (gradient,) = torch.autograd.grad(value_B.sum(), media)
        return value_B.detach().float().cpu().numpy(), gradient.to(media_BFCHW.dtype)

    def _heard(self, scorer: Scorer) -> Scorer:
        def asked(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            try:
                return scorer(media_BFCHW, prompts)
            except Exception as error:  # whatever it is, it is passed on
                self.reason = f"{type(error).__name__}: {error}"
                raise

        return asked


def _dropping(reward: Reward) -> Reward:
    return reward.model_copy(update={"on_error": "drop"}) if reward.on_error == "raise" else reward


def as_uint8(media_BFCHW: torch.Tensor) -> np.ndarray:
    """Media in [0, 1] as a rollout stores them."""
    return (media_BFCHW.detach() * 255.0).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


class Done(NamedTuple):
    """A piece of work, done."""

    value: Any
    cost: Cost
    reason: str
    """What the last scorer that failed said; empty if none did."""


def perform(work: Work, policy: Policy, rewards: Rewards) -> Done:
    """Does a piece of work and counts what it took."""
    before = (policy.calls, policy.backward_calls, rewards.queries, rewards.gradients, rewards.missing)
    start = time.monotonic()
    value = work.do(policy, rewards)
    cost = Cost(
        denoiser_calls=policy.calls - before[0],
        backward_calls=policy.backward_calls - before[1],
        reward_queries=rewards.queries - before[2],
        gradient_calls=rewards.gradients - before[3],
        missing_scores=rewards.missing - before[4],
        seconds=time.monotonic() - start,
    )
    return Done(value, cost, getattr(rewards, "reason", ""))


def ready_policy(model: Model, device: str, interpolation: float) -> Policy:
    """The policy for sampling: no gradient reaches its weights."""
    if not math.isclose(interpolation, 1.0) and model.run_folder is None:
        raise UserError(f"interpolation needs a run folder's policy, which has a base, got policy {model.title!r}")
    policy = model.load(device)
    policy.interpolation = interpolation
    return policy


class LocalEngine(Engine):
    """Threads of this process, each with a replica of the policy and rewards of its own."""

    def __init__(
        self, policy: Policy, rewards: Sequence[Rewards], *, rows: int, threads: int = 1, parallel: bool = True
    ) -> None:
        """One lane for each of ``rewards``, with ``threads`` threads inside an operation."""
        self.path, self.rows, self.cost, self.reason = policy.path, rows, Cost(), ""
        self._policy = policy
        self.dtype = torch.promote_types(torch.float32, next(policy.network.parameters()).dtype)
        self._idle = deque((policy if i == 0 else policy.replica(), r) for i, r in enumerate(rewards))
        self._pool = (
            ThreadPoolExecutor(len(rewards), "sample", initializer=torch.set_num_threads, initargs=(threads,))
            if parallel
            else None
        )

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        return self._policy.latent_shape(plan)

    def map(self, works: Sequence[Work]) -> list[Any]:
        done = [self._do(w) for w in works] if self._pool is None else list(self._pool.map(self._do, works))
        self.cost = sum((d.cost for d in done), self.cost)
        self.reason = next((d.reason for d in reversed(done) if d.reason), self.reason)
        return [d.value for d in done]

    def _do(self, work: Work) -> Done:
        policy, rewards = self._idle.pop()
        try:
            return perform(work, policy, rewards)
        finally:
            self._idle.append((policy, rewards))
