"""What an algorithm is: it makes a batch of scored samples and gives a loss on slices of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from rlalign.algorithms._advantages import over_round, within_groups
from rlalign.algorithms._memory import Memory
from rlalign.core.batches import Batch, Key, StepBatch
from rlalign.core.copies import Copy
from rlalign.core.records import Plan, Scored, Trajectory, Unit, moved_latents, prompt_ids_of
from rlalign.core.registry import Recipe, UserError
from rlalign.diffusion.noise import generator, noise_masks, normal
from rlalign.diffusion.steps import is_stochastic, noise_of
from rlalign.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a pass gives the learner."""

    value: torch.Tensor
    """Scalar: the mean over the pass."""
    means: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Metric -> scalar mean over the pass; the learner averages them by weight."""
    maxima: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Metric -> scalar maximum over the pass; the learner takes the largest."""
    via: torch.Tensor | None = None
    """The one tensor by way of which the trained weights enter ``value``. Where its gradient is
    zero (all advantages are, or all ratios are clipped) the network needs no backward pass."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What an algorithm is to learn with, which it looks at before the first round."""

    policy: Policy
    plan: Plan
    units: Sequence[Unit] = ()
    """The units of the first round; none where a set of preferences takes their place."""
    ties: Literal["", "drop", "half"] = ""
    """What that set does with ties; empty where there is none."""


class Algorithm(Recipe):
    """Base of an algorithm: settings, what it eats and keeps, how the batch is made, and the
    loss."""

    shelf: ClassVar[str] = "algorithms"
    eats: ClassVar[type[Batch]] = StepBatch
    """The class of the batch that it learns from, which says what kind of learning it is."""
    sees_media: ClassVar[bool] = False
    """Whether its loss decodes latents, or encodes pictures that are no set's: learners load the
    autoencoder for it."""

    @property
    def copies(self) -> Mapping[str, Copy]:
        """Kind -> how a copy of the trained weights is kept beside the policy. The loss finds it
        with ``policy.as_snapshot(kind)``; rollouts use the copy "behaviour" where there is one, and
        "reference" is what ``policy.as_reference`` gives."""
        return {}

    def ratio_limit(self, round: int) -> float | None:
        """Largest |ratio - 1| before the first update of round ``round`` >= 1 that a run accepts;
        None where no ratio is used, or where it need not be 1."""
        return None

    @property
    def strictly_on_policy(self) -> bool:
        """Whether the loss is right for the first update after a rollout only."""
        return False

    @property
    def normalises(self) -> bool:
        """Whether it divides rewards by their spread, so that several come to one scale when each
        has advantages of its own (``combine: normalised``)."""
        return False

    @property
    def passes_are_even(self) -> bool:
        """Whether every pass of an update asks the denoiser as often as any other, forwards and
        backwards: learners that share one denoiser take their passes in step."""
        return True

    @property
    def times_noised(self) -> int:
        """Times that a sample is noised in an epoch, where it is not replayed step by step."""
        return 1

    def check(self, given: Given) -> None:
        """Raises UserError where there would be nothing to learn, or where the loss is not
        defined."""
        if self.eats.per_step:
            _check_steps(self.name, given)

    def critic(self, policy: Policy, plan: Plan) -> tuple[torch.nn.Module, float] | None:
        """A value network to be trained beside the policy, and its learning rate; the loss is given
        it as ``critic``."""
        return None

    def make_batch(self, scored: Sequence[Scored], memory: Memory) -> Batch:
        """The batch of one round. ``memory`` is the run's; it may be changed."""
        raise NotImplementedError

    def loss(self, batch: Any, policy: Policy) -> Loss:
        """The loss of one pass of the batch, with gradients into the policy's trainable weights."""
        raise NotImplementedError


def check_company(name: str, given: Given, *, within: Literal["unit", "round"] = "round") -> None:
    """Refuses lone samples where samples of a prompt are compared ``within`` a unit or a round:
    their advantage is 0, and they make no pair."""
    if not given.units:
        return
    groups: list[Sequence[int]] = [u.prompt_ids for u in given.units]
    if within == "round":
        groups = [prompt_ids_of(given.units)]
    if all(len(set(ids)) == len(ids) for ids in groups):
        raise UserError(
            f"prompts.samples_per_prompt must be >= 2 for {name}, which compares the"
            " samples of a prompt, got 1; or take an algorithm that needs no company (ddpo with"
            " advantage prompt or global)"
        )


