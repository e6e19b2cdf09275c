"""What a run has cost so far: samples, denoiser calls, reward queries."""

from __future__ import annotations

from collections.abc import Mapping

from rlalign.config import Run

NONE = {"samples": 0, "denoiser_calls": 0, "reward_queries": 0}


def add(counts: dict[str, int], run: Run, learned: Mapping[str, float], *, updates: int) -> None:
    """Adds a round to ``counts``; nothing where the run learns from a set of preferences.

    A denoiser call is one sample of one pass, so guidance makes two. Sampling alone counts, except
    where the algorithm samples by itself: then its updates' calls are the sampling.
    """
    if not run.samples_itself:
        return
    samples = run.samples_per_round
    plan = run.plan
    counts["samples"] += samples
    if run.rolls_out:
        counts["denoiser_calls"] += samples * plan.steps * run.policy.calls_per_look(plan)
        counts["reward_queries"] += samples * len(run.rewards)
    else:
        counts["denoiser_calls"] += round(learned["update_calls"] * updates)
        counts["reward_queries"] += (
            samples * run.learner.epochs * run.algorithm.times_noised * len(run.rewards)
        )
