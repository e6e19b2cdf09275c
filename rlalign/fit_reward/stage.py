"""One stage of a fit: its optimiser, its schedule, and a state that going on needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from rlalign.diffusion.noise import generator
from rlalign.fit_reward.losses import Losses
from rlalign.fit_reward.settings import ModelSettings, Optimisation
from rlalign.registry import UserError
from rlalign.towers import Towers

LARGEST_LOGIT_SCALE = math.log(100.0)
"""Where CLIP clips it (Radford 2021, arXiv:2103.00020, section 2.5)."""


class Stage:
    """Towers in training. Same settings, seed and update: the same step, also after a resume."""

    def __init__(self, name: str, towers: Towers, settings: Optimisation, saved: Mapping[str, torch.Tensor]) -> None:
        self.name, self.towers, self.settings, self.done = name, towers, settings, 0
        self.trained = [p for p in towers.parameters() if p.requires_grad]
        matrices = [p for p in self.trained if p.ndim >= 2]
        others = [
            p for p in self.trained if p.ndim < 2
        ]  # gains, biases and the logit scale do not decay, as in open_clip
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr)
        own = {k.removeprefix(f"{name}/"): v for k, v in saved.items() if k.startswith(f"{name}/")}
        if own:
            self._restore(own)

    def step(self, losses: Losses, seed: int) -> float:
        """One optimiser update; returns its loss."""
        with torch.random.fork_rng():  # dropout and the like draw from torch's own generators
            torch.manual_seed(int(generator("fit-reward", seed, self.name, self.done).integers(2**62)))
            return self._step(losses(self.done))

    def _step(self, parts: Iterable[torch.Tensor]) -> float:
        warm = min(1.0, (self.done + 1) / (self.settings.warmup + 1))
        rate = self.settings.lr * warm * 0.5 * (1.0 + math.cos(math.pi * self.done / self.settings.updates))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for part in parts:
            part.backward()
            value += float(part.detach())
        torch.nn.utils.clip_grad_norm_(self.trained, self.settings.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.towers.clip.logit_scale.clamp_(0.0, LARGEST_LOGIT_SCALE)
        self.done += 1
        return value

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of everything that going on needs, under ``NAME/``."""
        state = {f"network/{n}": t for n, t in self.towers.clip.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{index}/{slot}": value for slot, value in slots.items()}
        state["done"] = torch.tensor(self.done)
        return {f"{self.name}/{key}": value.detach().cpu().contiguous().clone() for key, value in state.items()}

    def _restore(self, state: Mapping[str, torch.Tensor]) -> None:
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer/"):
                _, index, slot = key.split("/")
                slots.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        network = {k.removeprefix("network/"): v for k, v in state.items() if k.startswith("network/")}
        self.towers.clip.load_state_dict(network)
        self.done = int(state["done"])


def lock(towers: Towers, settings: ModelSettings) -> None:
    """Freezes the first layers of the towers, with open_clip's own locks. Raises UserError where a tower has none."""
    try:
        if settings.image_groups >= 0:
            towers.clip.lock_image_tower(unlocked_groups=settings.image_groups, freeze_bn_stats=True)
        if settings.text_groups >= 0:
            towers.clip.lock_text_tower(unlocked_layers=settings.text_groups, freeze_layer_norm=True)
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise UserError(
            f"model.image_groups and model.text_groups: open_clip cannot lock a part of {towers.architecture!r} "
            f"({str(error) or type(error).__name__}); use 0 (all of a tower) or -1 (nothing)"
        ) from error
