"""Pipelines with two denoisers, one for high noise and one for low: each step asks one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from rlalign.core.registry import UserError
from rlalign.networks import lora, sharding
from rlalign.policies._family import Part
from rlalign.policies._pipeline import PipelineFamily
from rlalign.policies._pipeline_recipe import PipelineRecipe

HIGH = "transformer"
LOW = "transformer_2"
EXPERTS = {"high": (HIGH,), "low": (LOW,), "both": (HIGH, LOW)}
"""Value of ``trained_experts`` -> parts of the pipeline."""
SHARE = "expert/high_share"
"""Metric: the share of rows learned from that the expert for high noise was asked about."""


class Experts(torch.nn.Module):
    """Two denoisers of one config as one network, under the names of their parts."""

    def __init__(self, high: Any, low: Any) -> None:
        super().__init__()
        self.transformer = high
        self.transformer_2 = low
        self._keep_in_fp32_modules = high._keep_in_fp32_modules

    @property
    def config(self) -> Any:
        return self.transformer.config


class ExpertsFamily(PipelineFamily):
    """A pipeline whose ``boundary_ratio`` says at which timestep the second denoiser takes over; or
    one with a single denoiser, where it says nothing."""

    part: ClassVar[str] = HIGH
    trial_timesteps: ClassVar[tuple[int, ...]] = (1, 999)

    recipe: ExpertsRecipe

    def __init__(self, recipe: ExpertsRecipe, pipeline: Any, device: str) -> None:
        super().__init__(recipe, pipeline, device)
        trained = EXPERTS[recipe.trained_experts]
        if isinstance(self.network, Experts):
            for part, network in self.denoisers.items():
                network.requires_grad_(part in trained)
        elif recipe.trained_experts != "both" or recipe.guidance_low is not None:
            raise UserError(
                "policy.trained_experts must be both and policy.guidance_low null for"
                f" {self.folder!r}, which has one denoiser, got {recipe.trained_experts} and"
                f" {recipe.guidance_low}"
            )

    @classmethod
    def check(cls, pipeline: Any, path: str) -> None:
        super().check(pipeline, path)
        ratio = pipeline.config.get("boundary_ratio")
        second = getattr(pipeline, LOW, None)
        if ratio is None:
            return
        if second is None or not 0.0 < ratio < 1.0:
            raise UserError(
                f"policy.path: cannot read {path!r}: boundary_ratio in model_index.json must be a"
                f" number in (0, 1) beside a {LOW}, or null, got {ratio!r}"
                f"{'' if second else f' and no {LOW}'}"
            )

    @classmethod
    def role_of(cls, part: str) -> Part:
        return "denoiser" if part == LOW else super().role_of(part)

    def denoiser_of(self, pipeline: Any) -> Any:
        high = super().denoiser_of(pipeline)
        if pipeline.config.get("boundary_ratio") is None:
            return high
        return Experts(high, getattr(pipeline, LOW))

    @property
    def denoisers(self) -> Mapping[str, Any]:
        if isinstance(self.network, Experts):
            return {HIGH: self.network.transformer, LOW: self.network.transformer_2}
        return super().denoisers

    def is_high(self, timestep_B: torch.Tensor) -> torch.Tensor:
        """(B,) bool: rows for the first denoiser; the pipeline compares whole timesteps."""
        ratio = self.pipeline.config.boundary_ratio
        return timestep_B.double().floor() >= ratio * self.path.train_steps

    def ask_experts(
        self,
        ask: Callable[..., torch.Tensor],
        timestep_B: torch.Tensor,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        """``ask(network, timestep_B, *tensors)`` of the denoiser of each row; rows of both are
        asked in two passes."""
        if not isinstance(self.network, Experts):
            return ask(self.network, timestep_B, *tensors)
        if timestep_B.is_meta:  # a policy to count with has no numbers
            return self._tied(ask(self.network.transformer, timestep_B, *tensors))

        # learners that share the denoisers ask those that any of them asks, in one order
        high_B = self.is_high(timestep_B)
        asked = [bool(high_B.any()), not bool(high_B.all())]
        if not self.in_turn and sharding.processes() > 1 and sharding.is_spread(self.network):
            asked = sharding.asked_anywhere(asked)

        # each row goes back to its place; of a denoiser that has none here one is asked
        answers: list[torch.Tensor] = []
        indices: list[torch.Tensor] = []
        others: list[torch.Tensor] = []
        experts = zip(self.denoisers.values(), (high_B, ~high_B), asked, strict=True)
        for network, rows_B, is_asked in experts:
            if not is_asked:
                continue
            index = rows_B.nonzero()[:, 0]
            told = (timestep_B, *tensors)
            if len(index) < len(rows_B):
                rows = index if len(index) else slice(1)
                told = tuple(None if tensor is None else tensor[rows] for tensor in told)
            answer = ask(network, *told)
            if len(index):
                answers.append(answer)
                indices.append(index)
            else:
                others.append(answer)
        found = answers[0]
        if len(answers) > 1:
            found = torch.cat(answers)[torch.cat(indices).argsort()]
        for other in others:
            found = sharding.beside(found, other)
        return self._tied(found)

    def _tied(self, answer: torch.Tensor) -> torch.Tensor:
        """The answer; where the denoiser that gave it is frozen, with a gradient of 0 to the other,
        so that a loss of it alone can be asked for its gradient."""
        if not torch.is_grad_enabled() or answer.requires_grad:
            return answer
        first = next((p for p in self.network.parameters() if p.requires_grad), None)
        return answer if first is None else answer + 0.0 * first.sum().to(answer.dtype)

    def guidance_at(self, timestep_B: torch.Tensor, guidance: float) -> Any:
        low = self.recipe.guidance_low
        if low is None:
            return guidance
        numbers = torch.tensor([low, guidance], device=timestep_B.device, dtype=torch.float32)
        dimensions = 4 if self.draws_clips else 3
        return numbers[self.is_high(timestep_B).long()].reshape(-1, *[1] * dimensions)

    def measure(self, timestep_B: torch.Tensor) -> Mapping[str, torch.Tensor]:
        if not isinstance(self.network, Experts) or timestep_B.is_meta:
            return {}
        return {SHARE: self.is_high(timestep_B).float()}

    # --- the networks -----------------------------------------------------------------------------

    def _trained_parts(self) -> Mapping[str, Any]:
        """Of the denoisers, those that are trained."""
        trained = EXPERTS[self.recipe.trained_experts]
        return {part: network for part, network in self.denoisers.items() if part in trained}

    def attach(self, *, rank: int, alpha: float) -> None:
        self.network.requires_grad_(False)
        for number, network in enumerate(self._trained_parts().values()):
            lora.attach(network, rank=rank, alpha=alpha, targets=self.lora_targets, seed=number)

    def attach_saved(self, name: str, *, rank: int, alpha: float) -> None:
        self.network.requires_grad_(False)
        parts = self._trained_parts()
        if len(parts) > 1 and name.endswith(".safetensors"):
            raise UserError(
                f"policy.adapter must be a folder with {' and '.join(map(lora.name_file, parts))}"
                f" where both experts are trained, got {name!r}; name a folder, or set"
                " policy.trained_experts"
            )
        for part in parts:
            lora.attach_saved(self.pipeline, part, name, rank=rank, alpha=alpha)


class ExpertsRecipe(PipelineRecipe):
    """Settings of a pipeline that may have two denoisers."""

    beside_words: ClassVar[tuple[str, ...]] = ("trained_experts", "guidance_low")

    trained_experts: Literal["both", "high", "low"] = Field(
        default="both",
        description="of two denoisers, the ones that are trained: for high noise, low noise, both",
    )
    guidance_low: float | None = Field(
        default=None,
        ge=0.0,
        description=(
            "guidance of the denoiser for low noise, as a call's guidance_scale_2; null is"
            " plan.guidance. Without plan.guidance above 1 there is none at all"
        ),
    )

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {HIGH: self.denoiser_dtype, LOW: self.denoiser_dtype}
