"""The next worker to be called is the one that a search through all of them would find."""

from __future__ import annotations

import random

from rlalign.runtime.idle import IdleMembers

IN_FLIGHT = 2


def test_the_least_busy_of_the_lowest_number():
    """Three thousand random calls, answers, deaths and returns of five workers."""
    chance = random.Random(0)
    idle = IdleMembers(IN_FLIGHT)
    calls = dict.fromkeys(range(5), 0)
    ready = set(calls)
    for number in ready:
        idle.offer(number, 0)

    def calls_of(number: int) -> int | None:
        return calls[number] if number in ready else None

    for _ in range(3000):
        what = chance.choice(("call", "call", "release", "away", "back"))
        number = chance.randrange(5)
        found = idle.least_busy(calls_of)
        free = [(calls[n], n) for n in ready if calls[n] < IN_FLIGHT]
        assert found == (min(free)[1] if free else None)
        if what == "call" and found is not None:
            calls[found] += 1
            idle.offer(found, calls[found])
        elif what == "release" and calls[number]:
            calls[number] -= 1
            idle.offer(number, calls[number])
        elif what == "away":
            ready.discard(number)
        elif what == "back" and number not in ready:
            ready.add(number)
            idle.offer(number, calls[number])


def test_what_is_known_does_not_grow():
    """A thousand calls, one after another, of the first of three members."""
    idle = IdleMembers(IN_FLIGHT)
    calls = [0, 0, 0]
    for number in range(3):
        idle.offer(number, 0)
    for _ in range(1000):
        number = idle.least_busy(calls.__getitem__)
        assert number == 0
        for change in (1, -1):
            calls[number] += change
            idle.offer(number, calls[number])
    assert len(idle._offers) <= 3 * IN_FLIGHT
