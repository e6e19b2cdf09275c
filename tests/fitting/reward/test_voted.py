"""A reward is fitted on people's votes: those that there were when the fit began."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from rlalign.config import parse
from rlalign.core.registry import UserError
from rlalign.data.shapes import captions
from rlalign.fitting.reward import FitReward, fit_reward
from rlalign.networks.towers import CONFIG, WEIGHTS
from rlalign.rewards.bradley_terry import ASSET
from tests.votes import Voted


def quiet(stage: str, done: int, total: int, loss: float) -> None:
    """No progress."""


def settings(place: Path, **changes: object) -> FitReward:
    data = {
        "out": str(place / "fit"),
        "preferences": {"ballots": str(place / "votes.db"), "pairs_per_round": 8},
        "fit": {"updates": 2, "warmup": 0},
        "held_out": 0.5,
        "threads": 1,
        **changes,
    }
    data["preferences"]["pairs_per_pass"] = 8  # type: ignore[index]
    return parse(FitReward, data)


@pytest.mark.promise
def test_a_fit_keeps_the_votes_that_it_began_with(tmp_path: Path) -> None:
    voted = Voted(tmp_path / "votes.db", side=32)
    anna = voted.person()
    for number, caption in enumerate(captions("train")[:24]):
        voted.vote(anna, caption, [200, number])
    folder = fit_reward(settings(tmp_path), progress=quiet)
    assert (folder / "reward.json").is_file()
    note = json.loads((tmp_path / "fit" / "pairs.json").read_text(encoding="utf-8"))
    assert note["cursor"] == 24
    pairs = tmp_path / "fit" / "pairs.parquet"
    assert pq.read_table(pairs).num_rows == 24

    # going on sees the same pairs, whoever has voted meanwhile
    voted.vote(anna, captions("train")[30], [200, 100])
    fit_reward(settings(tmp_path), progress=quiet)
    assert pq.read_table(pairs).num_rows == 24
    other = {"ballots": {"store": str(tmp_path / "votes.db"), "min_ms": 5}}
    with pytest.raises(UserError, match=r"preferences\.ballots\.min_ms must stay 0"):
        fit_reward(settings(tmp_path, preferences=other), progress=quiet)


@pytest.mark.promise
def test_without_updates_it_is_the_reward_that_it_starts_from(tmp_path: Path) -> None:
    voted = Voted(tmp_path / "votes.db", side=32)
    anna = voted.person()
    for number, caption in enumerate(captions("train")[:12]):
        voted.vote(anna, caption, [200, number])
    start = {"architecture": str(ASSET / CONFIG), "pretrained": str(ASSET / WEIGHTS)}
    folder = fit_reward(settings(tmp_path, model=start, fit={"updates": 0}), progress=quiet)
    found, base = (load_file(place / WEIGHTS) for place in (folder, ASSET))
    assert all(torch.equal(found[name], base[name]) for name in base)


def test_without_votes_there_is_nothing_to_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rlalign vote"):
        fit_reward(settings(tmp_path), progress=quiet)
    with pytest.raises(UserError, match="must say where the pairs come from"):
        settings(tmp_path, preferences={})
    with pytest.raises(UserError, match=r"preferences\.upto is about preferences\.ballots"):
        settings(tmp_path, preferences={"path": "pairs.parquet", "upto": 3})
