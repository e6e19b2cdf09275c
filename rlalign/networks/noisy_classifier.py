"""A noise-aware classifier of the embedded task: what a noisy latent says of a caption's facts, at
any noise level."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from rlalign.core.registry import UserError, find, read_reason
from rlalign.data.shapes import NUMBERS, PALETTE, PLURALS, RELATIONS, parse_caption

ASSET = Path(__file__).parents[1] / "assets" / "tiny_classifier"
COLOURS = tuple(PALETTE)
SHAPES = tuple(PLURALS)
WEIGHTS = "classifier.safetensors"
CONFIG = "config.json"


class Judge(Protocol):
    """(x_t, alpha, sigma, prompts) -> (B,) log p(caption | x_t), differentiable in x_t = alpha *
    clean + sigma * noise."""

    def __call__(
        self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[str], /
    ) -> torch.Tensor: ...


class FactClassifier(nn.Module):
    """A small convolutional network with three kinds of answers about a noisy latent (B, C, H, W).

    For each colour how many objects have it (0 to 3) and which shape they are; for each pair of
    colours whether the first lies left of, and above, the second. It is told log(sigma / alpha),
    and latents come divided by sqrt(alpha^2 + sigma^2), so one network serves the
    variance-preserving and the flow path.
    """

    def __init__(self, channels: int = 4, width: int = 48) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.level = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, 2 * width * 3))
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(3)
        )
        self.last = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Flatten(), nn.Linear(width * 16, 4 * width)
        )
        colours = len(COLOURS)
        self.number = nn.Linear(4 * width, colours * (len(NUMBERS) + 1))
        self.shape = nn.Linear(4 * width, colours * len(SHAPES))
        self.relation = nn.Linear(4 * width, colours * colours * len(RELATIONS))

    def forward(
        self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of numbers (B, colours, 4), shapes (B, colours, shapes), and of each
        relation's "yes"."""
        # the ratio of noise to signal, as sines and cosines
        rows = x.shape[0]
        colours = len(COLOURS)
        alpha_B, sigma_B = (v.to(x).reshape(-1).expand(rows) for v in (alpha, sigma))
        log_ratio_B = (sigma_B.clamp(min=1e-4) / alpha_B.clamp(min=1e-4)).log().clamp(-5.0, 5.0)
        frequency = torch.arange(1, 9, device=x.device, dtype=x.dtype) * 0.4
        angles = log_ratio_B[:, None] * frequency

        # it scales and shifts each block
        scale, shift = (
            self.level(torch.cat([angles.sin(), angles.cos()], dim=1))
            .reshape(rows, 6, -1)
            .chunk(2, dim=1)
        )

        # the picture, at a fourth of its side in the end
        h = self.first(x / (alpha_B**2 + sigma_B**2).sqrt().reshape(-1, 1, 1, 1))
        for number, block in enumerate(self.blocks):
            h = h + block(
                h * (1.0 + scale[:, number, :, None, None]) + shift[:, number, :, None, None]
            )
            if number < 2:
                h = nn.functional.avg_pool2d(h, 2)
        h = self.last(nn.functional.adaptive_avg_pool2d(h, 4))
        h = nn.functional.silu(h)

        # log probabilities of the facts
        relation = self.relation(h).reshape(rows, colours, colours, -1)
        return (
            self.number(h).reshape(rows, colours, -1).log_softmax(-1),
            self.shape(h).reshape(rows, colours, -1).log_softmax(-1),
            # one of "i left of j", "j left of i" is true
            nn.functional.logsigmoid(relation - relation.transpose(1, 2)),
        )

    def log_prob(
        self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[str]
    ) -> torch.Tensor:
        """(B,) sum of the log-probabilities of a caption's facts: the number of every colour,
        shapes, relation."""
        numbers, shapes, relations = self(x, alpha, sigma)
        number_BC, shape_BC, pair_B3 = (torch.from_numpy(a).to(x.device) for a in targets(prompts))
        value = numbers.gather(2, number_BC[..., None])[..., 0].sum(1)
        shape = shapes.gather(2, shape_BC.clamp(min=0)[..., None])[..., 0]
        value = value + (shape * (shape_BC >= 0)).sum(1)
        rows = torch.arange(len(x), device=x.device)
        first, second, kind = pair_B3.clamp(min=0).unbind(1)
        return value + relations[rows, first, second, kind] * (pair_B3[:, 0] >= 0)

    def save(self, folder: Path) -> None:
        """Writes weights (safetensors) and widths (JSON)."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in self.state_dict().items()}, folder / WEIGHTS)
        facts = {
            "channels": self.channels,
            "width": self.width,
            "colours": COLOURS,
            "shapes": SHAPES,
        }
        (folder / CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def targets(prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(numbers (B, colours), shapes (B, colours) or -1, relation (B, 3): first and second colour
    and kind, or -1)."""
    number_BC = np.zeros((len(prompts), len(COLOURS)), dtype=np.int64)
    shape_BC = np.full_like(number_BC, -1)
    pair_B3 = np.full((len(prompts), 3), -1, dtype=np.int64)
    for b, prompt in enumerate(prompts):
        scene = parse_caption(prompt)
        for group in scene.groups:
            number_BC[b, COLOURS.index(group.colour)] = group.number
            shape_BC[b, COLOURS.index(group.colour)] = SHAPES.index(group.shape)
        if scene.relation is not None:
            first, second = (COLOURS.index(g.colour) for g in scene.groups)
            pair_B3[b] = first, second, RELATIONS.index(scene.relation)
    return number_BC, shape_BC, pair_B3


@functools.lru_cache(maxsize=4)
def load_classifier(name: str, device: str) -> Judge:
    """The shipped classifier (""), one from a folder, or ``package.module:function``; a UserError
    says what is wrong."""
    if ":" in name:
        return find(name, "sampler.classifier")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    # the classifier of the package where no other is named
    folder = Path(name) if name else ASSET
    try:
        facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        network = FactClassifier(int(facts["channels"]), int(facts["width"]))
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = read_reason(error)
        raise UserError(
            f"sampler.classifier must be a folder that rlalign pretrain wrote, got {str(folder)!r}:"
            f" {reason}"
        ) from error
    return network.to(device).eval().requires_grad_(False).log_prob
