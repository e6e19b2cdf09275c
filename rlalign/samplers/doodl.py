"""DOODL: the starting noise is optimised end to end, for what the finished picture scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from rlalign.diffusion.noise import generator, normal
from rlalign.policies.base import Policy
from rlalign.records import Plan, Unit
from rlalign.samplers.base import Found, Sampler, passes
from rlalign.work import Engine, Rewards, Work
from rlalign.work.chains import ChainGradient, Edict, Pair, Pulled, charge

PRECISIONS = {"float64": torch.float64, "float32": torch.float32}


class Doodl(Sampler):
    """The starting noise is optimised end to end for what the finished picture scores.

    Momentum ascent on x_T through the whole chain: gradient clipped element by element, x_T brought back to its norm.
    ``by: inversion`` runs EDICT's coupled pair and recovers every step's input by inverting it, so memory does not grow with
    the steps; ``by: checkpointing`` takes the plan's own chain without noise (also of a flow model) and keeps one latent
    a step.
    Crops are looked at in place of the picture, enlarged to its size, where ``crops`` is above 0. Of all updates the picture
    with the best reward is kept.

    Source: Wallace 2023, arXiv:2303.13703, algorithm 1.
    """

    needs_gradient: ClassVar[bool] = True
    width: ClassVar[str] = "updates"

    updates: int = Field(default=10, ge=1, description="M, updates of the noise")
    by: Literal["inversion", "checkpointing"] = Field(default="inversion", description="how the gradient comes back")
    rate: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="factor of the gradient before it is clipped"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="heavy ball")
    clip: float = Field(
        default=0.02, ge=0, allow_inf_nan=False, description="largest change of an element an update; 0 is plain"
    )
    perturb: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="noise added to x_T after an update")
    crops: int = Field(default=0, ge=0, description="random crops that are scored; 0 scores the picture")
    precision: Literal["float64", "float32"] = Field(default="float64", description="of inversion")
    p: float = Field(default=0.93, gt=0, le=1, description="EDICT's mixing weight")

    def sample(self, engine: Engine, unit: Unit) -> Found:
        z = engine.begin(unit)
        norm, speed = z.flatten(1).norm(dim=1), None
        tried, rewards = [], []
        for update in range(self.updates + 1):
            pulled = self._pull(engine, unit, z, update)
            tried.append((pulled.total_B, pulled.clean))
            rewards.append(float(np.nanmean(pulled.total_B)))
            if update == self.updates or not self.clip:
                break
            g = (self.rate * pulled.gradient.to(z)).clamp(-self.clip, self.clip)
            speed = g if speed is None else self.momentum * speed + g
            z = z + speed + self._shake(unit, update, z)
            size = z.flatten(1).norm(dim=1).clamp(min=1e-12)
            z = z * (norm / size).reshape(-1, *([1] * (z.ndim - 1)))
        values_UB = np.where(np.isfinite([t[0] for t in tried]), [t[0] for t in tried], -np.inf)
        best_B = values_UB.argmax(axis=0)
        latents = torch.stack([tried[int(u)][1][b] for b, u in enumerate(best_B)])
        return Found(latents=latents, series={"reward": tuple(rewards)})

    def _shake(self, unit: Unit, update: int, z: torch.Tensor) -> torch.Tensor:
        if not self.perturb:
            return torch.zeros_like(z)
        key = unit.key
        rows = [
            normal(("doodl", unit.seed, key.stream, key.round, p, s, update), z.shape[1:])
            for p, s in zip(unit.prompt_ids, unit.sample_ids, strict=True)
        ]
        return self.perturb * torch.stack(rows).to(z)

    def _pull(self, engine: Engine, unit: Unit, z: torch.Tensor, update: int) -> Pulled:
        if self.by == "checkpointing":
            quiet = unit.__class__(**{**vars(unit), "plan": without_noise(unit.plan)})
            found: list[Pulled] = engine.each(quiet, lambda some, cut: ChainGradient(unit=some, noises=z[cut][:, None]))
            gradient = torch.cat([f.gradient for f in found])[:, 0]
        else:
            found = engine.each(
                unit, lambda some, cut: _PullInverted(unit=some, z=z[cut], update=update, settings=self)
            )
            gradient = torch.cat([f.gradient for f in found])
        totals = np.concatenate([f.total_B for f in found])
        return Pulled(totals, gradient, torch.cat([f.clean for f in found]))

    def calls(self, plan: Plan) -> int:
        """Inversion: two chains down, up and down again; checkpointing: one chain twice."""
        chains = 6 if self.by == "inversion" else 2
        return passes(plan) * plan.steps * chains * (self.updates + 1)

    def backward(self, plan: Plan) -> int:
        return passes(plan) * plan.steps * (2 if self.by == "inversion" else 1) * (self.updates + 1)


def without_noise(plan: Plan) -> Plan:
    """The plan with steps that take no noise."""
    return plan.model_copy(update={"eta": 0.0, "rule": "ddim", "window": 0})


@dataclass(frozen=True, kw_only=True)
class _PullInverted(Work):
    """d (mean reward of the pair's two pictures) / d z by inverting EDICT's chain; both copies begin at ``z``."""

    z: torch.Tensor
    update: int
    settings: Doodl

    def do(self, policy: Policy, rewards: Rewards) -> Pulled:
        settings, prompts = self.settings, self.unit.prompts
        chain = Edict(policy, self.unit, p=settings.p, dtype=PRECISIONS[settings.precision])
        z = self.z.to(policy.device, chain.dtype)
        with torch.no_grad():
            end = chain.run(Pair(z, z))
        narrow = torch.float32 if next(policy.network.parameters()).dtype == torch.float32 else chain.dtype
        with torch.enable_grad():
            inputs = [t.detach().to(narrow).requires_grad_() for t in end]
            media = policy.decode(torch.cat(inputs))
            seen = self._crops(media)
            total_M, pull = rewards.gradient(seen.detach(), prompts * (len(seen) // len(prompts)))
            share = 1.0 / (len(seen) // len(prompts))
            pulls = torch.autograd.grad(seen, inputs, share * pull.to(seen))
        start, gradient = chain.pull_back(end, Pair(*(p.to(chain.dtype) for p in pulls)))
        assert start.x.shape == z.shape
        charge(policy, chain)
        total_B = np.asarray(total_M).reshape(-1, len(prompts)).mean(axis=0)
        return Pulled(total_B, (gradient.x + gradient.y).to(self.z.dtype).cpu(), end.x.to(self.z.dtype).cpu())

    def _crops(self, media: torch.Tensor) -> torch.Tensor:
        """The pictures, or random crops of them at their own size, in blocks of the pictures' number."""
        settings, unit = self.settings, self.unit
        if not settings.crops:
            return media
        rng = generator("doodl crops", unit.seed, unit.key.stream, unit.key.round, unit.prompt_ids[0], self.update)
        height, width = media.shape[-2:]
        blocks = []
        for _ in range(settings.crops):
            share = 0.5 + 0.5 * rng.random() ** 0.3
            high, wide = max(1, round(share * height)), max(1, round(share * width))
            top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
            cut = media[..., top : top + high, left : left + wide].flatten(0, 1)
            large = torch.nn.functional.interpolate(cut, size=(height, width), mode="bilinear", align_corners=False)
            blocks.append(large.reshape(media.shape))
        return torch.cat(blocks)
