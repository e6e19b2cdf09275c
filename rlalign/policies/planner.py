"""A planner: its latent is a plan, its prompt's record says from where to where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from rlalign.core.locations import LocalPath
from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.data.mazes.maps import MAZES, MazeName, cells_of, centres, find_maze
from rlalign.data.mazes.tasks import Task, read_task
from rlalign.diffusion.paths import VariancePreserving
from rlalign.networks import lora
from rlalign.networks.plan_denoiser import PlanDenoiser
from rlalign.policies.base import OWN_SIZE, Condition, Family, PolicyRecipe, Words, refuse_frames

SIZE = 64
"""Pixels of a drawn map's longer side."""
_SPOTS = 2  # a segment's, drawn
_SPREAD = 0.8  # pixels: a drawn spot's standard deviation
_WALL = 0.3


class PlannerFamily(Family):
    """Latents (2, H): x and y of way points on the maze's scale; Stable Diffusion's path, noise
    prediction.

    The first way point is the start and the last the goal. There the prediction is what takes the
    latent to them, (x - alpha end) / sigma, whatever the network says: held values have the right
    noise at every step, no step's density depends on the weights there, and every sampler ends on
    them.
    """

    prediction = "epsilon"
    lora_targets = ("mix",)  # peft's adapter of a dilated convolution is not dilated

    def __init__(self, network: PlanDenoiser, device: str, maze: MazeName) -> None:
        self.path = VariancePreserving.scaled_linear(spacing="trailing", ends_clean=True)
        self.device = device
        self.network = network.eval().to(device)
        self._maze = find_maze(maze)
        self._horizon = network.settings["horizon"]
        x, y = centres(self._maze, self._maze.free[:1])[0].tolist()
        self.trial_prompt = Task(maze=self._maze, start=(x, y), goal=(x, y)).prompt

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        """(B, 1, 4) start and goal on the latent's scale, and (B,) the maze's number. Raises
        UserError for a prompt without a record, or of another maze."""
        tasks = [read_task(prompt) for prompt in prompts]
        for task in tasks:
            if task.maze is not self._maze:
                raise UserError(
                    f"policy.maze must be the maze of the prompts, got {self._maze.name!r} and a"
                    f" prompt in {task.maze.name!r}"
                )
        ends = np.array([[*task.start, *task.goal] for task in tasks]).reshape(-1, 1, 4)
        number = [*MAZES].index(self._maze.name)
        words = Words(
            {
                "embeds_BLD": torch.from_numpy(ends / self._maze.scale).float().to(self.device),
                "maze_B": torch.full((len(tasks),), number, device=self.device),
            }
        )
        return Condition(caption=words, empty=words)

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        """The network's noise between the ends, and the exact one at them."""
        ends_B22 = words["embeds_BLD"].to(x).reshape(-1, 2, 2)
        found_B2H = self.network(x, timestep_B, ends_B22, words["maze_B"])
        alpha_B, sigma_B = (
            f(timestep_B.cpu()).to(x)[:, None, None] for f in (self.path.alpha, self.path.sigma)
        )
        held_B22 = (x[:, :, [0, -1]] - alpha_B * ends_B22.transpose(1, 2)) / sigma_B
        return torch.cat([held_B22[:, :, :1], found_B2H[:, :, 1:-1], held_B22[:, :, 1:]], dim=2)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The plan drawn on its map, from blue at the start to yellow at the goal."""
        places_BN2 = (self._maze.scale * latents.float()).transpose(1, 2)
        parts_P = torch.arange(_SPOTS, device=latents.device) / _SPOTS
        steps_BH12 = places_BN2.diff(dim=1)[:, :, None]
        spots_BN2 = (places_BN2[:, :-1, None] + parts_P[:, None] * steps_BH12).flatten(1, 2)
        spots_BN2 = torch.cat([spots_BN2, places_BN2[:, -1:]], dim=1)

        # each spot shines in a colour of its own, over those that are darker
        x_W, y_H, pixel = self._pixels(latents.device)
        across_BNW = torch.exp(-((x_W - spots_BN2[..., :1]) ** 2) / (2 * (_SPREAD * pixel) ** 2))
        along_BNH = torch.exp(-((y_H - spots_BN2[..., 1:]) ** 2) / (2 * (_SPREAD * pixel) ** 2))
        time_N = torch.linspace(0.0, 1.0, spots_BN2.shape[1], device=latents.device)
        colour_N3 = torch.stack([time_N, 0.35 + 0.65 * time_N, 1.0 - time_N], dim=1)
        plan_B3HW = latents.new_zeros(len(latents), 3, len(y_H), len(x_W), dtype=torch.float32)
        for n, colour_3 in enumerate(colour_N3):
            light_BHW = along_BNH[:, n, :, None] * across_BNW[:, n, None]
            plan_B3HW = torch.maximum(plan_B3HW, colour_3[:, None, None] * light_BHW[:, None])
        walls_HW = torch.from_numpy(self._walls()).to(plan_B3HW) * _WALL
        return torch.maximum(plan_B3HW, walls_HW)[:, None]

    def _pixels(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, float]:
        """x of the columns and y of the rows of pixels in metres, and a pixel's side."""
        left, right, bottom, top = self._maze.extent
        pixel = max(right - left, top - bottom) / SIZE
        columns, rows = round((right - left) / pixel), round((top - bottom) / pixel)
        x_W = left + pixel * (torch.arange(columns, device=device) + 0.5)
        return x_W, top - pixel * (torch.arange(rows, device=device) + 0.5), pixel

    def _walls(self) -> np.ndarray:
        """(H, W) bool: pixels of walls."""
        x_W, y_H, _ = self._pixels(torch.device("cpu"))
        places_HW2 = np.stack(np.meshgrid(x_W.numpy(), y_H.numpy()), axis=-1)
        cell_HW2 = cells_of(self._maze, places_HW2)
        return self._maze.walls[cell_HW2[..., 0], cell_HW2[..., 1]]

    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        raise UserError("a planner cannot read plans off pictures; give it latents")

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        refuse_frames(plan)
        return (2, self._horizon)

    def save(self, folder: Path) -> None:
        """Weights and sizes, as ``PlanDenoiser.save`` writes them, with the adapters in them;
        ``path`` of the recipe reads them."""
        own = self.network
        assert isinstance(own, PlanDenoiser)
        network = PlanDenoiser(**own.settings)
        network.load_state_dict(lora.merged_weights(own))
        network.save(folder)


class Planner(PolicyRecipe):
    """A diffusion planner of way points through a maze, from a folder that ``rlalign pretrain`` or
    a run has written. Its prompts have records with a start and a goal (prompts ``mazes``).

    Source: Janner 2022, arXiv:2205.09991 (Diffuser), with way points alone; the ends are held by
    the prediction in place of inpainting.
    """

    family = PlannerFamily
    by_folder: ClassVar[bool] = False

    path: LocalPath = Field(description="a folder with config.json and denoiser.safetensors")
    maze: MazeName = Field(default="umaze", description="which of the mazes that it has learned")

    @property
    def location(self) -> str:
        """The folder that is read."""
        return self.path

    def build(self, device: str) -> PlannerFamily:
        return PlannerFamily(PlanDenoiser.read(Path(self.location)), device, self.maze)
