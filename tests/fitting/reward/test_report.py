"""The numbers of a report against closed forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlalign.fitting.reward.losses import rao_kupper
from rlalign.fitting.reward.report import clustered_error, summary, win_probability, write_report


def of(
    differences: list[float],
    labels: list[float],
    prompts: list[str] | None = None,
    theta: float = 1.0,
) -> dict:
    words = prompts or [str(n) for n in range(len(labels))]
    loss = np.zeros(len(labels))
    return summary(
        np.array(differences), np.array(labels), loss, words, ["drawn"] * len(labels), theta=theta
    )


def test_accuracy_counts_decided_pairs_and_equal_scores_by_half() -> None:
    found = of([2.0, -1.0, 0.5, 0.0, 3.0], [1.0, 0.0, 0.0, 1.0, 0.5])
    assert (found["pairs"], found["decided"]) == (5, 4)
    assert found["accuracy"] == (1 + 1 + 0 + 0.5) / 4
    assert found["sources"] == {"drawn": {"pairs": 4, "accuracy": 0.625}}


def test_a_standard_error_of_single_pairs_is_the_binomials_and_groups_widen_it() -> None:
    right = np.array([1.0] * 80 + [0.0] * 20)
    alone = clustered_error(right, np.arange(100).astype(str))
    assert alone == pytest.approx(np.sqrt(0.8 * 0.2 / 100))
    assert clustered_error(right, (np.arange(100) // 4).astype(str)) == pytest.approx(2 * alone)


def test_true_probabilities_are_calibrated_and_boasting_is_seen() -> None:
    """20 000 pairs drawn from the predicted odds: the error is below 0.02; with scores tripled it
    is above 0.1."""
    rng = np.random.default_rng(0)
    d = rng.normal(0, 1.5, 20_000)
    won = (rng.random(len(d)) < 1 / (1 + np.exp(-d))).astype(float)
    fair, boasting = of(d.tolist(), won.tolist()), of((3 * d).tolist(), won.tolist())
    assert fair["calibration_error"] < 0.02 and boasting["calibration_error"] > 0.1
    assert fair["accuracy"] == boasting["accuracy"]
    assert sum(b["pairs"] for b in fair["reliability"]) == 20_000 and len(fair["reliability"]) == 10
    accuracies = [m["accuracy"] for m in fair["margins"]]
    assert accuracies == sorted(accuracies) and sum(m["pairs"] for m in fair["margins"]) == 20_000


def test_where_ties_are_modelled_a_decided_pairs_probability_is_conditional() -> None:
    """P(0) / (P(0) + P(1)) by hand at theta 3; theta 1 is the sigmoid, also far out."""
    d = np.array([-800.0, -2.0, 0.0, 0.7, 800.0])
    first, second = (1 / (1 + 3 * np.exp(np.clip(side * d, -700, 700))) for side in (-1, 1))
    assert win_probability(d, 3.0) == pytest.approx(first / (first + second), abs=1e-12)
    assert win_probability(d, 1.0) == pytest.approx(
        1 / (1 + np.exp(-np.clip(d, -700, 700))), abs=1e-12
    )


def test_true_probabilities_are_calibrated_where_there_are_ties() -> None:
    """40 000 pairs drawn from Rao-Kupper at theta 4: error below .02 (seen .005); read as if
    without ties, above .05 (.064)."""
    rng = np.random.default_rng(0)
    d, drawn = rng.normal(0, 1.5, 40_000), rng.random(40_000)
    wins, loses, _ = (p.numpy() for p in rao_kupper(torch.from_numpy(d), 4.0))
    label = np.where(drawn < wins, 1.0, np.where(drawn < wins + loses, 0.0, 0.5))
    fair, wrong = (of(d.tolist(), label.tolist(), theta=theta) for theta in (4.0, 1.0))
    assert fair["decided"] < 30_000
    assert fair["calibration_error"] < 0.02
    assert wrong["calibration_error"] > 0.05


def test_the_page_says_the_accuracy_and_escapes_names(tmp_path: Path) -> None:
    found = {"trained_on": 10, "prompts": 3, **of([1.0, -1.0, 1.0], [1.0, 0.0, 0.0])}
    found["sources"] = {
        "<b>": {"pairs": 1, "accuracy": 1.0},
        "drawn": {"pairs": 2, "accuracy": 0.5},
    }
    write_report(tmp_path, found)
    assert json.loads((tmp_path / "fit.json").read_text())["accuracy"] == pytest.approx(2 / 3)
    page = (tmp_path / "fit.html").read_text()
    assert (
        "66.7 %" in page
        and "pictures of &lt;b&gt;" in page
        and page.count("<circle") == len(found["reliability"])
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fit.html", "fit.json"]
