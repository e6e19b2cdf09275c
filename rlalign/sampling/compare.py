"""The method and its baselines on one engine: same prompts, same noise, every reward, every
cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlalign.alignment.models import ready_policy
from rlalign.alignment.words import encoding_reader
from rlalign.core.locations import locate
from rlalign.core.media import as_arrays
from rlalign.core.records import MEDIA, Unit
from rlalign.core.registry import UserError, build
from rlalign.diffusion.paths import NoisePath, RectifiedFlow
from rlalign.diffusion.rollout import schedule_of
from rlalign.engine import Engine, NoScore, Rewards, Scores, Work, join_scores
from rlalign.engine.local import LiveRewards, LocalEngine
from rlalign.learning.folders import all_or_nothing
from rlalign.networks.devices import usable
from rlalign.policies.base import Policy
from rlalign.samplers.base import BACKWARD, Sampler
from rlalign.sampling.outcome import Outcome
from rlalign.sampling.output import prepare, remove_so_far, write_outputs, write_so_far
from rlalign.sampling.settings import Sample

OnRecord = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Develop(Work):
    """Pictures of clean latents, and, where asked for, all their scores."""

    x: torch.Tensor
    score: bool = True

    @torch.no_grad()
    def do(self, policy: Policy, rewards: Rewards) -> tuple[np.ndarray, Scores | None]:
        wanted = rewards.spaces(held_out=True) if self.score else MEDIA
        samples = as_arrays(policy.show(self.x.to(policy.device), wanted | MEDIA))
        found = None
        if self.score:
            found = rewards.score_arrays(samples, self.unit.prompts, held_out=True)
        return samples["media"], found


def develop(engine: Engine, unit: Unit, x: torch.Tensor) -> tuple[np.ndarray, Scores]:
    """(uint8 media, all scores) of clean latents."""
    done: list[tuple[np.ndarray, Scores]] = engine.each(
        unit, lambda some, cut: Develop(unit=some, x=x[cut])
    )
    return np.concatenate([m for m, _ in done]), join_scores([s for _, s in done])


def run_sample(sample: Sample, folder: Path, engine: Engine, on_record: OnRecord) -> dict[str, Any]:
    """The method, and its baselines where they are asked for; writes the folder and returns what
    sample.json holds."""
    check(sample, engine.path)
    remove_so_far(folder)
    outcomes: list[Outcome] = []
    with all_or_nothing(folder) as unfinished:
        prepare(sample, unfinished)
        try:
            chosen = _outcome(sample, engine, "method", sample.method, on_record)
            outcomes = [chosen]
            for title, sampler in _baselines(sample, chosen):
                outcomes.append(_outcome(sample, engine, title, sampler, on_record))
        except NoScore as error:
            said = f"; the last one said: {engine.reason}" if engine.reason else ""
            saved = _save_so_far(sample, folder, engine, outcomes, error)
            raise UserError(f"{error}{said}; {saved}") from error
        return write_outputs(sample, unfinished, outcomes)


def _outcome(
    sample: Sample, engine: Engine, title: str, sampler: Sampler, on_record: OnRecord
) -> Outcome:
    before = engine.cost
    unit = sample.unit
    calls = sample.calls_per_look * sampler.looks(sample.plan)
    on_record({"note": f"{title}: {sampler.name}, about {calls} denoiser calls a picture"})
    found = sampler.sample(engine, unit)
    cost = engine.cost - before
    media_BFCHW, scores = develop(engine, unit, found.latents)
    outcome = Outcome(
        title=title, sampler=sampler, found=found, media_BFCHW=media_BFCHW, scores=scores, cost=cost
    )
    on_record({"outcome": outcome.summary(sample, None), "title": title, "cost": vars(cost)})
    return outcome


def _baselines(sample: Sample, chosen: Outcome) -> list[tuple[str, Sampler]]:
    """Plain sampling, and best-of-N for what the method took (a gradient through the denoiser
    counts as two calls)."""
    if not sample.compare:
        return []
    plain: Any = build("samplers", {"name": "plain"})
    best: Any = build("samplers", {"name": "best_of_n"})
    each = (chosen.cost.denoiser_calls + BACKWARD * chosen.cost.backward_calls) // sample.pictures
    wanted = [] if sample.sampler.name == "plain" else [("plain", plain)]
    per_look = sample.calls_per_look
    if sample.sampler.name != "best_of_n" and each >= 2 * plain.price(sample.plan, per_look):
        wanted.append(("best of N, same cost", best.within(each, sample.plan, per_look)))
    return wanted


def check(sample: Sample, path: NoisePath) -> None:
    """Refuses a plan that the policy of this path, or the method, cannot follow, and files that the
    method cannot use."""
    sample.sampler.check(sample.unit)
    plan = sample.plan
    flow = isinstance(path, RectifiedFlow)
    if plan.rule.startswith("flow_") and not flow:
        raise UserError(
            f"plan.rule {plan.rule!r} needs a flow model, and {sample.model.title!r} is not one;"
            " use ddim or ddpm"
        )
    stochastic_K = schedule_of(path, sample.unit).stochastic_K
    if (
        sample.sampler.needs_noise
        and not bool(stochastic_K.any())
        and not getattr(sample.sampler, "beta", 0.0)
    ):
        raise UserError(
            f"plan.eta must be > 0 for {sample.sampler.name}, got {plan.eta}: without noise it has"
            " nothing to choose"
        )


def _save_so_far(
    sample: Sample, folder: Path, engine: Engine, outcomes: list[Outcome], error: NoScore
) -> str:
    """What there is when no score comes any more."""
    media = [(o.title, o.media_BFCHW) for o in outcomes]
    if error.latents is not None:
        unit = sample.unit
        count = len(error.latents) // len(unit.prompts)
        first = error.latents[::count]
        done = engine.each(unit, lambda some, cut: Develop(unit=some, x=first[cut], score=False))
        media.append(("so far", np.concatenate([m for m, _ in done])))
    return write_so_far(sample, folder, media)


def sample_local(sample: Sample, folder: Path, on_record: OnRecord) -> dict[str, Any]:
    """In this process, on ``rollout.workers`` threads. Raises UserError where this machine does not
    have the device."""
    sample = locate(sample)
    runtime = sample.runtime
    device = usable(runtime.device, "runtime.device")
    reader = encoding_reader(sample.model.recipe, runtime)
    policy = ready_policy(sample.model, device, sample.interpolation, reader=reader)
    scorers = {
        r.title: r.load_scorer(runtime.reward_device) for r in sample.rewards_for("evaluate")
    }
    engine = LocalEngine.with_lanes(
        policy,
        lambda: LiveRewards(sample.rewards, sample.held_out, scorers),
        workers=runtime.rollout.workers,
        rows=sample.rows,
        threads=runtime.rollout.threads,
        seats=2,
    )
    return run_sample(sample, folder, engine, on_record)
