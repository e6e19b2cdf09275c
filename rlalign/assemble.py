"""The live parts of a run, from its settings: the learner with what its algorithm keeps beside the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from rlalign.batches import Pairs
from rlalign.config import Run
from rlalign.data.preferences import Pairing
from rlalign.diffusion.paths import RectifiedFlow
from rlalign.diffusion.steps import is_stochastic
from rlalign.learner import Beside, Learner
from rlalign.policies.base import Policy
from rlalign.registry import UserError


def build_learner(run: Run) -> Learner:
    """The learner of a run, on this process's device."""
    policy = run.policy.load(run.runtime.device)
    check_plan(run, policy)
    algorithm = run.algorithm
    loss: Any = algorithm.loss
    if algorithm.eats == "prompts":
        loss = partial(algorithm.loss, scorer=differentiable_scorer(run))
    critic, critic_lr = algorithm.critic(policy, run.plan) or (None, 1e-4)
    beside = Beside(
        critic=critic,
        critic_lr=critic_lr,
        behaviour_decay=algorithm.behaviour_decay,
        refresh_reference=algorithm.reference_rounds,
        proximal=algorithm.wants_proximal,
    )
    return Learner(policy, loss, run.learner, seed=run.seed, threads=run.runtime.learner_threads, beside=beside)


def differentiable_scorer(run: Run) -> Any:
    """Media and prompts -> each reward's scores and their weighted total, with gradients to the media."""
    blind = [r.title for r in run.rewards if not r.differentiable]
    if blind:
        raise UserError(
            f"algorithm {run.algorithm.name} needs differentiable rewards, and {', '.join(blind)} gives no gradient; use "
            "another reward, or an algorithm that takes any (ddpo, dpok, grpo)"
        )
    scorers = {r.title: r.load(run.runtime.device) for r in run.rewards}

    def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        scores = {title: one(media_BFCHW, prompts) for title, one in scorers.items()}
        parts = [r.weight * scores[r.title] for r in run.rewards]
        return {**scores, "total": torch.stack(parts).sum(0)}

    return scorer


def preference_pairs(reader: Pairing, round: int) -> list[Pairs]:
    """A round's pairs, cut into passes, their pictures still uint8 (B, 1, 3, H, W): the policy's own encoder reads them."""
    parts = []
    for number, pairs in enumerate(reader.passes(round)):
        sides = ([p.picture_0 for p in pairs], [p.picture_1 for p in pairs])
        if len({picture.shape for side in sides for picture in side}) > 1:
            raise UserError(
                "preferences.size must be > 0 where pictures differ in size (all are then resized to it), got 0"
            )
        first, second = (torch.from_numpy(np.stack(side))[:, None] for side in sides)
        parts.append(
            Pairs(
                prompts=tuple(p.caption for p in pairs),
                first=first,
                second=second,
                label_B=torch.tensor([p.label_0 for p in pairs], dtype=torch.float32),
                key=("pairs", reader.seed, round, number),
            )
        )
    return parts


def check_plan(run: Run, policy: Policy, *, learns: bool = True) -> None:
    """Refuses a rule of another path, and a plan in which a policy gradient would find no stochastic step to learn from."""
    if run.plan.rule.startswith("flow_") and not isinstance(policy.path, RectifiedFlow):
        raise UserError(
            f"plan.rule {run.plan.rule!r} needs a flow model, and {run.policy.name!r} is not one; use ddim or ddpm"
        )
    levels = policy.path.levels(run.plan.steps)
    stochastic = is_stochastic(policy.path, levels, rule=run.plan.rule, eta=run.plan.eta)
    if learns and run.algorithm.eats == "steps" and not bool(stochastic.any()):
        raise UserError(
            f"plan.eta must be > 0 for {run.algorithm.name}, got {run.plan.eta}: no step would have a density"
        )
