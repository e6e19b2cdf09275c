"""How good a fitted reward is on held-out prompts: ``fit.json`` for programs, ``fit.html`` for
people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlalign.core.files import write_whole
from rlalign.core.registry import UserError
from rlalign.data.pairs.reader import PairReader
from rlalign.fitting.reward.losses import pair_loss, rao_kupper, scores
from rlalign.networks.towers import Towers
from rlalign.report.pages import write_page

BINS = 10
MARGINS = 4


@torch.no_grad()
def measure(towers: Towers, reader: PairReader, device: str, theta: float) -> dict[str, Any]:
    """Accuracy, loss and calibration over every pair of a reader."""
    rows: list[tuple[float, float, float]] = []
    prompts: list[str] = []
    sources: list[str] = []
    batch = []

    # pairs are scored in passes; None stands for the end
    for pair in (*reader.all(), None):
        if pair is not None:
            batch.append(pair)
            prompts.append(pair.caption)
            sources.append(pair.source)
        if batch and (pair is None or len(batch) == reader.settings.pairs_per_pass):
            score_0_B, score_1_B, label_0_B = scores(towers, batch, device)
            loss_B = pair_loss(score_0_B, score_1_B, label_0_B, theta)
            difference_B = score_0_B - score_1_B
            rows += zip(difference_B.tolist(), label_0_B.tolist(), loss_B.tolist(), strict=True)
            batch = []

    # at least one of them must have a winner
    table = np.array(rows, dtype=np.float64).reshape(-1, 3)
    if not (table[:, 1] != 0.5).any():
        raise UserError(
            "held_out: no held-out pair has a winner; raise held_out, or give more pairs"
        )
    return summary(table[:, 0], table[:, 1], table[:, 2], prompts, sources, theta=theta)


def summary(
    difference_N: np.ndarray,
    label_N: np.ndarray,
    loss_N: np.ndarray,
    prompts: list[str],
    sources: list[str],
    *,
    theta: float = 1.0,
) -> dict[str, Any]:
    """The numbers of a report from score differences (picture 0 minus 1), labels of picture 0 and
    losses, (N,) each.

    accuracy: share of decided pairs whose winner has the higher score (equal scores count half);
    its standard error treats a prompt's pairs as one draw. reliability: decided pairs by the
    predicted probability that picture 0 wins, given that one wins; calibration_error is the mean
    gap between prediction and outcome (Guo 2017, arXiv:1706.04599, eq. 3). margins: accuracy by
    quarter of |difference|. ``theta`` is Rao-Kupper's threshold for ties, 1 where none was
    modelled.
    """
    # of the decided pairs: difference, who won, and whether the score says so
    decided_N = label_N != 0.5
    d = difference_N[decided_N]
    won = label_N[decided_N] > 0.5
    right = np.where(d == 0.0, 0.5, (d > 0) == won)
    groups = np.array(prompts)[decided_N]
    made = np.array(sources)[decided_N]
    predicted = win_probability(d, theta)
    bins = _reliability(predicted, won)
    return {
        "pairs": len(label_N),
        "decided": int(decided_N.sum()),
        "accuracy": float(right.mean()),
        "standard_error": clustered_error(right, groups),
        "loss": float(loss_N.mean()),
        "calibration_error": sum(b["pairs"] * abs(b["predicted"] - b["won"]) for b in bins)
        / len(d),
        "reliability": bins,
        "margins": _margins(np.abs(d), right),
        "sources": {
            str(s): {"pairs": int((made == s).sum()), "accuracy": float(right[made == s].mean())}
            for s in np.unique(made)
        },
    }


def win_probability(difference_N: np.ndarray, theta: float) -> np.ndarray:
    """(N,) P(0 wins | no tie) = P(0) / (P(0) + P(1)) at score difference d under Rao-Kupper's
    model; theta 1 is sigmoid(d)."""
    first_N, second_N, _ = rao_kupper(torch.from_numpy(difference_N), theta)
    return (first_N / (first_N + second_N)).numpy()


def clustered_error(values_N: np.ndarray, groups_N: np.ndarray) -> float:
    """Standard error of a mean whose values are independent between groups only (Liang & Zeger
    1986)."""
    _, index_N = np.unique(groups_N, return_inverse=True)
    sums = np.bincount(index_N, weights=values_N - values_N.mean())
    return float(np.sqrt((sums**2).sum()) / len(values_N))


def _reliability(predicted_N: np.ndarray, won_N: np.ndarray) -> list[dict[str, Any]]:
    bin_N = np.minimum((predicted_N * BINS).astype(int), BINS - 1)
    return [
        {
            "from": b / BINS,
            "pairs": int((bin_N == b).sum()),
            "predicted": float(predicted_N[bin_N == b].mean()),
            "won": float(won_N[bin_N == b].mean()),
        }
        for b in range(BINS)
        if (bin_N == b).any()
    ]


def _margins(margin_N: np.ndarray, right_N: np.ndarray) -> list[dict[str, Any]]:
    order = np.argsort(margin_N, kind="stable")
    return [
        {
            "from": float(margin_N[part[0]]),
            "to": float(margin_N[part[-1]]),
            "pairs": len(part),
            "accuracy": float(right_N[part].mean()),
        }
        for part in np.array_split(order, MARGINS)
        if len(part)
    ]


def write_report(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes ``fit.json`` and the self-contained ``fit.html``, each whole or not at all."""
    write_whole(folder / "fit.json", json.dumps(facts, indent=2) + "\n")
    write_page(folder / "fit.html", "fit", fit=facts, name=folder.resolve().name)
