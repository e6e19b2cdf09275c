"""A reward that a run fits anew: which votes a fit sees, and that it is fit-reward's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlalign.alignment.refit import Refit
from rlalign.config import Run, load_run, parse
from rlalign.core.progress import tell_nobody
from rlalign.core.registry import UserError
from rlalign.data.shapes import captions
from rlalign.fitting.reward import FitReward, fit_reward
from rlalign.networks.towers import CONFIG, WEIGHTS
from rlalign.rewards.bradley_terry import ASSET
from tests.runs import CONFIGS, quiet
from tests.votes import Voted


def run_on(place: Path, *overrides: str) -> Run:
    """``configs/tiny_people_grpo.yaml`` on a store, from the shipped reward; fits of two
    updates."""
    return load_run(
        CONFIGS / "tiny_people_grpo.yaml",
        [
            "rewards=[{name: bradley_terry}]",
            "refit.every=2",
            f"refit.preferences.ballots={{store: {place}, least: 4, fresh: 4}}",
            "refit.preferences.pairs_per_round=8",
            "refit.preferences.pairs_per_pass=8",
            "refit.held_out=0.5",
            "refit.fit={updates: 2, warmup: 0}",
            *overrides,
        ],
    )


def vote(voted: Voted, count: int, start: int = 0) -> None:
    anna = voted.person()
    for number in range(start, start + count):
        voted.vote(anna, captions("train")[number], [200, number])


@pytest.mark.promise
def test_a_fit_is_that_of_fit_reward_on_the_votes_up_to_its_cursor(tmp_path: Path) -> None:
    voted = Voted(tmp_path / "votes.db", side=32)
    run = run_on(tmp_path / "votes.db")
    refit = Refit(run, tmp_path / "run")
    for number in range(2):
        vote(voted, 12, 12 * number)
        assert refit.votes.wait(number, quiet)
    assert refit.votes.cursors == [12, 24]

    # rounds 1 and 2 are scored by the first fit, 3 and 4 by the second, evaluations before by none
    assert [refit.number(done) for done in (-1, 0, 1, 2, 3)] == [-1, 0, 0, 1, 1]
    start = load_file(ASSET / WEIGHTS)
    before, first, second = (refit.weights(number, tell_nobody) for number in (-1, 0, 1))
    assert all(torch.equal(before.tensors[n], start[n]) for n in start)
    assert [w.tag for w in (before, first, second)] == [
        ("bradley_terry", cursor) for cursor in (0, 12, 24)
    ]
    assert not torch.equal(first.tensors["logit_scale"], start["logit_scale"])
    assert refit.measures(1)["votes/fresh"] == 12
    assert 0.0 <= refit.measures(1)["refit/accuracy"] <= 1.0

    # by the command on a store that has more votes by now
    said = {
        "out": tmp_path / "by hand",
        "threads": 1,
        "model": {"architecture": str(ASSET / CONFIG), "pretrained": str(ASSET / WEIGHTS)},
        "preferences": {
            "ballots": str(tmp_path / "votes.db"),
            "upto": 12,
            "pairs_per_round": 8,
            "pairs_per_pass": 8,
        },
        "held_out": 0.5,
        "fit": {"updates": 2, "warmup": 0},
    }
    hand = fit_reward(parse(FitReward, said), progress=lambda *_: None)
    found = load_file(hand / WEIGHTS)
    assert all(torch.equal(first.tensors[name], found[name]) for name in found)

    # and by a run that goes on elsewhere from the cursors alone
    again = Refit(run, tmp_path / "moved")
    again.votes.load(refit.votes.facts())
    found = again.weights(0, tell_nobody).tensors
    assert all(torch.equal(first.tensors[name], found[name]) for name in found)


def test_what_cannot_be_fitted_anew_is_refused(tmp_path: Path) -> None:
    for overrides, words in (
        (["refit.reward=shapes", "rewards=[{name: shapes}]"], r"refit\.reward must be one of"),
        (["algorithm={name: reward_backprop}"], "refit is for runs whose samples are scored"),
        (["refit.preferences={path: pairs.parquet}"], r"preferences\.ballots is required"),
    ):
        with pytest.raises(UserError, match=words):
            run_on(tmp_path / "votes.db", *overrides)
