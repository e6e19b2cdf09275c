"""A planner whose plans are jointly Gaussian, with an exact denoiser and nothing to load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field

from rlalign.core.locations import LocalPath
from rlalign.core.records import Plan
from rlalign.core.registry import UserError, read_reason
from rlalign.data.double_integrator import JointGaussian, joint_gaussian, read_states, state_prompt
from rlalign.diffusion.paths import VariancePreserving
from rlalign.networks import lora
from rlalign.policies.base import OWN_SIZE, Condition, Family, PolicyRecipe, Words, refuse_frames

SIZE = 32
REACH = 4.0
LINE = 0.25
"""Pixels of a picture's side, metres of its half height, and a drawn line's standard deviation in
metres."""
SPANNED = 1e-9
"""Share of the largest variance from which on a direction has one."""
_TOLD = 5


class Residual(torch.nn.Module):
    """(x, t, what is told) -> what is added to the exact prediction: linear in x and in what is
    told, by any function of t."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(size + _TOLD, hidden)
        self.time = torch.nn.Linear(4, hidden)
        self.gate = torch.nn.Linear(hidden, hidden)
        self.outer = torch.nn.Linear(hidden, size)
        torch.nn.init.zeros_(self.outer.weight)
        torch.nn.init.zeros_(self.outer.bias)

    def forward(
        self, x_BD: torch.Tensor, time_B4: torch.Tensor, told_BN: torch.Tensor
    ) -> torch.Tensor:
        gate_BH = self.gate(torch.nn.functional.silu(self.time(time_B4)))
        return self.outer(self.inner(torch.cat([x_BD, told_BN], dim=1)) * gate_BH)


class _Exact(NamedTuple):
    """A joint Gaussian as the denoiser computes with it, float64."""

    map_DN: torch.Tensor
    vectors_DD: torch.Tensor
    values_D: torch.Tensor
    """Eigenvectors (columns) and eigenvalues of its covariance."""
    held_D: torch.Tensor
    reach_DD: torch.Tensor
    """Projects onto what the plans span around their mean: a plan keeps to the dynamics in every
    other direction."""

    @classmethod
    def of(cls, joint: JointGaussian, device: str) -> _Exact:
        values_D, vectors_DD = np.linalg.eigh(joint.covariance_DD)
        # a start alone is told with a goal of zeros, which counts nothing
        missing = 4 - joint.map_DN.shape[1]
        map_D4 = np.pad(joint.map_DN, ((0, 0), (0, missing)))
        spanned_DN = vectors_DD[:, values_D > SPANNED * values_D.max()]
        reach_DD = spanned_DN @ spanned_DN.T
        parts = (map_D4, vectors_DD, values_D.clip(0.0), joint.held_D, reach_DD)
        return cls(*(torch.from_numpy(part).to(device) for part in parts))

    def noise(
        self,
        x_BD: torch.Tensor,
        states_B4: torch.Tensor,
        alpha_B: torch.Tensor,
        sigma_B: torch.Tensor,
    ) -> torch.Tensor:
        """sigma (alpha^2 C + sigma^2)^-1 (x - alpha m); at held numbers (x - alpha m) / sigma."""
        vectors_DD = self.vectors_DD.to(x_BD)
        away_BD = x_BD - alpha_B * (states_B4 @ self.map_DN.T.to(x_BD))
        shrink_BD = sigma_B / (alpha_B**2 * self.values_D.to(x_BD) + sigma_B**2)
        exact_BD = (away_BD @ vectors_DD * shrink_BD) @ vectors_DD.T
        return torch.where(self.held_D, away_BD / sigma_B, exact_BD)


