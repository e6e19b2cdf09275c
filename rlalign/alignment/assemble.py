"""The live parts of a run, from its settings: the learner with what its algorithm keeps beside the
policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rlalign.algorithms.base import Given
from rlalign.config import Run
from rlalign.core.batches import DifferentiableScorer, PairPass, Pairs
from rlalign.core.records import Plan, Space
from rlalign.core.registry import UserError
from rlalign.data.pairs.buckets import STEPS, buckets_of
from rlalign.data.pairs.reader import Pairing, PreferenceSettings, first_pair
from rlalign.diffusion.paths import RectifiedFlow
from rlalign.diffusion.steps import is_stochastic, noise_of
from rlalign.learning.learner import Learner
from rlalign.networks.devices import usable
from rlalign.networks.embeddings import Reader
from rlalign.policies.base import WHOLE, Policy
from rlalign.rewards.base import Reward, spaces_of


def build_learner(run: Run, reader: Reader | None = None, *, whole: bool = False) -> Learner:
    """The learner of a run; ``reader`` gives the words of prompts in place of text encoders here.
    Its policy has the parts that the algorithm needs, or with ``whole`` all of them, so that it
    draws pictures too. Raises UserError where this machine does not have the run's device."""
    # the policy must be able to draw what the plan asks for
    device = usable(run.runtime.device, "runtime.device")
    parts = WHOLE if whole else run.learner_parts
    spread = run.learner.shard != "none"
    policy = run.policy.load(device, parts=parts, reader=reader, spread=spread)
    check_plan(run, policy)
    algorithm = run.algorithm

    # pairs may have pictures of another size than the policy draws
    loss: Any = algorithm.loss
    if run.preferences is not None:
        loss = of_one_size(loss, policy.drawn_size(run.plan), run.preferences)

    # the algorithm says which copies and which critic it needs
    return Learner(
        policy,
        loss,
        run.learner,
        seed=run.seed,
        threads=run.runtime.learner.threads,
        copies=algorithm.copies,
        critic=algorithm.critic(policy, run.plan),
    )


def differentiable_scorer(run: Run, device: str) -> DifferentiableScorer:
    """Samples and prompts -> each reward's scores and their weighted total, on the learner's device
    and with gradients. Raises UserError for a reward that has none."""
    blind = [r.title for r in run.rewards if not r.differentiable]
    if blind:
        raise UserError(
            f"algorithm {run.algorithm.name} needs differentiable rewards, and {', '.join(blind)}"
            " gives no gradient; use another reward, or an algorithm that takes any (ddpo, dpok,"
            " grpo)"
        )
    return _WeightedScorer(run.rewards, device)


class _WeightedScorer:
    """The scorers of rewards, and their weighted sum: a ``DifferentiableScorer``."""

    def __init__(self, rewards: Sequence[Reward], device: str) -> None:
        self._rewards = rewards
        self._scorers = [reward.load_scorer(device) for reward in rewards]

    @property
    def spaces(self) -> frozenset[Space]:
        return spaces_of(self._rewards)

    def __call__(
        self, samples: Mapping[Space, torch.Tensor], prompts: Sequence[str], /
    ) -> Mapping[str, torch.Tensor]:
        asked = list(zip(self._rewards, self._scorers, strict=True))
        scores = {r.title: scorer(samples[r.sees], prompts) for r, scorer in asked}
        parts = [r.weight * scores[r.title] for r in self._rewards]
        return {**scores, "total": torch.stack(parts).sum(0)}


def preference_pairs(reader: Pairing, round: int, plan: Plan) -> list[Pairs]:
    """A round's pairs, cut into passes, their media still uint8 (B, F, 3, H, W): the policy's
    own encoder reads them."""
    parts = []
    for number, pairs in enumerate(reader.passes(round)):
        # the pictures of one pass must be of one size
        sides = ([p.media_0 for p in pairs], [p.media_1 for p in pairs])
        if len({media.shape for side in sides for media in side}) > 1:
            raise UserError(
                "preferences.size must be > 0 where pictures differ in size (all are then resized"
                " to it), got 0"
            )

        # of a bucket the policy is told how its pictures were cut, and what size it would draw
        crops = None
        drawn = plan
        if pairs[0].crop_0 is not None:
            crops = (
                torch.tensor([p.crop_0 for p in pairs]),
                torch.tensor([p.crop_1 for p in pairs]),
            )
            height, width = pairs[0].media_0.shape[-2:]
            drawn = plan.model_copy(update={"height": height, "width": width})

        # one tensor for each side
        first, second = (torch.from_numpy(np.stack(side)) for side in sides)
        parts.append(
            Pairs(
                prompts=tuple(p.caption for p in pairs),
                first=first,
                second=second,
                label_B=torch.tensor([p.label_0 for p in pairs], dtype=torch.float32),
                key=("pairs", reader.seed, round, number),
                plan=drawn,
                crops=crops,
            )
        )
    return parts


