"""The denoiser of plans: what it is trained on, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rlalign.data.mazes.demonstrations import demonstrate
from rlalign.data.mazes.maps import MAZES, to_plan
from rlalign.diffusion.noise import generator, normal
from rlalign.diffusion.paths import VariancePreserving
from rlalign.fitting.denoiser import stages
from rlalign.fitting.denoiser.settings import Pretrain
from rlalign.networks.plan_denoiser import PlanDenoiser


class PlanCorpus(NamedTuple):
    """Demonstrations on the latent's scale."""

    plans_N2H: torch.Tensor
    maze_N: torch.Tensor
    """(N,) int64: the number of each one's maze in ``MAZES``."""


def demonstrations(config: Pretrain) -> PlanCorpus:
    """As many demonstrations of each maze, each keyed by its maze's name."""
    plans, mazes = [], []
    count = -(-config.images // len(config.mazes))
    for name in config.mazes:
        rng = generator("pretrain", config.seed, "plans", name)
        shown = demonstrate(MAZES[name], rng, count, config.horizon)
        plans.append(to_plan(shown.points_BH2, MAZES[name]))
        mazes += [[*MAZES].index(name)] * count
    return PlanCorpus(
        torch.from_numpy(np.concatenate(plans)).float(), torch.tensor(mazes, dtype=torch.int64)
    )


def plan_denoiser(config: Pretrain) -> PlanDenoiser:
    """The network with fresh weights, which depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return PlanDenoiser(
            horizon=config.horizon, width=config.denoiser.width, blocks=config.denoiser.layers
        )


def plan_loss(
    network: PlanDenoiser, corpus: PlanCorpus, config: Pretrain
) -> Callable[[int], torch.Tensor]:
    """Update -> denoising loss on the update's own batch, noise and levels. The ends of a plan are
    held, so what the network says there does not count."""
    path = VariancePreserving.scaled_linear()

    def loss(update: int) -> torch.Tensor:
        # which plans, at which levels
        settings = config.denoiser
        key = ("pretrain", config.seed, "denoiser", update)
        rng = generator(*key, "rows")
        rows_B = torch.from_numpy(rng.integers(len(corpus.plans_N2H), size=settings.batch))
        level_B = torch.from_numpy(rng.integers(path.train_steps, size=settings.batch))
        clean_B2H = corpus.plans_N2H[rows_B]
        noise_B2H = normal((*key, "noise"), clean_B2H.shape)
        ends_B22 = clean_B2H[:, :, [0, -1]].transpose(1, 2)

        # what is told apart from noise, between the ends
        def predict(x_B2H: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
            found_B2H = network(x_B2H, timestep_B, ends_B22, corpus.maze_N[rows_B])
            between = [noise_B2H[:, :, :1], found_B2H[:, :, 1:-1], noise_B2H[:, :, -1:]]
            return torch.cat(between, dim=2)

        return stages.denoising_loss(predict, clean_B2H, noise_B2H, level_B, path, "epsilon")

    return loss


def pretrain_planner(
    config: Pretrain, saved: dict[str, torch.Tensor], train: Callable[..., None]
) -> Path:
    """All updates that the network still lacks; returns ``out/policy``."""
    network = plan_denoiser(config)
    stage = stages.Stage("denoiser", network, config.denoiser, saved)
    train(stage, plan_loss(network, demonstrations(config), config), {})
    stage.keep_average()
    folder = config.out / "policy"
    network.save(folder)
    return folder
