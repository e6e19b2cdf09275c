"""DOODL: the starting noise is optimised end to end, for what the finished picture scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from rlalign.core.records import Plan, Space, Unit
from rlalign.diffusion.noise import generator, noise_for
from rlalign.engine import Engine, Rewards, Work
from rlalign.engine.chains import ChainGradient, Edict, Pair, Pulled
from rlalign.policies.base import Policy
from rlalign.samplers.base import NonNegative, Result, Sampler, best_updates, per_row

PRECISIONS = {"float64": torch.float64, "float32": torch.float32}


class Doodl(Sampler):
    """The starting noise is optimised end to end for what the finished picture scores.

    Momentum ascent on x_T through the whole chain: gradient clipped element by element, x_T brought
    back to its norm. ``by: inversion`` runs EDICT's coupled pair and recovers every step's input by
    inverting it, so memory does not grow with the steps; ``by: checkpointing`` takes the plan's own
    chain without noise (also of a flow model) and keeps one latent a step. Crops are looked at in
    place of the picture, enlarged to its size, where ``crops`` is above 0. Of all updates the
    picture with the best reward is kept.

    Source: Wallace 2023, arXiv:2303.13703, algorithm 1.
    """

    needs_gradient: ClassVar[bool] = True
    width: ClassVar[str] = "updates"

    updates: int = Field(default=10, ge=1, description="M, updates of the noise")
    by: Literal["inversion", "checkpointing"] = Field(
        default="inversion", description="how the gradient comes back"
    )
    rate: NonNegative = Field(
        default=1.0, description="factor of the gradient before it is clipped"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="heavy ball")
    clip: NonNegative = Field(
        default=0.02, description="largest change of an element an update; 0 is plain"
    )
    perturb: NonNegative = Field(default=0.0, description="noise added to x_T after an update")
    crops: int = Field(
        default=0, ge=0, description="random crops that are scored; 0 scores the picture"
    )
    precision: Literal["float64", "float32"] = Field(default="float64", description="of inversion")
    p: float = Field(default=0.93, gt=0, le=1, description="EDICT's mixing weight")

    def sample(self, engine: Engine, unit: Unit) -> Result:
        z = engine.begin(unit)
        norm = z.flatten(1).norm(dim=1)
        speed = None
        tried = []
        rewards = []
        # ascend from the plain noise, and keep every picture on the way
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
            z = z * per_row(norm / size, z)
        return Result(latents=best_updates(tried), series={"reward": tuple(rewards)})

    def _shake(self, unit: Unit, update: int, z: torch.Tensor) -> torch.Tensor:
        if not self.perturb:
            return torch.zeros_like(z)
        return self.perturb * noise_for(unit, "doodl", (update,), z.shape[1:]).to(z)

    def _pull(self, engine: Engine, unit: Unit, z: torch.Tensor, update: int) -> Pulled:
        if self.by == "checkpointing":
            quiet = without_noise(unit)
            found: list[Pulled] = engine.each(
                quiet, lambda some, cut: ChainGradient(unit=some, noises=z[cut][:, None])
            )
            gradient = torch.cat([f.gradient for f in found])[:, 0]
        else:
            found = engine.each(
                unit,
                lambda some, cut: _PullInverted(unit=some, z=z[cut], update=update, settings=self),
            )
            gradient = torch.cat([f.gradient for f in found])
        totals = np.concatenate([f.total_B for f in found])
        return Pulled(totals, gradient, torch.cat([f.clean for f in found]))

    def looks(self, plan: Plan) -> int:
        """Inversion: two chains down, up and down again; checkpointing: one chain twice."""
        chains = 6 if self.by == "inversion" else 2
        return plan.steps * chains * (self.updates + 1)

    def looks_back(self, plan: Plan) -> int:
        return plan.steps * (2 if self.by == "inversion" else 1) * (self.updates + 1)


def without_noise(unit: Unit) -> Unit:
    """The unit under a plan whose steps take no noise."""
    return unit.with_plan(eta=0.0, rule="ddim", window=0)


@dataclass(frozen=True, kw_only=True)
class _PullInverted(Work):
    """d (mean reward of the pair's two pictures) / d z by inverting EDICT's chain; both copies
    begin at ``z``."""

    z: torch.Tensor
    update: int
    settings: Doodl

    def do(self, policy: Policy, rewards: Rewards) -> Pulled:
        settings = self.settings
        prompts = self.unit.prompts
        chain = Edict(policy, self.unit, p=settings.p, dtype=PRECISIONS[settings.precision])
        z = self.z.to(policy.device, chain.dtype)
        # down the chain without a graph
        with torch.no_grad():
            end = chain.run(Pair(z, z))
        own = next(policy.network.parameters()).dtype
        narrow = torch.float32 if own == torch.float32 else chain.dtype
        # the gradient at its end, a mean over the pair and over crops
        with torch.enable_grad():
            inputs = [t.detach().to(narrow).requires_grad_() for t in end]
            samples = policy.show(torch.cat(inputs), rewards.spaces())
            cut: dict[Space, torch.Tensor] = {s: self._crops(s, v) for s, v in samples.items()}
            blocks = 2 * max(1, settings.crops)
            seen: dict[Space, torch.Tensor] = {s: v.detach() for s, v in cut.items()}
            total_M, pull = rewards.gradient(seen, prompts * blocks)
            share = 1.0 / blocks
            shared = [share * pull[s].to(v) for s, v in cut.items()]
            pulls = torch.autograd.grad(list(cut.values()), inputs, shared)
        # and back up to the noise
        start, gradient = chain.pull_back(end, Pair(*(p.to(chain.dtype) for p in pulls)))
        assert start.x.shape == z.shape
        total_B = np.asarray(total_M).reshape(-1, len(prompts)).mean(axis=0)
        return Pulled(
            total_B, (gradient.x + gradient.y).to(self.z.dtype).cpu(), end.x.to(self.z.dtype).cpu()
        )

    def _crops(self, space: Space, media: torch.Tensor) -> torch.Tensor:
        """The pictures, or random crops of them at their own size, in blocks of the pictures'
        number; latents are as often there, and whole."""
        settings = self.settings
        unit = self.unit
        if not settings.crops:
            return media
        if space == "latent":
            return torch.cat([media] * settings.crops)
        place = (unit.key.stream, unit.key.round, unit.prompt_ids[0], self.update)
        rng = generator("doodl crops", unit.seed, *place)
        # each crop as large as the picture
        height, width = media.shape[-2:]
        blocks = []
        for _ in range(settings.crops):
            share = 0.5 + 0.5 * rng.random() ** 0.3
            high = max(1, round(share * height))
            wide = max(1, round(share * width))
            top = int(rng.integers(height - high + 1))
            left = int(rng.integers(width - wide + 1))
            cut = media[..., top : top + high, left : left + wide].flatten(0, 1)
            large = torch.nn.functional.interpolate(
                cut, size=(height, width), mode="bilinear", align_corners=False
            )
            blocks.append(large.reshape(media.shape))
        return torch.cat(blocks)
