"""The live parts of a run, from its settings: the learner with what its algorithm keeps beside the policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from rlalign.algorithms.base import Given
from rlalign.arrow import open_pairs, pair_files
from rlalign.batches import PairPass, Pairs
from rlalign.config import Run
from rlalign.data.preferences import Pairing, PreferenceSettings, decode
from rlalign.devices import usable
from rlalign.diffusion.paths import RectifiedFlow
from rlalign.learner import Beside, Learner
from rlalign.policies.base import Policy
from rlalign.records import Plan
from rlalign.registry import UserError


def build_learner(run: Run) -> Learner:
    """The learner of a run. Raises UserError where this machine does not have the run's device."""
    device = usable(run.runtime.device, "runtime.device")
    policy = run.policy.load(device)
    check_plan(run, policy)
    algorithm = run.algorithm
    loss: Any = algorithm.loss
    if algorithm.eats == "prompts":
        loss = partial(algorithm.loss, scorer=differentiable_scorer(run, device))
    if run.preferences is not None:
        loss = of_one_size(loss, drawn_size(policy, run.plan), run.preferences.size)
    critic, critic_lr = algorithm.critic(policy, run.plan) or (None, 1e-4)
    beside = Beside(
        critic=critic,
        critic_lr=critic_lr,
        behaviour_decay=algorithm.behaviour_decay,
        refresh_reference=algorithm.reference_rounds,
        proximal=algorithm.wants_proximal,
    )
    return Learner(policy, loss, run.learner, seed=run.seed, threads=run.runtime.learner_threads, beside=beside)


def differentiable_scorer(run: Run, device: str) -> Any:
    """Media and prompts -> each reward's scores and their weighted total, on the learner's device and with gradients."""
    blind = [r.title for r in run.rewards if not r.differentiable]
    if blind:
        raise UserError(
            f"algorithm {run.algorithm.name} needs differentiable rewards, and {', '.join(blind)} gives no gradient; use "
            "another reward, or an algorithm that takes any (ddpo, dpok, grpo)"
        )
    scorers = {r.title: r.load(device) for r in run.rewards}

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
    """Refuses a rule of another path; and where the run ``learns``, what its algorithm could not learn from.

    The algorithm says what that is; beside it, a set of preferences must have pictures of the size that the policy draws.
    """
    if run.plan.rule.startswith("flow_") and not isinstance(policy.path, RectifiedFlow):
        raise UserError(
            f"plan.rule {run.plan.rule!r} needs a flow model, and {run.policy.name!r} is not one; use ddim or ddpm"
        )
    policy.path.levels(run.plan.steps)  # refuses more steps than the path has
    if not learns:
        return
    given = run.preferences
    units = run.prompts.units(run.seed, 1, run.plan) if given is None else ()
    ties = given.ties if given is not None else ""
    run.algorithm.check(Given(policy=policy, plan=run.plan, units=units, ties=ties))
    if given is not None:
        found = (given.size, given.size) if given.size else first_size(given)
        if found is not None:
            check_size(found, drawn_size(policy, run.plan), given.size)


def drawn_size(policy: Policy, plan: Plan) -> tuple[int, int]:
    """(height, width) in pixels of what a policy draws under a plan, by decoding a latent of zeros."""
    blank = torch.zeros(1, *policy.latent_shape(plan), device=policy.device)
    with torch.no_grad():
        height, width = policy.decode(blank).shape[-2:]
    return height, width


def first_size(settings: PreferenceSettings) -> tuple[int, int] | None:
    """(height, width) of a set's first picture as it is stored; None where it cannot be decoded."""
    for batch in open_pairs(pair_files(settings.path)[0], ("jpg_0",), batch=1):
        try:
            _, height, width = decode(batch.column("jpg_0")[0].as_py()).shape
        except ValueError:
            return None
        return height, width
    return None


def check_size(found: tuple[int, int], drawn: tuple[int, int], size: int) -> None:
    """Refuses a set's pictures of another size than the policy draws: it would learn at a resolution that it never samples."""
    if found == drawn:
        return
    (height, width), (high, wide) = drawn, found
    if height != width:
        raise UserError(
            f"preferences must hold pictures of {height} x {width} (height x width), the plan's, got {high} x {wide}; give such "
            "pictures, or a square plan and preferences.size"
        )
    raise UserError(
        f"preferences.size must be {height}, the side of the policy's pictures, got {size} and pictures of {high} x {wide} "
        "(height x width); or set plan.height and plan.width to theirs"
    )


def of_one_size(loss: Callable[..., Any], drawn: tuple[int, int], size: int) -> Callable[..., Any]:
    """A loss on pairs that takes pictures of the policy's own size alone."""

    def checked(batch: PairPass, policy: Policy) -> Any:
        height, width = batch.first.shape[-2:]
        check_size((height, width), drawn, size)
        return loss(batch, policy)

    return checked