def with_size(plan: Plan, size: Sequence[int]) -> Plan:
    """The plan, drawing at another (height, width)."""
    height, width = size
    return plan.model_copy(update={"height": height, "width": width})


def check_plan(run: Run, policy: Policy, *, learns: bool = True) -> None:
    """Refuses a rule of another path; and where the run ``learns``, what its algorithm could not
    learn from.

    The algorithm says what that is; beside it, a set of preferences must be one, and have pictures
    of the size that the policy draws.
    """
    if run.plan.rule.startswith("flow_") and not isinstance(policy.path, RectifiedFlow):
        raise UserError(
            f"plan.rule {run.plan.rule!r} needs a flow model, and {run.policy.name!r} is not one;"
            " use ddim or ddpm"
        )

    # refuses a size, or a number of frames, that the policy does not draw
    policy.latent_shape(run.plan)

    # refuses more steps than the path has, and a rule that has no Gaussian on it
    levels = policy.path.at(run.plan).levels(run.plan.steps)
    is_stochastic(policy.path, levels, **noise_of(run.plan))

    # the rest is of training alone
    if not learns:
        return

    # what the algorithm itself refuses
    given = run.preferences
    units = run.prompts.units(run.seed, 1, run.plan) if given is None else ()
    ties = given.ties if given is not None else ""
    run.algorithm.check(Given(policy=policy, plan=run.plan, units=units, ties=ties))

    # only the first pair is looked at here
    if given is not None and given.resize == "buckets":
        check_buckets(run.plan, policy, given.size)
    elif given is not None:
        first = first_pair(given, run.plan.frames)
        if first is not None:
            height, width = first.media_0.shape[-2:]
            check_size((height, width), policy.drawn_size(run.plan), given.size)


def check_size(found: tuple[int, int], drawn: tuple[int, int], size: int) -> None:
    """Refuses a set's pictures of another size than the policy draws: it would learn at a
    resolution that it never samples."""
    if found == drawn:
        return
    (height, width), (high, wide) = drawn, found
    if height != width:
        raise UserError(
            f"preferences must hold pictures of {height} x {width} (height x width), the plan's,"
            f" got {high} x {wide}; give such pictures, or a square plan and preferences.size"
        )
    raise UserError(
        f"preferences.size must be {height}, the side of the policy's pictures, got {size} and"
        f" pictures of {high} x {wide} (height x width); or set plan.height and plan.width to"
        " theirs"
    )


def check_buckets(plan: Plan, policy: Policy, size: int) -> None:
    """Refuses buckets of sizes that the policy does not draw, and those that the plan's size is not
    among."""
    drawn = policy.drawn_size(plan)
    if drawn not in buckets_of(size):
        height, width = drawn
        others = [n for n in range(STEPS, 2 * max(drawn), STEPS) if drawn in buckets_of(n)]
        instead = f"; set it to {' or '.join(map(str, others))}" if others else ""
        raise UserError(
            "preferences.size must be that of buckets of which the plan's size is one, got"
            f" {size} with a plan of {height} x {width} (height x width){instead}"
        )
    for height, width in buckets_of(size):
        try:
            policy.latent_shape(with_size(plan, (height, width)))
        except UserError as error:
            raise UserError(
                f"preferences.size: the bucket of {height} x {width} (height x width) must be a"
                f" size that the policy draws, got {size}: {error}; take another multiple of"
                f" {STEPS}, or resize crop"
            ) from error


def of_one_size(
    loss: Callable[..., Any], drawn: tuple[int, int], given: PreferenceSettings
) -> Callable[..., Any]:
    """A loss on pairs that takes pictures of the policy's own size alone, or of a bucket's."""
    if given.resize == "buckets":
        return loss

    def checked(batch: PairPass, policy: Policy, **critic: Any) -> Any:
        height, width = batch.pairs.first.shape[-2:]
        check_size((height, width), drawn, given.size)
        return loss(batch, policy, **critic)

    return checked