def check_skipped(name: str, given: Given, skip_last: int) -> None:
    """Refuses to leave out so many final steps that some round would have none to learn from,
    wherever its window is."""
    plan = given.plan
    most = plan.steps - 1 - max(_first_steps(given))
    if skip_last > most:
        window = f" and a window of {plan.window}" if plan.window else ""
        raise UserError(
            f"algorithm.skip_last must be <= {most} with {plan.steps} steps{window}, got"
            f" {skip_last}: a round would have no step to learn from; lower it, or raise"
            " plan.steps"
        )


def _check_steps(name: str, given: Given) -> None:
    """Refuses a plan none of whose steps has a density."""
    plan = given.plan
    if plan.eta == 0:
        raise UserError(
            f"plan.eta must be > 0 for {name}, got {plan.eta}: no step would have a density"
        )
    if plan.rule == "flow_ode":
        raise UserError(
            f"plan.rule must have noise for {name}, got 'flow_ode', whose steps have no density;"
            " use flow_sde"
        )
    if not any(_stochastic(given)):
        raise UserError(
            f"plan.steps must be >= 2 for {name}, got {plan.steps}: the step to the clean sample"
            " has no density"
        )
    stochastic_K = _stochastic(given)
    for mask in noise_masks(plan):
        if not any(s and m for s, m in zip(stochastic_K, mask, strict=True)):
            raise UserError(
                f"plan.window must be > {plan.window} for {name} with window_place"
                f" {plan.window_place}, got {plan.window}: a round may have no step with a density;"
                " raise it, or set plan.min_std"
            )


def _stochastic(given: Given) -> list[bool]:
    """Which steps of the plan have a density, windows aside."""
    plan = given.plan
    path = given.policy.path
    levels = path.at(plan).levels(plan.steps)
    return is_stochastic(path, levels, **noise_of(plan)).tolist()


def _first_steps(given: Given) -> list[int]:
    """The first step with noise, for each place that the plan's window may have."""
    stochastic_K = _stochastic(given)
    firsts = []
    for mask in noise_masks(given.plan):
        both = [s and m for s, m in zip(stochastic_K, mask, strict=True)]
        firsts.append(both.index(True))
    return firsts


AdvantageOver = Literal["prompt", "group", "global", "centred"]
ADVANTAGE = (
    "whose statistics: running per prompt, the round's samples of a prompt, or the round; centred"
    " takes a prompt's mean away and leaves the reward's units"
)


def rewards_of(scored: Sequence[Scored]) -> tuple[np.ndarray, list[int]]:
    """(B,) float32 weighted totals of a round in unit order (NaN: dropped), and the prompt id of
    each."""
    total_B = np.concatenate([s.total_B for s in scored])
    return total_B, prompt_ids_of(s.unit for s in scored)


def advantages_of(
    scored: Sequence[Scored], advantage: Callable[[np.ndarray, str], np.ndarray]
) -> np.ndarray:
    """(B,) float64 advantages of a round. ``advantage`` gives them for (B,) rewards under a title:
    of the totals ("total"), or where a round is scored by several rewards on scales of their own
    (``combine: normalised``), the weighted sum of those of each reward.

    Source: Liu 2026 (GDPO), arXiv:2601.05242, without its last division by the round's spread; Li
    2025 (MixGRPO), arXiv:2507.21802.
    """
    if not scored[0].by_reward:
        return advantage(rewards_of(scored)[0], "total")
    kept_B = np.isfinite(rewards_of(scored)[0])
    out_B = np.zeros(len(kept_B))
    for title, (weight, _) in scored[0].by_reward.items():
        # a sample that one reward dropped takes part for none
        score_B = np.concatenate([s.by_reward[title][1] for s in scored])
        out_B += weight * advantage(np.where(kept_B, score_B, np.nan), title)
    return out_B


def standardised(
    scored: Sequence[Scored],
    memory: Memory,
    over: AdvantageOver,
    *,
    size: int = 16,
    min_count: int = 16,
) -> np.ndarray:
    """(B,) float64 advantages: running statistics per prompt, the round's samples of a prompt, or
    the whole round."""
    prompt_B = rewards_of(scored)[1]

    def advantage(reward_B: np.ndarray, title: str) -> np.ndarray:
        if over == "prompt":
            statistics = memory.statistics_of(title)
            return statistics.advantages(reward_B, prompt_B, size=size, min_count=min_count)
        if over == "global":
            return over_round(reward_B)
        return within_groups(reward_B, prompt_B, std="none" if over == "centred" else "group")

    return advantages_of(scored, advantage)


