"""The denoiser of plans: a small convolutional network along the way points, told the noise level,
the start, the goal and the maze."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import nn

from rlalign.core.files import replacing
from rlalign.core.registry import UserError, read_reason
from rlalign.data.mazes.maps import MAZES

WEIGHTS = "denoiser.safetensors"
CONFIG = "config.json"

_TIMES = 32  # frequencies in which a timestep is told
_PLACES = (0.5, 1.0, 2.0, 4.0)
"""Half turns per unit in which the ends are told."""
_DILATIONS = (1, 2, 4, 8)
_KERNEL = 5


class PlanDenoiser(nn.Module):
    """A noisy plan (B, 2, H), timesteps (B,), ends (B, 2, 2) and mazes (B,) -> a prediction
    (B, 2, H).

    Ends are the start and the goal on the latent's scale, mazes their numbers in ``MAZES``. Blocks
    of dilated convolutions, each scaled and shifted by what it is told (Perez 2017,
    arXiv:1709.07871); beside the plan they see the straight line between the ends. The last layer
    starts at zero.
    """

    def __init__(self, *, horizon: int = 32, width: int = 64, blocks: int = 8) -> None:
        super().__init__()
        self.settings = {"horizon": horizon, "width": width, "blocks": blocks}
        told = 2 * width
        self.told = nn.Sequential(
            nn.Linear(2 * _TIMES + 8 * len(_PLACES), told),
            nn.SiLU(),
            nn.Linear(told, told),
        )
        self.maze = nn.Embedding(len(MAZES), told)
        self.first = nn.Conv1d(6, width, _KERNEL, padding="same")
        self.blocks = nn.ModuleList(
            _Block(width, told, _DILATIONS[n % len(_DILATIONS)]) for n in range(blocks)
        )
        self.last = nn.Conv1d(width, 2, 1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(
        self,
        x_B2H: torch.Tensor,
        timestep_B: torch.Tensor,
        ends_B22: torch.Tensor,
        maze_B: torch.Tensor,
    ) -> torch.Tensor:
        kind = self.last.weight.dtype
        told_BD = self._tell(timestep_B.to(kind), ends_B22.to(kind), maze_B)

        # the plan, the straight line, and where along it a way point is
        rows, _, horizon = x_B2H.shape
        along_H = torch.linspace(0.0, 1.0, horizon, device=x_B2H.device, dtype=kind)
        straight_B2H = torch.lerp(
            ends_B22[:, 0, :, None].to(kind), ends_B22[:, 1, :, None].to(kind), along_H
        )
        place_B2H = torch.stack([2 * along_H - 1, (2 * along_H - 1) ** 2]).expand(rows, 2, horizon)
        h = self.first(torch.cat([x_B2H.to(kind), straight_B2H, place_B2H], dim=1))
        for block in self.blocks:
            h = block(h, told_BD)
        return self.last(h).to(x_B2H.dtype)

    def _tell(
        self, timestep_B: torch.Tensor, ends_B22: torch.Tensor, maze_B: torch.Tensor
    ) -> torch.Tensor:
        """(B, D) what every block is told."""
        like = {"device": timestep_B.device, "dtype": timestep_B.dtype}
        slowest, fastest = math.log(1e-3), 0.0
        time_BF = timestep_B[:, None] * torch.linspace(slowest, fastest, _TIMES, **like).exp()
        place_BF = (ends_B22.flatten(1)[..., None] * torch.tensor(_PLACES, **like)).flatten(1)
        angle_BF = torch.cat([time_BF, math.pi * place_BF], dim=1)
        told_BD = self.told(torch.cat([angle_BF.sin(), angle_BF.cos()], dim=1))
        return nn.functional.silu(told_BD + self.maze(maze_B))

    def save(self, folder: Path) -> None:
        """Writes weights (safetensors) and sizes (JSON)."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        weights = {n: t.detach().cpu().contiguous() for n, t in self.state_dict().items()}
        with replacing(folder / WEIGHTS) as file:
            save_file(weights, file)
        facts = {**self.settings, "mazes": [*MAZES]}
        (folder / CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> PlanDenoiser:
        """What ``save`` wrote. Raises UserError where it is not there or does not fit."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            network = cls(**{name: int(facts[name]) for name in ("horizon", "width", "blocks")})
            network.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"policy.path must be a folder with a planner's {CONFIG} and {WEIGHTS}, got"
                f" {str(folder)!r} ({read_reason(error)})"
            ) from error
        return network.eval()


class _Block(nn.Module):
    """Adds what a dilated convolution makes of (B, W, H); nothing before training."""

    def __init__(self, width: int, told: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.told = nn.Linear(told, 2 * width)
        self.along = nn.Conv1d(width, width, _KERNEL, padding="same", dilation=dilation)
        self.mix = nn.Conv1d(width, width, 1)
        nn.init.zeros_(self.mix.weight)
        assert self.mix.bias is not None
        nn.init.zeros_(self.mix.bias)

    def forward(self, h: torch.Tensor, told_BD: torch.Tensor) -> torch.Tensor:
        scale, shift = self.told(told_BD)[..., None].chunk(2, dim=1)
        moved = nn.functional.silu(self.norm(h) * (1.0 + scale) + shift)
        return h + self.mix(nn.functional.silu(self.along(moved)))
