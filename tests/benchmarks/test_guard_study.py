"""What the study of the guard's triggers reads off evaluations, on made ones."""

from __future__ import annotations

import pytest
import torch

from benchmarks import guard_study as study
from benchmarks.guard_study import DIVERSITY, KL, Evaluations
from rlalign.core.registry import build
from rlalign.learning.guard import GuardSettings

TITLE = "ahead"


def made(held_out: list[float], *, std: float = 1.0) -> Evaluations:
    """Evaluations every other round: the trained reward rises by 1 a round, the KL by 0.1, and the
    diversity falls by a twentieth of the first."""
    return [
        {
            "round": 2 * number,
            "reward/total/mean": 2.0 * number,
            f"held_out/{TITLE}/mean": score,
            f"held_out/{TITLE}/std": std,
            KL: 0.2 * number,
            DIVERSITY: 0.2 * (1.0 - 0.1 * number),
        }
        for number, score in enumerate(held_out)
    ]


FALLING = made([0.0, 0.4, 0.2, -0.2, 0.0])


HELD_OUT = {"name": "held_out", "reward": TITLE}


@pytest.mark.parametrize(
    ("limit", "patience", "round"),
    [
        ({**HELD_OUT, "drop": 0.1}, 1, 4),
        ({**HELD_OUT, "drop": 0.25}, 1, 6),
        ({**HELD_OUT, "drop": 0.1}, 2, 6),
        ({**HELD_OUT, "drop": 0.7}, 1, None),
        ({"name": "kl", "most": 0.3}, 1, 4),
        ({"name": "kl", "most": 0.3}, 3, 8),
        ({"name": "kl", "most": 0.9}, 1, None),
        ({"name": "diversity", "least": 0.75}, 1, 6),
        ({"name": "diversity", "least": 0.75}, 2, 8),
        ({"name": "diversity", "least": 0.5}, 1, None),
    ],
)
def test_each_trigger_fires_at_the_round_that_breaks_its_rule(limit, patience, round):
    guard = GuardSettings.model_validate({"limits": [build("limits", limit)], "patience": patience})
    assert study.fires_at(guard, FALLING) == round


@pytest.mark.parametrize(
    ("held_out", "round"),
    [
        ([0.0, 0.4, 0.1, -0.1, 0.0], 4),
        ([0.0, 0.4, 0.1, 0.2, 0.0], 8),
        ([0.4, 0.1, 0.1, 0.4], None),
        ([0.0, 0.1, 0.2, 0.3], None),
        ([0.0, 0.4, 0.16], None),
    ],
)
def test_a_run_is_lost_from_where_its_score_stays_below_its_best(held_out, round):
    assert study.lost_at(made(held_out), TITLE) == round


def test_the_margin_of_a_loss_is_in_spreads_of_the_first_evaluation():
    assert study.lost_at(made([0.4, 0.2], std=2.0), TITLE) is None


def test_the_tables_count_late_and_false_alarms():
    """One run of the task is lost after round 6; the other keeps its score, and its KL and its
    diversity are the same."""
    recorded = {"one_place": [FALLING, made([0.0, 0.1, 0.2, 0.3, 0.4])]}
    lines = study.triggers_table(recorded, patience=1).splitlines()
    assert "| lost after | | 6, never | |" in lines
    assert "| held-out reward | 0.1 std | 4, never | 0 of 1 |" in lines
    assert "| KL | 0.3 | 4, 4 | 1 of 1 |" in lines
    assert "| diversity | 0.8 | 6, 6 | 1 of 1 |" in lines
    assert "| 0.00 to 8.00; 0.00 to 8.00 |" in study.runs_table(recorded)


def test_a_run_that_stops_ends_where_its_guard_fires(monkeypatch):
    monkeypatch.setattr(study, "ACTED_ON", "one_place")
    monkeypatch.setattr(study, "ACTING", {"limits": [{**HELD_OUT, "drop": 0.25}], "patience": 1})
    rows = study.actions_table([FALLING], {"halve": [FALLING]}).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:4]] for row in rows]
    assert cells == [
        ["none", "8", "0.00 to 8.00"],
        ["stop", "6", "0.00 to 6.00"],
        ["halve", "8", "0.00 to 8.00"],
    ]


def test_points_are_measured_against_the_place_of_their_caption():
    """A spot at a known pixel of a picture of 5 by 5, whose columns lie at -1, -0.5, 0, 0.5, 1."""
    media_BFCHW = torch.zeros(2, 1, 3, 5, 5)
    media_BFCHW[0, ..., 2, 3] = 1.0
    media_BFCHW[1, ..., 2, 4] = 1.0
    assert study.ahead(media_BFCHW, ["right", "left"]).tolist() == pytest.approx([0.5, -1.0])
    assert study.near(media_BFCHW, ["right", "up"]).tolist() == pytest.approx([0.0, -1.25])
    assert study.there(media_BFCHW, ["right", "up"]).tolist() == [1.0, 0.0]
    assert study.rightwards(media_BFCHW, ["right", "up"]).tolist() == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize("name", study.TASKS)
def test_every_task_is_a_run_whose_held_out_rewards_are_measured(name):
    from rlalign.config import load_run

    task = study.TASKS[name]
    run = load_run(study.ROOT / "configs" / task.file, list(task.settings))
    assert {r.title for r in run.evaluate.rewards} == set(task.held_out)
    assert not run.guard.limits
