"""Classifier guidance: every step leans towards what a classifier, or a reward, says of the caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from rlalign.diffusion.paths import coefficients
from rlalign.diffusion.rollout import schedule_of
from rlalign.diffusion.steps import Gaussian, step
from rlalign.noisy_classifier import load_classifier
from rlalign.policies.base import Policy
from rlalign.records import Plan, Unit
from rlalign.samplers.base import Found, Sampler, passes
from rlalign.work import Engine, Rewards, Seen, Work, reward_gradient, see


class ClassifierGuidance(Sampler):
    """Every step leans towards what a noise-aware classifier, or a reward, says of the caption.

    g = scale * gradient of log p(caption | x_t) at the noisy latent moves the mean by variance * g ("mean", steps with noise),
    or the noise seen by -sigma * g ("score", any step).

    ``of: reward`` takes the reward of the clean sample seen, through the denoiser, in place of a noise-aware classifier: the
    one-step form of clip-guided sampling, biased because the reward of a mean is not the mean reward.

    Source: Dhariwal & Nichol 2021, arXiv:2105.05233, algorithms 1 and 2.
    """

    form: Literal["mean", "score"] = Field(default="score", description="what the gradient moves")
    of: Literal["classifier", "reward"] = Field(default="classifier", description="whose gradient it is")
    scale: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="s, factor of the gradient; 0 is plain")
    classifier: str = Field(
        default="",
        description="folder of a noise-aware classifier, or package.module:function; empty is the shipped one",
    )

    @property
    def follows_reward(self) -> bool:
        return self.of == "reward"

    def sample(self, engine: Engine, unit: Unit) -> Found:
        x = engine.begin(unit)
        for k in range(unit.plan.steps):
            found: list[Seen] = engine.each(
                unit, lambda some, cut, x=x, k=k: _Guided(unit=some, x=x[cut], k=k, settings=self)
            )
            gaussian = Gaussian(mean=torch.cat([f.gaussian.mean for f in found]), std=found[0].gaussian.std)
            x = Seen(gaussian, torch.cat([f.clean for f in found]), found[0].noise).next(unit, k)
        return Found(latents=x)

    def calls(self, plan: Plan) -> int:
        return passes(plan) * plan.steps

    def backward(self, plan: Plan) -> int:
        return self.calls(plan) if self.of == "reward" else 0


@dataclass(frozen=True, kw_only=True)
class _Guided(Work):
    """The guided Gaussian of the next latent."""

    x: torch.Tensor
    k: int
    settings: ClassifierGuidance

    def do(self, policy: Policy, rewards: Rewards) -> Seen:
        settings, schedule = self.settings, schedule_of(policy.path, self.unit)
        x = self.x.to(policy.device)
        if settings.of == "reward":
            with torch.enable_grad():
                wanted = x.detach().requires_grad_()
                found = see(policy, self.unit, schedule, self.k, wanted)
                _, gradient = reward_gradient(policy, rewards, found.clean, self.unit.prompts, wanted)
        else:
            with torch.no_grad():
                found = see(policy, self.unit, schedule, self.k, x)
            gradient = _classifier_gradient(policy, rewards, self.unit, schedule.levels[self.k], x, settings.classifier)
        with torch.no_grad():
            gaussian = self._moved(policy, found, x, settings.scale * gradient) if settings.scale else found.gaussian
        gaussian = Gaussian(mean=gaussian.mean.detach().cpu(), std=gaussian.std.detach().cpu())
        return Seen(gaussian, found.clean.detach().cpu(), found.noise.detach().cpu())

    def _moved(self, policy: Policy, found: Seen, x: torch.Tensor, g: torch.Tensor) -> Gaussian:
        schedule, plan, k = schedule_of(policy.path, self.unit), self.unit.plan, self.k
        if self.settings.form == "mean":
            return Gaussian(mean=found.gaussian.mean + found.gaussian.std**2 * g, std=found.gaussian.std)
        alpha, sigma = coefficients(policy.path, schedule.levels[k], x)
        noise = found.noise - sigma * g
        clean = found.clean + sigma**2 * g / alpha.clamp(min=1e-3)  # on the flow path alpha is 0 in pure noise
        levels = schedule.levels
        return step(x, clean, noise, policy.path, levels[k], levels[k + 1], rule=plan.rule, eta=schedule.eta_K[k])


def _classifier_gradient(
    policy: Policy, rewards: Rewards, unit: Unit, level: torch.Tensor, x: torch.Tensor, classifier: str
) -> torch.Tensor:
    judge = load_classifier(classifier, policy.device)
    with torch.enable_grad():
        wanted = x.detach().requires_grad_()
        alpha, sigma = coefficients(policy.path, level, wanted)
        value = judge(wanted, alpha, sigma, unit.prompts).sum()
        (gradient,) = torch.autograd.grad(value, wanted)
    rewards.gradients += len(unit.prompts)
    return gradient
