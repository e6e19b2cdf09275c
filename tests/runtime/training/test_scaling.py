"""Automatic scaling: grows when rounds wait for rollouts and not for a reward, shrinks when samples
wait, keeps its bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlalign.runtime.roles import reward_role
from rlalign.runtime.training.scaling import Balance


def line(share: float, rollout: float = 9.0, **rewards: float) -> dict[str, Any]:
    """A round of 10 s of which the learner waited ``share``; seconds that one worker of each pool
    worked."""
    found = {"seconds/round": 10.0, "seconds/rollout": 9.0 * share, "seconds/reward": 1.0 * share}
    found |= {
        f"seconds/worked/reward/{title}": seconds
        for title, seconds in (rewards or {"shapes": 1.0}).items()
    }
    return found | {"seconds/worked/rollout": rollout}


def balance_of(least: int, most: int) -> Balance:
    return Balance(least, most, [reward_role("shapes"), reward_role("jpeg")])


def decisions(
    balance: Balance, share: float, workers: int, rounds: int, **worked: float
) -> list[int]:
    """Workers after each round, when a change takes effect at once."""
    found = []
    for _ in range(rounds):
        balance.pools(ready=workers)
        workers = balance.wanted(line(share, **worked), workers) or workers
        found.append(workers)
    return found


def test_it_grows_while_the_learner_waits_up_to_the_bound() -> None:
    assert decisions(balance_of(2, 4), 0.8, 2, 12) == [2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4]


def test_it_grows_by_a_quarter() -> None:
    assert decisions(balance_of(2, 64), 0.8, 16, 3)[-1] == 20


def test_it_shrinks_when_samples_wait_down_to_what_was_asked() -> None:
    assert decisions(balance_of(2, 8), 0.01, 4, 12)[-1] == 2


def test_between_the_two_it_stays() -> None:
    assert decisions(balance_of(2, 8), 0.2, 4, 10) == [4] * 10


def test_workers_that_are_missed_by_nobody_are_wanted_no_more() -> None:
    """Of eight that are wanted five are there, as after spot machines went."""

    def rounds(balance: Balance, share: float) -> list[int | None]:
        balance.pools(ready=5)
        return [balance.wanted(line(share), 8) for _ in range(3)]

    assert rounds(balance_of(2, 8), 0.01) == [None, None, 5]
    assert rounds(balance_of(6, 8), 0.01) == [None, None, 6], "workers is the floor"
    assert rounds(balance_of(2, 16), 0.8) == [None] * 3, "they are waited for, more would be too"


def test_rounds_made_with_different_numbers_are_not_judged_together() -> None:
    balance = balance_of(2, 8)
    for ready in (5, 6, 5, 6, 5):
        balance.pools(ready=ready)
        assert balance.wanted(line(0.01), 8) is None


def test_off_by_default() -> None:
    assert decisions(balance_of(2, 0), 0.9, 2, 10) == [2] * 10


def test_a_slow_reward_grows_no_rollouts() -> None:
    """The learner waits for 90 % of a round, and all of it for the one worker of the second
    reward."""
    balance = balance_of(2, 8)
    assert decisions(balance, 0.9, 2, 10, rollout=1.0, shapes=0.1, jpeg=8.5) == [2] * 10
    assert balance.advice.startswith("reward-bound, the learner waits 90 % of a round for jpeg")
    assert "rlalign scale RUN --reward jpeg=N" in balance.advice


def test_rollouts_grow_until_a_reward_has_more_to_do() -> None:
    """A worker's part of 12 s of rollouts, beside a reward that works 4 s: three workers have 4 s
    each, four have less."""
    balance, workers = balance_of(1, 8), 1
    for _ in range(40):
        balance.pools(ready=workers)
        workers = balance.wanted(line(0.8, rollout=12.0 / workers, shapes=4.0), workers) or workers
    assert workers == 4
    assert balance.advice


def test_it_advises_no_longer_than_it_holds() -> None:
    balance = balance_of(2, 2)
    decisions(balance, 0.9, 2, 4, rollout=1.0, shapes=8.0)
    assert balance.advice
    decisions(balance, 0.9, 2, 4, rollout=8.0, shapes=1.0)
    assert not balance.advice


def test_rounds_made_while_workers_start_are_not_judged() -> None:
    balance = balance_of(2, 8)
    balance.pools(ready=2)
    assert [balance.wanted(line(0.9), 3) for _ in range(6)] == [None] * 6


def test_one_odd_round_changes_nothing() -> None:
    balance = balance_of(2, 8)
    balance.pools(ready=2)
    assert [balance.wanted(line(share), 2) for share in (0.2, 0.9, 0.2)] == [None] * 3


NAPPING = """
import time
def score(media, prompts, seconds):
    time.sleep(seconds)
    return [float(m.mean()) for m in media]
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("bound", ["rollout", "reward"])
def test_a_run_that_sleeps_grows_only_where_its_rollouts_are_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """Four units a round, on one rollout worker and one reward worker of which one naps 0.3 s a
    unit."""
    from rlalign.alignment import control
    from rlalign.runtime import train_on_ray
    from tests.runs import small_run

    (tmp_path / "napping.py").write_text(NAPPING)
    root = str(Path(__file__).parents[3])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(root)
    call, score = (0.15, 0.0) if bound == "rollout" else (0.0, 0.3)
    arguments = f"{{seconds: {score}}}"
    run = small_run(
        "rounds=16" if bound == "rollout" else "rounds=8",
        "plan.steps=2",
        f"policy={{name: 'benchmarks.sleeper:Sleeper', seconds: {call}}}",
        f"rewards=[{{name: function, call: 'napping:score', arguments: {arguments}, label:"
        " napping}]",
        "evaluate.every=0",
        "evaluate.prompts=1",
        "checkpoint.every=100",
        "runtime.rollout.workers=1",
        "runtime.rollout.max_workers=2",
    )
    notes: list[str] = []
    wanted: list[int] = []

    def watch(record: dict[str, Any]) -> None:
        if "note" in record:
            notes.append(record["note"])
        elif "round" in record:
            wanted.append(control.status_of(tmp_path / "run")["pools"]["rollout"]["wanted"])

    train_on_ray(run, tmp_path / "run", resume=False, on_record=watch)
    said = "\n".join(notes)
    if bound == "rollout":
        assert wanted[0] == 1 and wanted[-1] == 2, wanted
        assert "scaling to 2 rollout workers" in said and "rollout-bound" in said
        lines = [
            json.loads(text)
            for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        ]
        assert lines[-1]["seconds/worked/rollout"] < 0.75 * lines[1]["seconds/worked/rollout"]
    else:
        assert set(wanted) == {1}, wanted
        assert "reward-bound" in said and "for napping" in said
