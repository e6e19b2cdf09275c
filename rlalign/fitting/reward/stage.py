"""One stage of a fit: its optimiser, its schedule, and a state that going on needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from rlalign.core.registry import UserError
from rlalign.diffusion.noise import generator
from rlalign.fitting.checkpoints import (
    optimizer_state,
    own_part,
    refuse_gradient,
    restore_optimizer,
)
from rlalign.fitting.reward.losses import Losses
from rlalign.fitting.reward.settings import ModelSettings, Optimisation
from rlalign.networks.towers import Towers

LARGEST_LOGIT_SCALE = math.log(100.0)
"""Where CLIP clips it (Radford 2021, arXiv:2103.00020, section 2.5)."""


class Stage:
    """Towers in training. Same settings, seed and update: the same step, also after a resume."""

    def __init__(
        self, name: str, towers: Towers, settings: Optimisation, saved: Mapping[str, torch.Tensor]
    ) -> None:
        self.name = name
        self.towers = towers
        self.settings = settings
        self.done = 0

        # only what is not locked is trained
        self.trained = [p for p in towers.parameters() if p.requires_grad]
        matrices = [p for p in self.trained if p.ndim >= 2]

        # gains, biases and the logit scale do not decay, as in open_clip
        others = [p for p in self.trained if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr)
        own = own_part(saved, name)
        if own:
            self._restore(own)

    def step(self, losses: Losses, seed: int) -> float:
        """One optimiser update; returns its loss."""
        # dropout and the like draw from torch's own generators
        with torch.random.fork_rng():
            rng = generator("fit-reward", seed, self.name, self.done)
            torch.manual_seed(int(rng.integers(2**62)))
            return self._step(losses(self.done))

    def _step(self, parts: Iterable[torch.Tensor]) -> float:
        # the rate rises at first and falls by a cosine
        warm = min(1.0, (self.done + 1) / (self.settings.warmup + 1))
        falling = 1.0 + math.cos(math.pi * self.done / self.settings.updates)
        rate = self.settings.lr * warm * 0.5 * falling
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        # the gradient adds up over the parts
        self.optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for part in parts:
            part.backward()
            value += float(part.detach())

        # the step, where the gradient is finite
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.settings.max_grad_norm)
        refuse_gradient(norm, self.name, self.done)
        self.optimizer.step()

        # the logit scale stays in open_clip's range
        with torch.no_grad():
            self.towers.clip.logit_scale.clamp_(0.0, LARGEST_LOGIT_SCALE)
        self.done += 1
        return value

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of everything that going on needs, under ``NAME/``."""
        state = {f"network/{n}": t for n, t in self.towers.clip.state_dict().items()}
        state |= optimizer_state(self.optimizer)
        state["done"] = torch.tensor(self.done)
        on_cpu = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        return {f"{self.name}/{key}": value.clone() for key, value in on_cpu.items()}

    def _restore(self, state: Mapping[str, torch.Tensor]) -> None:
        restore_optimizer(self.optimizer, state)
        self.towers.clip.load_state_dict(own_part(state, "network"))
        self.done = int(state["done"])


def lock(towers: Towers, settings: ModelSettings) -> None:
    """Freezes the first layers of the towers, with open_clip's own locks. Raises UserError where a
    tower has none."""
    try:
        if settings.image_groups >= 0:
            towers.clip.lock_image_tower(
                unlocked_groups=settings.image_groups, freeze_bn_stats=True
            )
        if settings.text_groups >= 0:
            towers.clip.lock_text_tower(
                unlocked_layers=settings.text_groups, freeze_layer_norm=True
            )
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise UserError(
            "model.image_groups and model.text_groups: open_clip cannot lock a part of"
            f" {towers.architecture!r} ({str(error) or type(error).__name__}); use 0 (all of a"
            " tower) or -1 (nothing)"
        ) from error