def relative_to_groups(scored: Sequence[Scored], std: str) -> np.ndarray:
    """(B,) float64 advantages relative to the prompt's samples, over the ``std`` of the "group" or
    of the round ("global")."""
    prompt_B = rewards_of(scored)[1]
    return advantages_of(scored, lambda reward_B, _: within_groups(reward_B, prompt_B, std=std))


def per_unit(scored: Sequence[Scored], value_B: np.ndarray) -> tuple[torch.Tensor, ...]:
    """A round's values as one float32 tensor per unit."""
    bounds = np.cumsum([len(s.unit.prompts) for s in scored])[:-1]
    return tuple(torch.from_numpy(part.astype(np.float32)) for part in np.split(value_B, bounds))


def step_batch(
    scored: Sequence[Scored],
    advantage_B: np.ndarray,
    *,
    skip_last: int = 0,
    side_B: Sequence[np.ndarray] = (),
) -> StepBatch:
    """Denoising steps of a round with these advantages. Arrays are cloned: they may be shared
    memory.

    The last ``skip_last`` steps are left out of the loss, as if they were deterministic.
    ``side_B`` has each unit's sides, where samples are compared.
    """
    trajectories = [s.trajectory for s in scored]
    assert all(t is not None for t in trajectories), "a step batch needs trajectories"
    kept = [t for t in trajectories if t is not None]
    learned = [_learned(t.stochastic_K, skip_last) for t in kept]
    return StepBatch(
        units=tuple(t.unit for t in kept),
        latents=tuple(_moved(t, steps_K) for t, steps_K in zip(kept, learned, strict=True)),
        log_prob=tuple(torch.from_numpy(np.array(t.log_prob_BK)) for t in kept),
        stochastic=tuple(learned),
        advantage=per_unit(scored, advantage_B),
        reward=per_unit(scored, rewards_of(scored)[0]),
        side=tuple(torch.from_numpy(one.astype(np.float32)) for one in side_B),
    )


def final_latents(scored: Sequence[Scored]) -> tuple[torch.Tensor, ...]:
    """Per unit the clean latents (B, C, H, W) float32 that its trajectories ended in, cloned."""
    trajectories = [s.trajectory for s in scored]
    assert all(t is not None for t in trajectories), "an image batch needs trajectories"
    return tuple(
        torch.from_numpy(np.array(t.latents_BK1[:, -1], dtype=np.float32))
        for t in trajectories
        if t
    )


def noised(
    policy: Policy, key: Key, clean_BCHW: torch.Tensor, plan: Plan, caption_dropout: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pass's own draws: levels (B,) spread as in pretraining, noise (B, C, H, W), and which
    captions are left out (B,) bool."""
    rng = generator(*key)
    rows = len(clean_BCHW)
    level_B = policy.path.at(plan).random_levels(rng.random(rows))
    noise_BCHW = normal((*key, "noise"), clean_BCHW.shape).to(clean_BCHW)
    return level_B, noise_BCHW, torch.from_numpy(rng.random(rows) < caption_dropout)


def best_and_worst(reward_B: np.ndarray, prompt_B: Sequence[int]) -> list[tuple[int, int]]:
    """(best, worst) sample of each prompt with two or more kept samples, in order of first
    appearance; NaN is dropped.

    Among equals the first is best and the last is worst, so a group of ties still names two
    samples.
    """
    pairs = []
    for prompt in dict.fromkeys(prompt_B):
        own = [i for i, p in enumerate(prompt_B) if p == prompt and np.isfinite(reward_B[i])]
        if len(own) > 1:
            best = max(own, key=lambda i: (reward_B[i], -i))
            pairs.append(
                (best, min((i for i in own if i != best), key=lambda i: (reward_B[i], -i)))
            )
    return pairs


def _moved(trajectory: Trajectory, learned_K: torch.Tensor) -> torch.Tensor:
    """A copy of a trajectory's latents: all, or under a plan with a window those of the steps that
    are learned from."""
    latents_BK1 = trajectory.latents_BK1
    if trajectory.unit.plan.window:
        wanted = moved_latents(learned_K.tolist())
        latents_BK1 = latents_BK1[:, [trajectory.kept.index(number) for number in wanted]]
    return torch.from_numpy(np.array(latents_BK1, dtype=np.float32))


def _learned(stochastic_K: np.ndarray, skip_last: int) -> torch.Tensor:
    learned_K = torch.from_numpy(np.array(stochastic_K))
    if skip_last:
        learned_K[-skip_last:] = False
    return learned_K
