"""The parts of the event model against formulas of queues."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.fleet_events import Clock, Cores, Link, Server

ARRIVALS = 20_000


def waits(take: Callable[..., None], clock: Clock, seconds: np.ndarray, rate: float) -> np.ndarray:
    """What each of a Poisson stream's messages waits before its own seconds begin."""
    found = np.zeros(len(seconds))
    gaps = np.random.default_rng(1).exponential(1 / rate, len(seconds))

    def end(number: int, came: float) -> None:
        found[number] = clock.now - came - seconds[number]

    def come(number: int) -> None:
        take(float(seconds[number]), end, number, clock.now)

    for number, moment in enumerate(np.cumsum(gaps).tolist()):
        clock.after(moment, come, number)
    clock.run()
    return found


@pytest.mark.parametrize("load", [0.3, 0.8])
def test_a_server_waits_as_pollaczek_and_khinchine_say(load):
    """M/D/1: the mean wait is load / (2 (1 - load)) services."""
    clock = Clock()
    server = Server(Cores(clock))
    found = waits(server.take, clock, np.ones(ARRIVALS), load)
    assert found.mean() == pytest.approx(load / (2 * (1 - load)), rel=0.05)
    assert server.seconds == ARRIVALS


def test_two_cores_wait_as_erlang_says():
    """M/M/2: the chance to wait by Erlang's C formula, times 1 / (2 - offered) services."""
    clock = Clock()
    offered = 1.4
    seconds = np.random.default_rng(2).exponential(1.0, ARRIVALS)
    found = waits(Cores(clock, 2).take, clock, seconds, offered)
    full = offered**2 / 2 / (1 - offered / 2)
    chance = full / (1 + offered + full)
    assert (found > 1e-9).mean() == pytest.approx(chance, rel=0.05)
    assert found.mean() == pytest.approx(chance / (2 - offered), rel=0.1)


def test_servers_share_the_cores():
    """Three servers with ten messages of a second each: one core takes 30 s, three take 10."""
    for count, seconds in ((1, 30.0), (2, 15.0), (3, 10.0), (math.inf, 10.0)):
        clock = Clock()
        cores = Cores(clock, count)
        for server in [Server(cores) for _ in range(3)]:
            for _ in range(10):
                server.take(1.0, lambda: None)
        clock.run()
        assert clock.now == pytest.approx(seconds)


def test_a_link_is_shared_evenly():
    """10 and 30 bytes from the start, 20 more from second 1 on, over 10 bytes a second: each has 5
    of the first second, then a third."""
    clock = Clock()
    link = Link(clock, 10.0)
    ends = {}

    def send(name: str, size: float) -> None:
        link.send(size, lambda: ends.update({name: clock.now}))

    send("a", 10.0)
    send("b", 30.0)
    clock.after(1.0, send, "c", 20.0)
    clock.run()
    # a has 5 left at second 1: 1.5 s of a third. b has 20 left then, c 15: each half. b alone last
    assert ends == pytest.approx({"a": 2.5, "c": 5.5, "b": 6.0})
    assert link.seconds == pytest.approx(6.0)


def test_what_has_no_size_or_no_limit_is_there_at_once():
    clock = Clock()
    ends = []
    Link(clock, math.inf).send(1e12, lambda: ends.append(clock.now))
    Link(clock, 1.0).send(0.0, lambda: ends.append(clock.now))
    clock.run()
    assert ends == [0.0, 0.0]
