"""Classifier guidance: every step leans towards what a classifier, or a reward, says of the
caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from rlalign.core.finite import refuse
from rlalign.core.locations import NamesFile
from rlalign.core.records import Plan, Unit
from rlalign.diffusion.paths import coefficients
from rlalign.diffusion.rollout import schedule_of
from rlalign.diffusion.steps import Gaussian, noise_of, step
from rlalign.engine import Engine, Rewards, View, Work, join_views, reward_gradient, see
from rlalign.networks.noisy_classifier import load_classifier
from rlalign.policies.base import Policy
from rlalign.samplers.base import NonNegative, Result, Sampler


class ClassifierGuidance(Sampler):
    """Every step leans towards what a noise-aware classifier, or a reward, says of the caption.

    g = scale * gradient of log p(caption | x_t) at the noisy latent moves the mean by variance * g
    ("mean", steps with noise), or the noise seen by -sigma * g ("score", any step).

    ``of: reward`` takes the reward of the clean sample seen, through the denoiser, in place of a
    noise-aware classifier: the one-step form of clip-guided sampling, biased because the reward of
    a mean is not the mean reward.

    Source: Dhariwal & Nichol 2021, arXiv:2105.05233, algorithms 1 and 2.
    """

    form: Literal["mean", "score"] = Field(default="score", description="what the gradient moves")
    of: Literal["classifier", "reward"] = Field(
        default="classifier", description="whose gradient it is"
    )
    scale: NonNegative = Field(default=1.0, description="s, factor of the gradient; 0 is plain")
    classifier: Annotated[str, NamesFile(never=".*:.*")] = Field(
        default="",
        description=(
            "folder of a noise-aware classifier, or package.module:function; empty is the"
            " shipped one"
        ),
    )

    @property
    def follows_reward(self) -> bool:
        return self.of == "reward"

    def sample(self, engine: Engine, unit: Unit) -> Result:
        x = engine.begin(unit)
        for k in range(unit.plan.steps):
            found: list[View] = engine.each(
                unit,
                lambda some, cut, x=x, k=k: _GuidedStep(unit=some, x=x[cut], k=k, settings=self),
            )
            x = join_views(found).next(unit, k)
        return Result(latents=x)

    def looks(self, plan: Plan) -> int:
        return plan.steps

    def looks_back(self, plan: Plan) -> int:
        return self.looks(plan) if self.of == "reward" else 0


@dataclass(frozen=True, kw_only=True)
class _GuidedStep(Work):
    """The guided Gaussian of the next latent."""

    x: torch.Tensor
    k: int
    settings: ClassifierGuidance

    def do(self, policy: Policy, rewards: Rewards) -> View:
        settings = self.settings
        schedule = schedule_of(policy.path, self.unit)
        x = self.x.to(policy.device)
        # what is seen, and the gradient of what is wanted
        if settings.of == "reward":
            with torch.enable_grad():
                wanted = x.detach().requires_grad_()
                found = see(policy, self.unit, schedule, self.k, wanted)
                _, gradient = reward_gradient(
                    policy, rewards, found.clean, self.unit.prompts, wanted
                )
        else:
            with torch.no_grad():
                found = see(policy, self.unit, schedule, self.k, x)
            gradient = _classifier_gradient(
                policy, rewards, self.unit, schedule.levels[self.k], x, settings.classifier
            )
        # the step leans that way
        if settings.scale:
            with torch.no_grad():
                gaussian = self._moved(policy, found, x, settings.scale * gradient)
            found = found._replace(gaussian=gaussian)
        return found.to_cpu()

    def _moved(self, policy: Policy, found: View, x: torch.Tensor, g: torch.Tensor) -> Gaussian:
        schedule = schedule_of(policy.path, self.unit)
        k = self.k
        if self.settings.form == "mean":
            return Gaussian(
                mean=found.gaussian.mean + found.gaussian.std**2 * g, std=found.gaussian.std
            )
        alpha, sigma = coefficients(policy.path, schedule.levels[k], x)
        noise = found.noise - sigma * g
        # on the flow path alpha is 0 in pure noise
        clean = found.clean + sigma**2 * g / alpha.clamp(min=1e-3)
        now = schedule.levels[k]
        then = schedule.levels[k + 1]
        how = {**noise_of(self.unit.plan), "eta": schedule.eta_K[k]}
        return step(x, clean, noise, policy.path, now, then, **how)


def _classifier_gradient(
    policy: Policy,
    rewards: Rewards,
    unit: Unit,
    level: torch.Tensor,
    x: torch.Tensor,
    classifier: str,
) -> torch.Tensor:
    judge = load_classifier(classifier, policy.device)
    with torch.enable_grad():
        wanted = x.detach().requires_grad_()
        alpha, sigma = coefficients(policy.path, level, wanted)
        value = judge(wanted, alpha, sigma, unit.prompts).sum()
        (gradient,) = torch.autograd.grad(value, wanted)
    refuse(gradient, "the gradient of sampler.classifier", "take another classifier")
    rewards.gradients += len(unit.prompts)
    return gradient
