"""Automatic scaling: grows when rounds wait for samples, shrinks when samples wait, looks before it leaps, keeps its bounds."""

from __future__ import annotations

from typing import Any

from rlalign.runtime.scaling import Balance


def line(share: float) -> dict[str, Any]:
    return {"seconds/round": 10.0, "seconds/rollout": 9.0 * share, "seconds/reward": 1.0 * share}


def decisions(balance: Balance, share: float, workers: int, rounds: int) -> list[int]:
    """Workers after each round, when a change takes effect at once."""
    found = []
    for _ in range(rounds):
        balance.pools(ready=workers)
        workers = balance.wanted(line(share), workers) or workers
        found.append(workers)
    return found


def test_it_grows_while_the_learner_waits_up_to_the_bound() -> None:
    assert decisions(Balance(2, 4), 0.8, 2, 12) == [2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4]


def test_it_grows_by_a_quarter() -> None:
    assert decisions(Balance(2, 64), 0.8, 16, 3)[-1] == 20


def test_it_shrinks_when_samples_wait_down_to_what_was_asked() -> None:
    assert decisions(Balance(2, 8), 0.01, 4, 12)[-1] == 2


def test_between_the_two_it_stays() -> None:
    assert decisions(Balance(2, 8), 0.2, 4, 10) == [4] * 10


def test_off_by_default() -> None:
    assert decisions(Balance(2, 0), 0.9, 2, 10) == [2] * 10


def test_rounds_made_while_workers_start_are_not_judged() -> None:
    balance = Balance(2, 8)
    balance.pools(ready=2)
    assert [balance.wanted(line(0.9), 3) for _ in range(6)] == [None] * 6


def test_one_odd_round_changes_nothing() -> None:
    balance = Balance(2, 8)
    balance.pools(ready=2)
    assert [balance.wanted(line(share), 2) for share in (0.2, 0.9, 0.2)] == [None] * 3
