"""The model of a fleet against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.fleet_model import efficiency, simulate
from benchmarks.fleet_scenario import Costs, Draws, Network, Scenario

FREE = Costs()
"""Messages that cost nothing."""


def made(workers: int, units: int, seconds: float = 1.0, **more: object) -> Scenario:
    more = {"rounds": 1, "reward_workers": 1000, **more}
    return Scenario(workers=workers, units=units, rollout=Draws(mean=seconds), **more)


@pytest.mark.parametrize(("workers", "units"), [(1, 1), (1, 5), (3, 9), (3, 10), (7, 8)])
def test_without_costs_a_round_is_what_the_busiest_worker_does(workers, units):
    outcome = simulate(made(workers, units, rewards=[Draws(mean=0.25)], update=0.5), FREE)
    assert outcome.seconds == pytest.approx(math.ceil(units / workers) + 0.25 + 0.5)
    busy = units / (workers * outcome.seconds)
    assert outcome.use["rollouts"] == pytest.approx(busy)
    assert outcome.use["learner"] == pytest.approx(0.5 / outcome.seconds)


def test_a_coordinator_that_is_never_idle_works_the_sum_of_its_messages():
    costs = Costs(order=1.0, call=2.0, member=0.01, answer=3.0, score=4.0, gather=5.0)
    outcome = simulate(made(10, 40, seconds=0.0), costs)
    assert outcome.seconds == pytest.approx(40 * (1 + 2 + 0.1 + 3 + 4 + 5))
    assert outcome.use["coordinator"] == pytest.approx(1.0)


@pytest.mark.parametrize("workers", [1, 5, 10, 20, 80])
def test_machines_and_their_repairman(workers):
    """Workers of 1 s that need the coordinator for 0.1 s between two units, within the bounds of
    operational analysis: n / (1 + n 0.1) to n / 1.1 units a second, and never more than 10."""
    units = 50 * workers
    scenario = made(workers, units, in_flight=1)
    rate = units / simulate(scenario, Costs(call=0.04, answer=0.06)).seconds
    assert workers / (1 + 0.1 * workers) * 0.97 <= rate <= min(workers / 1.1, 10.0) * 1.03
    if workers in (1, 80):
        assert rate == pytest.approx(min(workers / 1.1, 10.0), rel=0.03)


def test_a_call_that_waits_at_the_worker_hides_the_way_back():
    costs = Costs(hop=0.05)
    one = simulate(made(4, 40, in_flight=1), costs).seconds
    two = simulate(made(4, 40, in_flight=2), costs).seconds
    # there and back of every unit but the first; the rest is order, reward and results
    assert one - two == pytest.approx(9 * 0.1)


def test_coordinators_share_the_messages():
    costs = Costs(order=0.01, call=0.01, answer=0.01, score=0.01, gather=0.01)
    alone = simulate(made(64, 256, seconds=0.0), costs).seconds
    four = simulate(made(64, 256, seconds=0.0, coordinators=4), costs)
    assert four.seconds == pytest.approx(alone / 4)


@pytest.mark.parametrize(("rollouts", "update"), [(4, 1.0), (4, 4.0), (2, 3.0)])
def test_a_round_ahead_overlaps_rollouts_and_update(rollouts, update):
    scenario = made(3, 3 * rollouts, update=update, rounds=12)
    assert simulate(scenario, FREE).per_round == pytest.approx(rollouts + update)
    ahead = simulate(replace(scenario, max_staleness=1), FREE)
    assert ahead.per_round == pytest.approx(max(rollouts, update))


def test_a_checkpoint_is_not_crossed():
    """Each block of rounds takes one update more than its rollouts."""
    scenario = made(2, 8, update=3.0, rounds=20, max_staleness=1, checkpoint_every=5)
    outcome = simulate(scenario, FREE)
    assert outcome.seconds == pytest.approx(4 * (5 * 4 + 3))


@pytest.mark.parametrize("restart", [0.0, 2.0])
def test_units_are_given_out_again_geometrically(restart):
    """A unit of T seconds under a death rate r takes (e^rT - 1) / r seconds and e^rT attempts."""
    rate = 0.5
    units = 4000
    scenario = made(1, units, deaths=rate, restart=restart, in_flight=1, seed=3)
    outcome = simulate(scenario, FREE)
    again = math.exp(rate) - 1
    assert outcome.retries / units == pytest.approx(again, rel=0.05)
    assert outcome.seconds / units == pytest.approx(again / rate + again * restart, rel=0.05)
    assert outcome.wasted / units == pytest.approx(again / rate - 1, rel=0.1)


def test_a_killed_worker_takes_its_second_call_with_it():
    """Units of 1 s; the worker dies at 1.5 with two calls and is back 2 s later."""
    outcome = simulate(made(1, 3, kills=[(1.5, 0)], restart=2.0), FREE)
    assert outcome.seconds == pytest.approx(3.5 + 2)
    assert (outcome.retries, outcome.attempts, outcome.wasted) == (2, 2, 0.5)


def test_others_take_over_while_a_worker_is_away():
    outcome = simulate(made(2, 4, kills=[(0.5, 0)], restart=100.0, notice=0.25), FREE)
    assert outcome.seconds == pytest.approx(4.0)
    assert outcome.retries == 2


def test_rewards_limit_a_round():
    scenario = made(8, 32, rewards=[Draws(mean=0.5)], reward_workers=2)
    assert simulate(scenario, FREE).seconds == pytest.approx(1 + 32 * 0.5 / 2)
    costs = Costs(reward=0.5)
    joint = replace(scenario, rewards=[Draws(mean=0.0)], units_per_call=4)
    # eight at a time come, four go with each call
    assert simulate(joint, costs).seconds == pytest.approx(4 + 0.5)


def test_weights_reach_every_node_in_turn_or_along_a_tree():
    """8 nodes of one worker, 10 bytes over 1 byte a second."""
    net = Network(rate=1.0, workers_per_node=1, fanout=2, chunk=1.0)
    scenario = made(8, 8, weights=10.0, network=net)
    assert simulate(scenario, FREE).spread == pytest.approx(80.0)
    tree = replace(scenario, network=replace(net, how="tree"))
    # nodes 6 and 7 are in the third row: two chunks later
    assert simulate(tree, FREE).spread == pytest.approx(2 * (10 + 2))


def test_a_swarm_is_nearly_as_fast_as_one_link():
    """32 nodes with 64 chunks: no faster than what one node can take in, and far from in turn; a
    blind choice costs a factor."""
    net = Network(rate=1.0, workers_per_node=1, how="swarm", chunk=1.0)
    spread = simulate(made(32, 32, weights=64.0, network=net), FREE).spread
    assert 64 <= spread < 6 * 64
    whole = replace(net, chunk=64.0)
    assert simulate(made(32, 32, weights=64.0, network=whole), FREE).spread == pytest.approx(
        32 * 64
    )


def test_workers_of_a_node_share_its_weights():
    net = Network(rate=1.0, workers_per_node=4)
    outcome = simulate(made(8, 8, weights=10.0, network=net), FREE)
    assert outcome.spread == pytest.approx(20.0)
    assert outcome.seconds == pytest.approx(21.0)


def test_samples_pass_the_learners_link():
    scenario = made(10, 40, samples=2.0, network=Network(rate=5.0), rounds=3)
    # 80 bytes of a round at 5 a second; the first eighth is on its way after a second
    assert simulate(scenario, FREE).per_round == pytest.approx(16 + 1)
    assert efficiency(scenario, FREE) == pytest.approx(4 / 17)
    spread = simulate(replace(scenario, learners=4), FREE)
    assert spread.per_round == pytest.approx(1 + 4)


def test_one_machine_is_as_fast_as_its_cores():
    """20 units that need 0.3 s of CPU between them, on two cores."""
    costs = Costs(worker=0.1, reward=0.1, fetch=0.05, beside=0.05)
    outcome = simulate(made(20, 20, seconds=0.0, cores=2), costs)
    assert outcome.use["cores"] * outcome.seconds == pytest.approx(20 * 0.3 / 2)
    assert 3.0 <= outcome.seconds < 3.0 + 5 * 0.1  # the last ones follow one another


def test_draws_are_those_of_their_round_and_have_the_mean():
    draws = Draws(mean=2.0, spread=1.0, seed=4)
    assert draws.round(3, 50_000).mean() == pytest.approx(2.0, rel=0.03)
    assert (draws.round(3, 10) == draws.round(3, 50)[:10]).all()
    assert (draws.round(3, 10) != draws.round(4, 10)).all()
    assert (Draws(mean=2.0).round(1, 5) == 2.0).all()


def test_the_same_scenario_gives_the_same_outcome():
    scenario = made(20, 80, deaths=0.05, restart=3.0, rounds=3, max_staleness=1)
    scenario = replace(scenario, rollout=Draws(mean=1.0, spread=1.0))
    costs = Costs(order=0.001, call=0.002, answer=0.002, hop=0.001)
    assert simulate(scenario, costs) == simulate(scenario, costs)
    assert simulate(replace(scenario, seed=1), costs).rounds != simulate(scenario, costs).rounds
