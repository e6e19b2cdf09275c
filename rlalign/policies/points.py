"""The embedded models' small sibling: points in the plane, with an exact denoiser and nothing to
load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field

from rlalign.core.records import Plan
from rlalign.core.registry import UserError, read_reason
from rlalign.diffusion.paths import VariancePreserving
from rlalign.networks import lora
from rlalign.policies.base import OWN_SIZE, Condition, Family, PolicyRecipe, Words, refuse_frames

MODES: dict[str, tuple[tuple[float, float], ...]] = {
    "left": ((-1.2, 0.6), (-1.2, -0.6)),
    "right": ((1.2, 0.6), (1.2, -0.6)),
    "up": ((-0.6, 1.2), (0.6, 1.2)),
    "down": ((-0.6, -1.2), (0.6, -1.2)),
}
"""Word -> the centres where its points lie."""
SPREAD = 0.15
"""Standard deviation of the points around a centre."""
SIZE = 16
REACH = 2.5
BLOB = 0.45
"""Pixels of a picture's side, the plane's half width in it, and the drawn blob's standard deviation
in the plane."""


class Residual(torch.nn.Module):
    """(x, t, where the caption's modes lie on average) -> what is added to the exact prediction."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(6, hidden)
        self.middle = torch.nn.Linear(hidden, hidden)
        self.outer = torch.nn.Linear(hidden, 2)
        torch.nn.init.zeros_(self.outer.weight)
        torch.nn.init.zeros_(self.outer.bias)

    def forward(
        self, x_B2: torch.Tensor, t_B: torch.Tensor, about_B2: torch.Tensor
    ) -> torch.Tensor:
        features_B6 = torch.cat([x_B2, t_B[:, None], (6.0 * t_B[:, None]).sin(), about_B2], dim=1)
        hidden = torch.nn.functional.silu(self.inner(features_B6))
        return self.outer(torch.nn.functional.silu(self.middle(hidden)))


class PointsFamily(Family):
    """Latents (2, 1, 1) on Stable Diffusion's path, noise prediction; pictures of 16 x 16."""

    prediction = "epsilon"
    lora_targets = ("inner", "middle", "outer")

    def __init__(self, device: str, hidden: int) -> None:
        self.path = VariancePreserving.scaled_linear()
        self.device = device
        self._hidden = hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = Residual(hidden).eval().to(device)

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        """(B, 8, 3) centres with weights: those of the caption's words, or all where it has none
        that is known."""
        every = [mode for modes in MODES.values() for mode in modes]

        def rows(prompt: str) -> list[list[float]]:
            found = [
                mode for word in prompt.lower().split() for mode in MODES.get(word, ())
            ] or every
            return [[x, y, float((x, y) in found)] for x, y in every]

        def words(texts: Sequence[str]) -> Words:
            return Words({"embeds_BLD": torch.tensor([rows(t) for t in texts], device=self.device)})

        return Condition(caption=words(prompts), empty=words([""] * len(prompts)))

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        """sigma * sum_i r_i (x - alpha m_i) / (alpha^2 s^2 + sigma^2), r the posterior of the
        centres, and the residual."""
        # the mean of the points under Gaussian noise is known in closed form
        embeds_BLD = words["embeds_BLD"]
        x_B2 = x.flatten(1)
        alpha_B, sigma_B = (
            f(timestep_B.cpu()).to(x_B2) for f in (self.path.alpha, self.path.sigma)
        )
        variance_B1 = (alpha_B**2 * SPREAD**2 + sigma_B**2)[:, None]
        centres_BLD = embeds_BLD[..., :2].to(x_B2)
        weight_BL = embeds_BLD[..., 2].to(x_B2)
        away_BLD = x_B2[:, None] - alpha_B[:, None, None] * centres_BLD
        logit_BL = weight_BL.log() - (away_BLD**2).sum(-1) / (2.0 * variance_B1)
        away_B2 = (logit_BL.softmax(1)[..., None] * away_BLD).sum(1)
        exact_B2 = sigma_B[:, None] * away_B2 / variance_B1

        # the network adds what it has learned to that
        about_B2 = (weight_BL[..., None] * centres_BLD).sum(1) / weight_BL.sum(1, keepdim=True)
        t_B = timestep_B.to(x_B2) / self.path.train_steps
        kind = next(self.network.parameters()).dtype
        residual_B2 = self.network(x_B2.to(kind), t_B.to(kind), about_B2.to(kind))
        return (exact_B2 + residual_B2.to(x_B2)).reshape(x.shape)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """A Gaussian spot at the point; up is up."""
        across_S = torch.linspace(-REACH, REACH, SIZE, device=latents.device)
        x_B, y_B = latents.flatten(1).float().unbind(1)
        columns_BS = torch.exp(-((across_S - x_B[:, None]) ** 2) / (2 * BLOB**2))
        rows_BS = torch.exp(-((across_S.flip(0) - y_B[:, None]) ** 2) / (2 * BLOB**2))
        spot_BSS = rows_BS[:, :, None] * columns_BS[:, None, :]
        return spot_BSS[:, None, None].expand(-1, 1, 3, -1, -1)

    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        """The spot's centre of mass."""
        across_S = torch.linspace(-REACH, REACH, SIZE, device=media_BFCHW.device)
        spot_BSS = media_BFCHW[:, 0].mean(1)
        mass_B = spot_BSS.sum((1, 2)).clamp(min=1e-6)
        x_B = (spot_BSS.sum(1) * across_S).sum(1) / mass_B
        y_B = (spot_BSS.sum(2) * across_S.flip(0)).sum(1) / mass_B
        return torch.stack([x_B, y_B], dim=1)[:, :, None, None]

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        refuse_frames(plan)
        return (2, 1, 1)

    def drawn_size(self, plan: Plan) -> tuple[int, int]:
        return SIZE, SIZE

    def save(self, folder: Path) -> None:
        """The network's weights, with the adapters in them, and its width; ``path`` of the recipe
        reads them."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(lora.merged_weights(self.network), folder / "points.safetensors")
        (folder / "points.json").write_text(json.dumps({"hidden": self._hidden}), encoding="utf-8")

    def read(self, folder: Path) -> None:
        """Takes over what ``save`` has written."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            self.network.load_state_dict(load_file(folder / "points.safetensors"))
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = read_reason(error)
            raise UserError(
                "policy.path must be a folder that a run of points with this width has saved, got"
                f" {str(folder)!r} ({reason})"
            ) from error


class Points(PolicyRecipe):
    """Points in the plane: the exact denoiser of a Gaussian mixture for each caption, and a small
    network to be trained.

    The network's last layer starts at zero, so the untrained policy is exact. A picture is a bright
    spot on black.

    Source: the score of a mixture of Gaussians in closed form; no paper.
    """

    family = PointsFamily

    hidden: int = Field(default=64, ge=1, description="width of the trained network")
    path: str = Field(
        default="", description="a folder that a run has saved; empty is the untrained one"
    )

    def build(self, device: str) -> PointsFamily:
        family = PointsFamily(device, self.hidden)
        if self.path:
            family.read(Path(self.path))
        return family
