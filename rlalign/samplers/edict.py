"""EDICT: exact inversion of the diffusion chain; pictures are edited by inverting them and sampling
under another caption."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from rlalign.core.locations import NamesFile
from rlalign.core.media import UnreadablePicture, as_floats, read_picture
from rlalign.core.records import Plan, Unit, with_prompts
from rlalign.core.registry import UserError
from rlalign.engine import Engine, Rewards, Work
from rlalign.engine.chains import Edict as Coupled
from rlalign.engine.chains import Pair
from rlalign.policies.base import Policy
from rlalign.samplers.base import Result, Sampler

PRECISIONS = {"float64": torch.float64, "float32": torch.float32}


class Edict(Sampler):
    """Two coupled chains that run backwards exactly: to edit pictures by inverting them.

    From noise, or from ``source`` pictures noised by inverting ``strength`` of the steps under
    ``source_prompt`` and denoised under each prompt. The picture is the first of the pair.

    Source: Wallace 2022, arXiv:2211.12446.
    """

    p: float = Field(default=0.93, gt=0, le=1, description="mixing weight; 1 couples only")
    precision: Literal["float64", "float32"] = Field(
        default="float64", description="of the chain and the denoiser"
    )
    alternate: bool = Field(
        default=True, description="whether the pair changes roles every other step"
    )
    source: Annotated[tuple[Path, ...], NamesFile()] = Field(
        default=(), description="pictures to edit, one a prompt (or one for all)"
    )
    source_prompt: tuple[str, ...] = Field(
        default=(), description="what the source pictures show, one each"
    )
    strength: float = Field(
        default=0.8, gt=0, le=1, description="share of the steps that an edit goes back"
    )

    @field_validator("precision", mode="before")
    @classmethod
    def _precise(cls, value: object) -> object:
        if value in ("float16", "bfloat16", "fp16", "bf16"):
            raise UserError(
                f"precision must be float64 or float32, got {value!r}: inversion multiplies"
                " rounding errors by up to p^(-2 * steps), about 1,400 for p 0.93 and 50 steps"
            )
        return value

    @model_validator(mode="after")
    def _described(self) -> Edict:
        if len(self.source) != len(self.source_prompt):
            raise UserError(
                f"source_prompt must say what each of the {len(self.source)} source pictures shows,"
                f" got {len(self.source_prompt)}"
            )
        return self

    def check(self, unit: Unit) -> None:
        if not self.source:
            return
        if len(self.source) not in (1, len(unit.prompts)):
            raise UserError(
                "sampler.source must name 1 picture or as many as there are pictures to make"
                f" ({len(unit.prompts)}), got {len(self.source)}"
            )
        read_pictures(self.source, unit)

    def sample(self, engine: Engine, unit: Unit) -> Result:
        steps = unit.plan.steps
        if not self.source:
            z = engine.begin(unit)
            return Result(latents=self._run(engine, unit, z, z, 0))
        self.check(unit)
        first = steps - max(1, round(self.strength * steps))
        media_BCHW = read_pictures(self.source, unit)
        told = with_prompts(unit, _for_all(self.source_prompt, unit))
        found: list[Pair] = engine.each(
            told,
            lambda some, cut: _Invert(
                unit=some, media_BCHW=media_BCHW[cut], stop=first, settings=self
            ),
        )
        x = torch.cat([f.x for f in found])
        y = torch.cat([f.y for f in found])
        return Result(latents=self._run(engine, unit, x, y, first))

    def _run(
        self, engine: Engine, unit: Unit, x: torch.Tensor, y: torch.Tensor, start: int
    ) -> torch.Tensor:
        found: list[torch.Tensor] = engine.each(
            unit, lambda some, cut: _Run(unit=some, x=x[cut], y=y[cut], start=start, settings=self)
        )
        return torch.cat(found)

    def coupled(self, policy: Policy, unit: Unit) -> Coupled:
        """The chain on a policy."""
        return Coupled(
            policy, unit, p=self.p, dtype=PRECISIONS[self.precision], alternate=self.alternate
        )

    def looks(self, plan: Plan) -> int:
        back = max(1, round(self.strength * plan.steps))
        return 4 * back if self.source else 2 * plan.steps

    def needs_whole(self, plan: Plan) -> bool:
        return True


def _for_all(values: tuple[str, ...], unit: Unit) -> tuple[str, ...]:
    return values if len(values) == len(unit.prompts) else values * len(unit.prompts)


def read_pictures(paths: tuple[Path, ...], unit: Unit) -> torch.Tensor:
    """(B, 3, H, W) float32 in [0, 1]; UserError with the path of a picture that cannot be read."""
    pictures = []
    for path in paths:
        try:
            pictures.append(np.asarray(read_picture(path)))
        except UnreadablePicture as error:
            raise UserError(
                f"sampler.source: cannot read {str(path)!r} as a picture ({error}); is the path"
                " right?"
            ) from error
    if len({p.shape for p in pictures}) > 1:
        raise UserError(
            "sampler.source: pictures must be of one size, got"
            f" {sorted({p.shape[:2] for p in pictures})}"
        )
    media_NCHW = as_floats(np.stack(pictures)).permute(0, 3, 1, 2)
    return media_NCHW.expand(len(unit.prompts), -1, -1, -1)


@dataclass(frozen=True, kw_only=True)
class _Run(Work):
    x: torch.Tensor
    y: torch.Tensor
    start: int
    settings: Edict

    @torch.no_grad()
    def do(self, policy: Policy, rewards: Rewards) -> torch.Tensor:
        chain = self.settings.coupled(policy, self.unit)
        pair = Pair(*(t.to(policy.device, chain.dtype) for t in (self.x, self.y)))
        end = chain.run(pair, self.start)
        return end.x.to(next(policy.network.parameters()).dtype).cpu()


@dataclass(frozen=True, kw_only=True)
class _Invert(Work):
    media_BCHW: torch.Tensor
    stop: int
    settings: Edict

    @torch.no_grad()
    def do(self, policy: Policy, rewards: Rewards) -> Pair:
        chain = self.settings.coupled(policy, self.unit)
        latents = policy.encode_media(self.media_BCHW[:, None].to(policy.device)).to(chain.dtype)
        pair = chain.invert(Pair(latents, latents), self.stop)
        return Pair(pair.x.cpu(), pair.y.cpu())
