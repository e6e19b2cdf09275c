"""Reward backpropagation: the gradient of a differentiable reward through the last denoising
steps."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch.utils.checkpoint import checkpoint

from rlalign.algorithms import _objectives as objectives
from rlalign.algorithms.base import Algorithm, Loss
from rlalign.core.batches import PromptBatch, PromptPass
from rlalign.core.records import Unit
from rlalign.core.registry import Before
from rlalign.diffusion.noise import generator, normal, unit_noise
from rlalign.diffusion.paths import coefficients
from rlalign.diffusion.rollout import advance, denoised, schedule_of
from rlalign.policies.base import Condition, Policy


class RewardBackprop(Algorithm):
    """Maximises E[r(sample)] by backpropagation through the sampler; the rewards must be
    differentiable.

    ``draft``: through the last ``last_steps`` steps (DRaFT-K; 0 is all of them); with ``resamples``
    n the final picture is noised n times to the last level and the one-step gradients are averaged
    (DRaFT-LV). ``alignprop``: one cut per trajectory, drawn uniformly. ``refl``: without gradient
    to a random step among the last quarter, one step with gradient, and the reward of the clean
    picture predicted there, as weight * relu(hinge - r).

    Source: DRaFT, Clark 2023, arXiv:2309.17400; AlignProp, Prabhudesai 2023, arXiv:2310.03739;
    ReFL, Xu 2023, arXiv:2304.05977.
    """

    eats = PromptBatch
    sees_media = True

    form: Literal["draft", "alignprop", "refl"] = Field(
        default="draft", description="which steps carry gradients"
    )
    last_steps: int = Field(
        default=1, ge=0, description="draft: steps with gradients, counted from the end; 0 is all"
    )
    resamples: int = Field(
        default=0,
        ge=0,
        description="draft with last_steps 1: noised copies of the final picture (LV)",
    )
    hinge: float = Field(
        default=2.0,
        allow_inf_nan=False,
        description="refl: reward above which there is no gradient",
    )
    refl_weight: float = Field(default=1e-3, gt=0, description="refl: factor of the loss")
    frames: Annotated[int, Before(0)] = Field(
        default=0,
        ge=0,
        description="clips: only the first so many frames are decoded and scored; 0 is all",
    )
    kl_weight: float = Field(
        default=0.0,
        ge=0,
        description="of |noise - noise of the reference|^2 over the steps with gradients (DRaFT+)",
    )
    recompute: bool = Field(
        default=False, description="gradient checkpointing per step: memory of one step"
    )

    @model_validator(mode="after")
    def _fits(self) -> RewardBackprop:
        if self.resamples and (self.form != "draft" or self.last_steps != 1):
            raise ValueError(
                f"resamples needs form draft and last_steps 1, got {self.form} and"
                f" {self.last_steps}"
            )
        return self

    @property
    def passes_are_even(self) -> bool:
        return self.form == "draft"  # others draw the step at which a chain is cut

    @property
    def times_noised(self) -> int:
        return self.resamples or 1

    def loss(self, batch: PromptPass, policy: Policy) -> Loss:
        unit = batch.unit

        # the sample, with gradients from the first step that carries them
        condition = policy.encode(batch.unit.prompts, batch.unit.plan)
        first = self._first_with_gradient(batch)
        x, found = self._sample(policy, unit, condition, first)

        # the sample with new noise, several times
        prompts = unit.prompts
        if self.resamples:
            prompts = prompts * self.resamples
            condition = condition.rows(self.resamples)
            x, found = self._noised_again(policy, batch, condition, x)

        # the reward of the sample, or of a clip's first frames, where it is seen
        clean = found[-1].clean if self.form == "refl" else x
        if self.frames:
            clean = policy.family.first_frames(clean, self.frames)
        scores = batch.scorer(policy.show(clean, batch.scorer.spaces), prompts)
        total = scores["total"]
        value = (
            self.refl_weight * torch.relu(self.hinge - total).mean()
            if self.form == "refl"
            else -total.mean()
        )
        means = {f"reward/{t}/mean": s.detach().mean() for t, s in scores.items()}
        means |= {f"reward/{t}/std": s.detach().std(unbiased=False) for t, s in scores.items()}

        # the distance to the reference
        if self.kl_weight:
            distance = _distance(policy, condition, found, unit.plan.guidance)
            value = value + self.kl_weight * distance
            means["kl/noise_mse"] = distance.detach()
        return Loss(value=value, means=means)

    def _first_with_gradient(self, batch: PromptPass) -> int:
        """The first step that carries a gradient: one for all samples of the pass, so those that do
        are a suffix."""
        steps = batch.unit.plan.steps
        rng = generator(*batch.key, "cut")
        if self.form == "alignprop":
            return int(rng.integers(steps))
        if self.form == "refl":
            return int(rng.integers(min(steps - 1, -(-3 * steps // 4)), steps))
        return max(steps - (self.last_steps or steps), 0)

    def _sample(
        self, policy: Policy, unit: Unit, condition: Condition, first: int
    ) -> tuple[torch.Tensor, list[Differentiated]]:
        """The last latent, and the steps from ``first`` on, with gradients (none where the final
        picture is noised again).

        ReFL stops after the one step.
        """
        schedule = schedule_of(policy.path, unit)
        steps = unit.plan.steps

        # gradients pass only through the last steps
        x = unit_noise(unit, 0, policy.latent_shape(unit.plan)).to(policy.device)
        found: list[Differentiated] = []
        for k in range(first + 1 if self.form == "refl" else steps):
            carries = k >= first and not self.resamples
            with torch.set_grad_enabled(carries):
                call = (policy, unit, schedule, k, x, condition)
                if carries and self.recompute:
                    made: Any = checkpoint(advance, *call, use_reentrant=False)
                    step, after = made
                else:
                    step, after = advance(*call)
            if carries:
                found.append(Differentiated(x.detach(), schedule.levels[k], step.clean, step.noise))
            x = after
        return x, found

    def _noised_again(
        self, policy: Policy, batch: PromptPass, condition: Condition, final: torch.Tensor
    ) -> tuple[torch.Tensor, list[Differentiated]]:
        """One-step denoisings (n * B, ...) of the final latent, noised to the last level n
        times."""
        plan = batch.unit.plan
        now, then = policy.path.at(plan).levels(plan.steps)[-2:]
        alpha, sigma = coefficients(policy.path, now, final)
        noises = [
            normal((*batch.key, "resample", n), final.shape).to(final)
            for n in range(self.resamples)
        ]
        x = torch.cat([alpha * final + sigma * noise for noise in noises])
        again = denoised(policy, x, now, then, condition, plan, 0.0)
        return again.gaussian.mean, [Differentiated(x, now, again.clean, again.noise)]


class Differentiated(NamedTuple):
    """A step that carries a gradient: where it was taken, and what the policy saw there."""

    x: torch.Tensor
    level: torch.Tensor
    clean: torch.Tensor
    noise: torch.Tensor


def _distance(
    policy: Policy, condition: Condition, found: list[Differentiated], guidance: float
) -> torch.Tensor:
    """Mean squared difference of the noise predictions to the reference's, over the steps with
    gradients."""
    parts = []
    for step in found:
        with torch.no_grad(), policy.as_reference():
            _, theirs = policy.denoise(step.x, step.level, condition, guidance)
        parts.append(objectives.noise_kl(step.noise, theirs).mean())
    return torch.stack(parts).mean()
