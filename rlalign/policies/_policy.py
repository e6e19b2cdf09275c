"""A live policy: one class around every family, with what changes while it computes and learns."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch

from rlalign.core.finite import all_finite, refuse_answer, watched_place
from rlalign.core.records import Plan, Space
from rlalign.core.turns import take_turn
from rlalign.diffusion.condition import Condition, Words
from rlalign.diffusion.paths import NoisePath, coefficients
from rlalign.diffusion.predictions import PredictionType, target, to_clean_and_noise
from rlalign.networks import compilation, lora, sharding
from rlalign.networks.precision import Precision, autocast
from rlalign.networks.replicas import replicate
from rlalign.networks.shares import are_shares, assign
from rlalign.policies._family import OWN_SIZE, Family
from rlalign.policies._meter import Meter
from rlalign.policies._sample import sample


class Policy:
    """A family on one device, in a precision, under trainable weights. One thread uses it at a
    time; others have replicas."""

    def __init__(
        self,
        family: Family,
        *,
        precision: Precision = "float32",
        reference: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """``reference`` are the weights that training begins with. Where none are given they are
        the family's own, and empty for a LoRA, which is then a new one."""
        self.family = family
        self.precision: Precision = precision
        """In which the network computes; ``denoise`` and ``error`` see to it."""
        self.meter = Meter()
        self.interpolation = 1.0
        """w in pretrained + w * (own - pretrained), of what ``denoise`` says; 1 is the policy
        itself."""
        self.snapshots: Mapping[str, Mapping[str, torch.Tensor]] = MappingProxyType({})
        """Name -> earlier trainable weights that a learner keeps ("behaviour", "reference"), for
        ``as_snapshot``."""
        if reference is None:
            reference = {} if lora.is_attached(family.network) else self.weights()
        self.reference = reference
        """The trainable weights that training began with; empty for a new LoRA, whose reference is
        the adapter switched off."""
        self._copies: dict[torch.dtype, Policy] = {}

    # --- what its family says --------------------------------------------------------------------

    @property
    def device(self) -> str:
        return self.family.device

    @property
    def network(self) -> torch.nn.Module:
        """The denoiser: what is trained."""
        return self.family.network

    @cached_property
    def is_spread(self) -> bool:
        """Whether other processes hold parts of the denoiser; all must ask it equally often."""
        return sharding.is_spread(self.network)

    @cached_property
    def is_trained_spread(self) -> bool:
        """Whether other processes hold, and train, the other rows of the trained weights."""
        return are_shares(self.trainable().values())

    @cached_property
    def is_compiled(self) -> bool:
        """Whether the denoiser's blocks are compiled."""
        return compilation.is_compiled(self.network)

    @property
    def path(self) -> NoisePath:
        return self.family.path

    @property
    def prediction(self) -> PredictionType:
        return self.family.prediction

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        """The condition of each prompt under a plan."""
        return self.family.encode(prompts, plan)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Clean latents (B, *latent) -> media (B, F, 3, H, W) float32 in [0, 1]."""
        take_turn()
        return self.family.decode(latents)

    def show(self, clean: torch.Tensor, spaces: Iterable[Space]) -> dict[Space, torch.Tensor]:
        """Clean latents (B, *latent) where rewards see them: as they are, and decoded."""
        return {s: self.decode(clean) if s == "media" else clean for s in sorted(spaces)}

    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        """Media in [0, 1] -> clean latents."""
        take_turn()
        return self.family.encode_media(media_BFCHW)

    def posterior(self, media_BFCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and standard deviation of the encoder's posterior over clean latents; None in place
        of the latter where the encoder has none."""
        take_turn()
        return self.family.posterior(media_BFCHW)

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        """Shape of one sample's latent. Raises UserError for a plan that the family cannot
        follow."""
        return self.family.latent_shape(plan)

    def drawn_size(self, plan: Plan) -> tuple[int, int]:
        """(height, width) in pixels of what is drawn under a plan."""
        return self.family.drawn_size(plan)

    def as_latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """Clean latents (B, *latent) of what may be latents already, or media (B, F, 3, H, W)
        uint8."""
        if pictures.dtype != torch.uint8:
            return pictures
        return self.encode_media(pictures.float() / 255.0)

    # --- denoising -------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[str],
        *,
        steps: int,
        guidance: float = 1.0,
        eta: float = 0.0,
        seed: int = 0,
        latents: torch.Tensor | np.ndarray | None = None,
        height: int = 0,
        width: int = 0,
        frames: int = 1,
        output: Literal["media", "latents"] = "media",
    ) -> torch.Tensor:
        """One picture a prompt: media (B, F, 3, H, W) uint8 on the CPU, or final latents (B,
        *latent) float32.

        With ``eta`` 0 it is the pipeline's own deterministic sampler (DDIM; Euler on a flow). The
        chain begins at ``latents`` (B, *latent), or at noise that depends on the seed, the prompt
        and its place in the list alone. Raises UserError for a plan that the policy cannot follow.
        """
        settings = {"steps": steps, "guidance": guidance, "eta": eta}
        settings |= {"height": height, "width": width, "frames": frames}
        return sample(self, prompts, settings, seed=seed, latents=latents, output=output)

    def denoise(
        self, x: torch.Tensor, level: torch.Tensor, condition: Condition, guidance: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(clean, noise) that the policy sees in ``x``; level is a scalar or (B,).

        With ``interpolation`` other than 1 the pretrained model is asked too (reinforcement
        learning guidance, arXiv:2508.21016). Guidance is the family's ``look``; the gradient flows
        through all that it asks.
        """
        own = self._denoise(x, level, condition, guidance)
        if self.interpolation == 1.0:
            return own
        with self.as_reference(pretrained=True):
            base = self._denoise(x, level, condition, guidance)
        clean, noise = (b + self.interpolation * (o - b) for o, b in zip(own, base, strict=True))
        return clean, noise

    def _denoise(
        self, x: torch.Tensor, level: torch.Tensor, condition: Condition, guidance: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        timestep_B = self.path.timestep(level).to(x.device).expand(len(x))
        prediction = self.family.look(self.answer, x, timestep_B, condition, guidance)
        alpha, sigma = coefficients(self.path, level, x)
        return to_clean_and_noise(prediction, x, alpha, sigma, self.prediction)

    def answer(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        """The family's ``predict`` in the policy's precision; what came out in bfloat16 is given
        back in the latent's. Counts what was asked."""
        take_turn()
        if self.is_compiled:
            compilation.allow_shapes()
        self.meter.calls += len(x)
        self.meter.backward_calls += len(x) if x.requires_grad else 0
        if torch.is_grad_enabled():
            for name, value_B in self.family.measure(timestep_B).items():
                self.meter.learned.setdefault(name, []).append(value_B)
        # of weights that are gathered block by block no copies may stay
        keeps = not self.is_trained_spread
        rounds = autocast(self.device, self.precision, keeps_rounded=keeps)
        with rounds, compilation.explained():
            output = self.family.predict(x, timestep_B, words)
        if watched_place() and not all_finite(output):
            refuse_answer(self, x, timestep_B, words)
        return output.to(x.dtype) if output.dtype == torch.bfloat16 else output

    @torch.no_grad()
    def warm_up(self, plan: Plan, rows: int) -> None:
        """Has the code made that a compiled denoiser answers ``rows`` samples of a plan with; does
        nothing for another one. Nothing of it is counted."""
        if not self.is_compiled:
            return
        shape = self.latent_shape(plan)
        levels = self.path.at(plan).levels(plan.steps)
        twin = self.beside()
        condition = twin.encode([self.family.trial_prompt] * rows, plan)
        x = torch.zeros(rows, *shape, device=self.device)
        for level in (levels[0], levels[-2]):
            twin.denoise(x, level, condition, plan.guidance)

    def error(
        self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """(B,) squared error of the network's raw output at x = alpha * clean + sigma * noise,
        averaged over elements.

        In the network's own prediction type: |noise - prediction|^2 for epsilon (Ho 2020),
        |velocity - prediction|^2 for flow.
        """
        alpha, sigma = coefficients(self.path, level, clean)
        timestep_B = self.path.timestep(level).to(clean.device).expand(len(clean))
        output = self.answer(alpha * clean + sigma * noise, timestep_B, condition.caption)
        return (
            ((output - target(clean, noise, alpha, sigma, self.prediction)) ** 2).flatten(1).mean(1)
        )

    # --- weights ---------------------------------------------------------------------------------

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Name -> parameter of what is trained, in a fixed order."""
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the trainable weights: what a rollout worker needs to become this version."""
        return {n: p.detach().clone().contiguous() for n, p in self.trainable().items()}

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Takes over trainable weights; names and shapes must match. A policy whose weights are
        spread takes whole ones too."""
        self._write(weights)
        self._copies.clear()

    @torch.no_grad()
    def set_rows(self, rows: Iterable[tuple[str, torch.Tensor, int]]) -> None:
        """Takes over trainable weights in parts, as they come: (name, rows, number of the first of
        them); a tensor of no dimensions is one row. Every row must come once."""
        own = self.trainable()
        missing = {name: len(p) if p.ndim else 1 for name, p in own.items()}
        self._copies.clear()
        for name, part, first in rows:
            whole = own[name].detach()
            target = whole[first : first + len(part)] if part.ndim else whole
            target.copy_(part)
            missing[name] -= len(part) if part.ndim else 1
        assert not any(missing.values()), (
            f"rows are missing, or came twice, of {[n for n in missing if missing[n]]}"
        )

    @contextlib.contextmanager
    def as_reference(self, *, pretrained: bool = False) -> Iterator[None]:
        """Inside, the policy is the one that training began with: the adapter off (a new LoRA), or
        kept weights swapped in.

        Where a learner refreshes the reference, it is the weights of the last refresh, unless
        ``pretrained`` is asked for.
        """
        if "reference" in self.snapshots and not pretrained:
            inside = self.holding(self.snapshots["reference"])
        elif lora.is_attached(self.network) and not self.reference:
            inside = lora.disabled(self.network)
        else:
            inside = self.holding(self.reference)
        with inside:
            yield

    @contextlib.contextmanager
    def as_snapshot(self, kind: str) -> Iterator[None]:
        """Inside, the policy has the trainable weights of one of its snapshots."""
        with self.holding(self.snapshots[kind]):
            yield

    @contextlib.contextmanager
    def holding(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, the policy has these trainable weights instead of its own."""
        if self.is_trained_spread:
            with self._overwritten(weights):
                yield
            return

        # pointers move, numbers do not: other replicas on these weights, and graphs built before,
        # stay as they are
        own = self.trainable()
        assert own.keys() == weights.keys(), "this policy keeps no such weights"
        current = {name: parameter.data for name, parameter in own.items()}
        for name, parameter in own.items():
            parameter.data = weights[name]
        try:
            yield
        finally:
            for name, parameter in own.items():
                parameter.data = current[name]

    @contextlib.contextmanager
    def _overwritten(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, the policy's own weights, which are spread, have these numbers: FSDP2 gathers
        them from where it keeps them. The backward pass gathers them again, so that nothing inside
        may have one."""
        assert not torch.is_grad_enabled(), "a pass under other weights has no backward pass here"
        current = self.weights()
        self._write(weights)
        try:
            yield
        finally:
            self._write(current)

    @torch.no_grad()
    def _write(self, weights: Mapping[str, torch.Tensor]) -> None:
        """The numbers of trainable weights, and nothing else."""
        own = self.trainable()
        assert own.keys() == weights.keys(), (
            f"weights differ in {sorted(own.keys() ^ weights.keys())[:3]}"
        )
        for name, parameter in own.items():
            assign(parameter, weights[name])

    # --- copies ----------------------------------------------------------------------------------

    def beside(self) -> Policy:
        """The same policy with a meter of its own: for a thread that takes turns with others."""
        twin = copy.copy(self)
        twin.meter = Meter()
        return twin

    def replica(self) -> Policy:
        """A second policy on the same weights (updates in place reach both) with gradients and a
        meter of its own: one per thread."""
        twin = copy.copy(self)
        twin.family = self.family.for_thread(replicate(self.network))
        twin.meter = Meter()
        twin._copies = {}
        return twin

    def in_precision(self, dtype: torch.dtype) -> Policy:
        """The policy, or a copy of it whose denoiser computes in ``dtype``; kept for the next time.
        What the copy is asked is counted by the same meter."""
        if next(self.network.parameters()).dtype == dtype:
            return self
        if dtype not in self._copies:
            twin = copy.copy(self)
            twin.family = self.family.with_network(copy.deepcopy(self.network).to(dtype))
            twin.precision = "float32"
            twin.reference = {n: t.to(dtype) for n, t in self.reference.items()}
            twin._copies = {}
            self._copies[dtype] = twin

        # those who take turns with this one share it, and count for themselves
        found = self._copies[dtype]
        if found.meter is not self.meter:
            found = copy.copy(found)
            found.meter = self.meter
        return found

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes what plain diffusers loads: a pipeline folder, or a LoRA file. Where trained
        weights are spread, ``weights`` are what is written, each read when it is its turn."""
        if weights is None:
            self.family.save(folder)
        else:
            self.family.save_with(folder, weights)

    def save_merged(self, folder: Path) -> None:
        """Writes a pipeline folder, an adapter merged into it. Raises UserError for a family that
        cannot merge its LoRA."""
        self.family.save_merged(folder)

    def save_comfyui(self, file: Path) -> None:
        """Writes the LoRA in one file that ComfyUI reads. Raises UserError where there is none, or
        none of such a family."""
        self.family.save_comfyui(file)

    def merged(self) -> Policy:
        """The policy without adapters, which saves as a whole pipeline. Raises UserError for a
        family that cannot merge its LoRA."""
        if not lora.is_attached(self.network):
            return self
        return Policy(self.family.merged(), precision=self.precision, reference={})
