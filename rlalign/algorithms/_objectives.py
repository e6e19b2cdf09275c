"""What algorithms optimise, as pure functions of tensors.

Log-probs are averaged over latent elements (nats per element), the unit in which published clip
ranges are given: with D elements, a per-element clip range c bounds the joint log-ratio by D * c.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def ratio(log_prob: torch.Tensor, behaviour_log_prob: torch.Tensor) -> torch.Tensor:
    """exp(log_prob - behaviour_log_prob): the importance ratio per element; exactly 1 where the two
    are equal.

    Held within e^-20 and e^20, far outside any clip range: an overflow would make NaN of a clipped
    sample's zero gradient.
    """
    return torch.exp((log_prob - behaviour_log_prob).clamp(-20.0, 20.0))


def clipped_surrogate(
    ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """max(-A r, -A clip(r, 1 - c, 1 + c)), element by element: a loss (Schulman 2017,
    arXiv:1707.06347, eq. 7)."""
    return torch.maximum(
        -advantage * ratio, -advantage * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    )


def score_function(log_prob: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """-A log p, element by element: REINFORCE (Williams 1992); its gradient is that of the
    surrogate at ratio 1."""
    return -advantage * log_prob


def clip_fraction(ratio: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Share of ratios outside [1 - c, 1 + c]."""
    return ((ratio - 1.0).abs() > clip_range).to(torch.float32).mean()


def ratio_metrics(ratio: torch.Tensor, clip_range: float) -> dict[str, dict[str, torch.Tensor]]:
    """What every ratio-based algorithm reports: "means" and "maxima" of a loss's metrics."""
    fixed = ratio.detach()
    return {
        "means": {
            "ratio/clip_fraction": clip_fraction(fixed, clip_range),
            "ratio/mean": fixed.mean(),
        },
        "maxima": {"ratio/max_deviation": (fixed - 1.0).abs().max()},
    }


def clamped_ratio(ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """-A clip(r, 1 - c, 1 + c), element by element: a loss whose gradient is 0 outside the range
    for either sign of A.

    The published form of DPOK (Fan 2023, arXiv:2305.16381): a bad sample that was pushed out of the
    range does not come back.
    """
    return -advantage * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)


def guarded_ratio(log_ratio: torch.Tensor, gap: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """exp((log_ratio + gap / (2 std^2)) * std): GRPO-Guard's ratio (Wang 2025, arXiv:2510.22319).

    ``gap`` is the mean squared difference of the Gaussians' means per sample. Under the behaviour
    policy the expected log-ratio is -gap / (2 std^2) < 0, which makes one-sided clipping; with it
    added, the exponent has mean 0, and with the factor std the same spread at every step.
    """
    return torch.exp((log_ratio + gap / (2.0 * std**2)) * std)


def gaussian_kl(mean: torch.Tensor, mean_other: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(B,) KL of two Gaussians with one std, averaged over elements: |difference|^2 / (2 std^2),
    nats per element.

    Summed over a trajectory's steps (and times the element count) it is the upper bound of DPOK's
    lemma 4.2 (Fan 2023, arXiv:2305.16381). Needs std > 0.
    """
    return ((mean - mean_other) ** 2 / (2.0 * std**2)).flatten(1).mean(1)


def noise_kl(noise: torch.Tensor, noise_other: torch.Tensor) -> torch.Tensor:
    """(B,) mean squared difference of two noise predictions: what DPOK's published code calls KL.

    It lacks the lemma's factor (d mean / d noise)^2 / (2 std^2), so its weight is no beta in nats.
    """
    return ((noise - noise_other) ** 2).flatten(1).mean(1)


def preference_logit(
    winner_log_ratio: torch.Tensor, loser_log_ratio: torch.Tensor, beta: float
) -> torch.Tensor:
    """beta * (winner - loser): the logit that the winner is preferred (Rafailov 2023,
    arXiv:2305.18290, eq. 7)."""
    return beta * (winner_log_ratio - loser_log_ratio)


def preference_loss(logit: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(logit): Bradley-Terry's negative log-likelihood; ln 2 at 0."""
    return -F.logsigmoid(logit)


def labelled_preference_loss(logit: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of sigmoid(logit) with the label: 1 the first is preferred, 0 the second, 1/2 a
    tie (half for each side)."""
    return label * preference_loss(logit) + (1.0 - label) * preference_loss(-logit)


def forward_reinforcement(
    new: torch.Tensor,
    old: torch.Tensor,
    clean: torch.Tensor,
    share_B: torch.Tensor,
    *,
    beta: float,
    self_normalised: bool = True,
) -> torch.Tensor:
    """(B,) DiffusionNFT's loss on clean predictions (Zheng 2025, arXiv:2509.16117, eq. 9), over
    beta.

    share r |x+ - clean|^2 / w+ + (1 - r) |x- - clean|^2 / w-, x+ = (1 - beta) old + beta new, x- =
    (1 + beta) old - beta new, averaged over elements; w is the detached mean absolute error (at
    least 1e-5), or 1. Its gradient with respect to ``new`` at new = old, unnormalised, is 2 (2 r -
    1) (old - clean) per element count.
    """

    def side(implicit: torch.Tensor) -> torch.Tensor:
        error = (implicit - clean).flatten(1)
        scale = (
            error.detach().abs().mean(1).clamp(min=1e-5)
            if self_normalised
            else torch.ones_like(share_B)
        )
        return (error**2).mean(1) / scale

    towards = side((1.0 - beta) * old + beta * new)
    away = side((1.0 + beta) * old - beta * new)
    return (share_B * towards + (1.0 - share_B) * away) / beta


def reward_weights(reward_B: torch.Tensor, temperature: float) -> torch.Tensor:
    """(B,) softmax(reward / temperature), rescaled to mean 1 (Lee 2023, arXiv:2302.12192; Black
    2023 for RWR).

    The temperature is in units of reward and divides it: at 0.2 a reward of 1 more weighs e^5 times
    as much.
    """
    return torch.softmax(reward_B / temperature, dim=0) * len(reward_B)
