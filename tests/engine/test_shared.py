"""One policy for pieces on two threads: what of a piece is done while another asks the policy, and
that no number changes. Pieces meet by events, and would hang where they do not overlap; ``LIMIT``
only bounds a failure."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlalign.core.records import Plan, Unit
from rlalign.diffusion.condition import Condition, Words
from rlalign.diffusion.rollout import rollout
from rlalign.engine.local import LiveRewards, LocalEngine, do_and_count
from rlalign.engine.pieces import Look, Rollout, Score
from rlalign.engine.shared import SharedPolicy, read_words
from rlalign.policies.base import OWN_SIZE
from tests.engine.test_pieces import rewards
from tests.toy import PROMPTS, ToyFamily, ToyPolicy, make_units

LIMIT = 60.0
STEPS = 5


class Meeting(ToyFamily):
    """The toy whose denoiser goes on only when something else has been done, and which says what it
    was asked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.read: dict[str, threading.Event] = {prompt: threading.Event() for prompt in PROMPTS}
        self.until = threading.Event()
        self.asked = threading.Event()

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        for prompt in prompts:
            self.read[prompt].set()
        return super().encode(prompts, plan)

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        self.asked.set()
        assert self.until.wait(LIMIT), "nothing else was done meanwhile"
        return super().predict(x, timestep_B, words)


class MeetingPolicy(ToyPolicy):
    kind = Meeting


def meeting() -> tuple[MeetingPolicy, Meeting]:
    policy = MeetingPolicy()
    assert isinstance(policy.family, Meeting)
    return policy, policy.family


def pieces() -> list[Unit]:
    """Two units of one prompt each."""
    first, second = make_units(2, per_unit=1)
    assert first.prompts != second.prompts
    return [first, second]


def assert_same(found: Any, unit: Unit) -> None:
    """Bit for bit a rollout of one thread alone."""
    trajectory, samples = found
    expected, media = rollout(ToyPolicy(), unit, 0)
    np.testing.assert_array_equal(trajectory.latents_BK1, expected.latents_BK1)
    np.testing.assert_array_equal(trajectory.log_prob_BK, expected.log_prob_BK)
    np.testing.assert_array_equal(samples["media"], media)


def test_the_next_words_are_read_while_the_denoiser_is_asked() -> None:
    policy, family = meeting()
    family.until = family.read[pieces()[1].prompts[0]]
    engine = LocalEngine.with_lanes(policy, rewards, workers=1, rows=4, seats=2)
    units = pieces()
    done = engine.perform([Rollout(unit=unit, version=0) for unit in units])
    for one, unit in zip(done, units, strict=True):
        assert_same(one.value, unit)
        # each piece counts its own calls, on one network
        assert one.cost.denoiser_calls == STEPS


class Waiting(LiveRewards):
    """Rewards that answer the first question only when the denoiser is asked for another piece."""

    until = threading.Event()

    def score_arrays(self, samples: Any, prompts: Sequence[str], **how: Any) -> Any:
        scores = super().score_arrays(samples, prompts, **how)
        assert self.until.wait(LIMIT), "the next piece was not made meanwhile"
        return scores


def test_the_next_piece_is_made_while_one_waits_for_its_score() -> None:
    """With one worker; values and costs are those of one piece after the other."""
    units = pieces()
    latents = [torch.full((1, 2, 1, 1), 0.3), torch.full((1, 2, 1, 1), -0.7)]
    policy, family = meeting()
    family.until.set()
    made = rewards()

    def waiting() -> LiveRewards:
        found = Waiting(made._rewards, made._held_out, made._scorers, strict=True)
        found.until = family.asked
        return found

    # the first asks for a score alone, the second asks the denoiser
    works = [
        Score(unit=units[0], x=latents[0], k=STEPS),
        Look(unit=units[1], x=latents[1], k=1, score=True),
    ]
    overlapped = LocalEngine.with_lanes(policy, waiting, workers=1, rows=4, seats=2)
    found = overlapped.perform(works)
    alone = LocalEngine(ToyPolicy(), [rewards()], rows=4, parallel=False).perform(works)
    np.testing.assert_array_equal(found[0].value.total_B, alone[0].value.total_B)
    np.testing.assert_array_equal(found[1].value.total_B, alone[1].value.total_B)
    assert torch.equal(found[1].value.clean, alone[1].value.clean)
    for mine, other in zip(found, alone, strict=True):
        assert mine.cost.reward_queries == other.cost.reward_queries == 1
        assert mine.cost.denoiser_calls == other.cost.denoiser_calls


def test_a_gradient_keeps_the_policy_until_it_has_gone_through_it() -> None:
    """Two graphs at once would take twice the memory."""
    shared = SharedPolicy(ToyPolicy(), [rewards(), rewards()])
    with shared.seat() as (policy, own, turn):
        turn.take()
        clean = torch.zeros(1, 2, 1, 1)
        with torch.no_grad():
            own.scores(policy.show(clean, own.spaces()), ["a red circle"])
        assert not holds(shared, turn), "a score without a gradient keeps nobody waiting"
        policy.decode(clean)
        assert holds(shared, turn), "who asks the policy has its turn"
        with torch.enable_grad():
            own.scores(policy.show(clean, own.spaces()), ["a red circle"])
        assert holds(shared, turn)


def holds(shared: SharedPolicy, turn: Any) -> bool:
    return shared._turns._holder is turn


def test_a_piece_is_never_done_under_the_weights_of_another() -> None:
    """One that was begun under older weights and waits for a score is ended before newer ones are
    put in place; bit for bit rollouts of each."""
    newer = ToyPolicy(seed=5).weights()
    policy = ToyPolicy()
    shared = SharedPolicy(policy, [LiveRewards(()), LiveRewards(())])
    first, second = pieces()
    begun = threading.Event()
    wants = threading.Event()
    made: dict[str, Any] = {}

    def under_older() -> None:
        with shared.seat("v1") as (own, asked, turn):
            turn.take()
            made["half"] = do_and_count(Rollout(unit=first, version=0), own, asked).value
            turn.give()
            begun.set()
            assert wants.wait(LIMIT)
            made["older"] = do_and_count(Rollout(unit=first, version=0), own, asked).value

    def under_newer() -> None:
        assert begun.wait(LIMIT)
        with shared.seat("v2") as (own, asked, turn):
            read_words(Rollout(unit=second, version=1), own)
            wants.set()
            turn.take()
            own.set_weights(newer)
            made["newer"] = do_and_count(Rollout(unit=second, version=1), own, asked).value

    threads = [threading.Thread(target=one) for one in (under_older, under_newer)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert_same(made["half"], first)
    assert_same(made["older"], first)
    expected, _ = rollout(ToyPolicy(seed=5), second, 1)
    np.testing.assert_array_equal(made["newer"][0].latents_BK1, expected.latents_BK1)


def test_a_copy_in_another_precision_is_shared_and_counted_by_who_asks() -> None:
    policy = ToyPolicy()
    other = policy.beside()
    exact = policy.in_precision(torch.float64)
    mine = other.in_precision(torch.float64)
    assert mine.network is exact.network
    x = torch.zeros(3, 2, 1, 1, dtype=torch.float64)
    condition = policy.encode(PROMPTS[:3]).to(dtype=torch.float64)
    mine.denoise(x, policy.path.levels(5)[1], condition, 1.0)
    assert (policy.meter.calls, other.meter.calls) == (0, 3)
    other.set_weights(ToyPolicy(seed=5).weights())
    assert policy.in_precision(torch.float64).network is not exact.network
