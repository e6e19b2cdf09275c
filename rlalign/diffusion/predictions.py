"""What networks predict, brought to one currency: (clean, noise)."""

from __future__ import annotations

from typing import Literal, get_args

import torch

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]


def to_clean_and_noise(
    prediction: torch.Tensor,
    x: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    kind: PredictionType,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean sample and the noise that a network's output stands for, with x = alpha * clean +
    sigma * noise.

    epsilon: the noise (Ho 2020). v_prediction: alpha * noise - sigma * clean (Salimans & Ho 2022,
    arXiv:2202.00512, needs alpha^2 + sigma^2 = 1). sample: the clean sample. flow: noise - clean
    (Esser 2024, needs alpha + sigma = 1).
    """
    match kind:
        case "epsilon":
            return (x - sigma * prediction) / alpha, prediction
        case "v_prediction":
            return alpha * x - sigma * prediction, alpha * prediction + sigma * x
        case "sample":
            return prediction, (x - alpha * prediction) / sigma
        case "flow":
            return x - sigma * prediction, x + alpha * prediction
        case _:
            raise AssertionError(
                f"a policy's prediction must be one of {get_args(PredictionType)}, got {kind!r}"
            )


def target(
    clean: torch.Tensor,
    noise: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    kind: PredictionType,
) -> torch.Tensor:
    """What a network of this prediction type is trained to output."""
    return {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * clean,
        "sample": clean,
        "flow": noise - clean,
    }[kind]