class LinearGaussianFamily(Family):
    """Latents (3, H): place, velocity and control of H moments; Stable Diffusion's path, noise
    prediction.

    The network's say is projected onto what the joint Gaussian spans. So a plan keeps to the
    dynamics, its start, and its goal where the prompt has one, are held, and every sampler ends on
    them, whatever the network says: a cost cannot fall by plans that no control leads to.
    """

    prediction = "epsilon"
    lora_targets = ("inner", "outer")
    trial_prompt = state_prompt((0.0, 0.0))

    def __init__(self, device: str, horizon: int, hidden: int) -> None:
        self.path = VariancePreserving.scaled_linear(spacing="trailing", ends_clean=True)
        self.device = device
        self._settings = {"horizon": horizon, "hidden": hidden}
        self._free, self._to_goal = (
            _Exact.of(joint_gaussian(horizon, to_goal=to_goal), device) for to_goal in (False, True)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = Residual(3 * horizon, hidden).eval().to(device)

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        """(B, 1, 5) start, goal (zeros where there is none), and whether there is one."""
        rows = []
        for prompt in prompts:
            start, goal = read_states(prompt)
            known = goal is not None
            rows.append([*start, *(goal if known else (0.0, 0.0)), float(known)])
        told_B1N = torch.tensor(rows, device=self.device).reshape(-1, 1, _TOLD)
        words = Words({"embeds_BLD": told_B1N})
        return Condition(caption=words, empty=words)

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        """The exact noise of the joint Gaussian, and the residual within what it spans."""
        told_BN = words["embeds_BLD"][:, 0].to(x)
        x_BD = x.flatten(1)
        alpha_B1, sigma_B1 = (
            f(timestep_B.cpu()).to(x)[:, None] for f in (self.path.alpha, self.path.sigma)
        )
        known_B1 = told_BN[:, -1:] > 0
        free_BD, to_goal_BD = (
            one.noise(x_BD, told_BN[:, :-1], alpha_B1, sigma_B1)
            for one in (self._free, self._to_goal)
        )
        exact_BD = torch.where(known_B1, to_goal_BD, free_BD)

        # the network adds what it has learned to that
        t_B1 = timestep_B.to(x)[:, None] / self.path.train_steps
        time_B4 = torch.cat([alpha_B1, sigma_B1, t_B1, (6.0 * t_B1).sin()], dim=1)
        kind = next(self.network.parameters()).dtype
        residual_BD = self.network(x_BD.to(kind), time_B4.to(kind), told_BN.to(kind)).to(x)
        free_BD, to_goal_BD = (
            torch.where(one.held_D, 0.0, residual_BD @ one.reach_DD.to(x))
            for one in (self._free, self._to_goal)
        )
        return (exact_BD + torch.where(known_B1, to_goal_BD, free_BD)).reshape(x.shape)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The place over time as a bright line; up is up, a column is a moment."""
        place_B1H = latents[:, :1].float()
        place_BW = torch.nn.functional.interpolate(
            place_B1H, size=SIZE, mode="linear", align_corners=True
        )[:, 0]
        rows_S = torch.linspace(REACH, -REACH, SIZE, device=latents.device)
        line_BSW = torch.exp(-((rows_S[:, None] - place_BW[:, None]) ** 2) / (2 * LINE**2))
        return line_BSW[:, None, None].expand(-1, 1, 3, -1, -1)

    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        raise UserError("a policy of plans cannot read them off pictures; give it latents")

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        refuse_frames(plan)
        return (3, self._settings["horizon"])

    def drawn_size(self, plan: Plan) -> tuple[int, int]:
        return SIZE, SIZE

    def save(self, folder: Path) -> None:
        """The network's weights, with the adapters in them, and its sizes; ``path`` of the recipe
        reads them."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(lora.merged_weights(self.network), folder / "residual.safetensors")
        (folder / "config.json").write_text(json.dumps(self._settings), encoding="utf-8")

    def read(self, folder: Path) -> None:
        """Takes over what ``save`` has written."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            self.network.load_state_dict(load_file(folder / "residual.safetensors"))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(
                "policy.path must be a folder that a run of linear_gaussian with this horizon and"
                f" width has saved, got {str(folder)!r} ({read_reason(error)})"
            ) from error


class LinearGaussian(PolicyRecipe):
    """Plans of a double integrator under a controller with noise: the exact denoiser of their joint
    Gaussian, and a small network to be trained. Its prompts have records with a start (prompts
    ``states``).

    The network's last layer starts at zero, so the untrained policy is exact.

    Source: Kalman 1960 (the regulator); the score of a Gaussian in closed form.
    """

    family = LinearGaussianFamily

    horizon: int = Field(default=8, ge=2, le=256, description="moments of a plan")
    hidden: int = Field(default=64, ge=1, description="width of the trained network")
    path: LocalPath = Field(
        default="", description="a folder that a run has saved; empty is the untrained one"
    )

    def build(self, device: str) -> LinearGaussianFamily:
        family = LinearGaussianFamily(device, self.horizon, self.hidden)
        if self.path:
            family.read(Path(self.path))
        return family
