"""The whole of alignment: produce, score, make a batch, learn. One loop, in one process or on a cluster.

    order(units, weights) --> [ rollout -> rewards ] --> gather
              ^                                            |  Scored, in unit order
              |  weights, version                          v
           learner.update  <-----------------  algorithm.make_batch

``Collect`` is the only thing that differs: ``LocalCollect`` computes units on threads of this process,
``rlalign.runtime`` has one that asks a cluster. Round r uses weights that are at most ``max_staleness`` rounds old; no round
is ordered ahead across a checkpoint, so the schedule is the same for a run that was stopped and resumed.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlalign import checkpoint, evaluate
from rlalign.advantages import PromptStatistics
from rlalign.collect import Collect, LocalCollect
from rlalign.config import Run, dump, identity_of
from rlalign.learner import Learner, Weights
from rlalign.metrics import Recorder
from rlalign.policies.base import Policy
from rlalign.records import Scored, StepBatch
from rlalign.registry import UserError

OnRecord = Callable[[dict[str, Any]], None]


def align(run: Run, folder: Path, collect: Collect, learner: Learner, on_record: OnRecord) -> None:
    """Runs (or goes on with) a run until its last round, then evaluates, exports and reports."""
    with checkpoint.exclusive(folder) if learner.is_main else contextlib.nullcontext():
        alignment = _Alignment(run, folder, collect, learner, on_record)
        alignment.resume()
        while alignment.done < run.rounds:
            alignment.one_round()
        alignment.finish()


def train_local(run: Run, folder: Path, *, resume: bool, on_record: OnRecord) -> None:
    """A run in this process. ``resume`` is the caller's word that ``folder`` may already hold one."""
    assert resume or not (folder / "checkpoints").exists()
    torch.set_num_threads(run.runtime.learner_threads)
    collect = LocalCollect(run)
    align(run, folder, collect, build_learner(run), on_record)


def build_learner(run: Run) -> Learner:
    """The learner of a run, on this process's device."""
    policy = run.policy.load(run.runtime.device)
    check_plan(run, policy)
    return Learner(policy, run.algorithm.loss, run.learner, seed=run.seed, threads=run.runtime.learner_threads)


def check_plan(run: Run, policy: Policy) -> None:
    """Refuses a plan that leaves a policy-gradient algorithm without a single stochastic step, or a rule of another path."""
    from rlalign.diffusion.paths import RectifiedFlow
    from rlalign.diffusion.steps import is_stochastic

    if run.plan.rule.startswith("flow_") and not isinstance(policy.path, RectifiedFlow):
        raise UserError(
            f"plan.rule {run.plan.rule!r} needs a flow model, and {run.policy.name!r} is not one; use ddim or ddpm"
        )
    levels = policy.path.levels(run.plan.steps)
    stochastic = is_stochastic(policy.path, levels, rule=run.plan.rule, eta=run.plan.eta)
    if run.algorithm.eats == "steps" and not bool(stochastic.any()):
        raise UserError(
            f"plan.eta must be > 0 for {run.algorithm.name}, got {run.plan.eta}: no step would have a density"
        )


class _Alignment:
    """The state of a run between rounds."""

    def __init__(self, run: Run, folder: Path, collect: Collect, learner: Learner, on_record: OnRecord) -> None:
        self.run, self.folder, self.collect, self.learner, self.on_record = run, folder, collect, learner, on_record
        self.statistics = PromptStatistics()
        self.done = 0
        self.counts = {"samples": 0, "denoiser_calls": 0, "reward_queries": 0}
        self.tickets: deque[tuple[int, int]] = deque()
        self.ordered = 0
        self.shown: tuple[tuple[str, int], list[Scored]] = (("", -1), [])
        self.recorder: Recorder | None = None
        self.identity = identity_of(run)

    def resume(self) -> None:
        """Takes up the newest checkpoint, or starts with the base model's evaluation."""
        found = checkpoint.latest(self.folder, run_identity=self.identity)
        if found is not None:
            self.learner.load_state_dict(found.tensors)
            self.statistics.load_state_dict(found.facts["statistics"])
            self.counts = dict(found.facts["counts"])
            self.done = self.ordered = found.round
        if self.learner.is_main:
            with checkpoint.disk_errors(self.folder):
                checkpoint.write_text(self.folder / "config.yaml", dump(self.run))
                self.recorder = Recorder(self.folder, self.done if found else -1)
        if self.done == 0:
            self.evaluate(self.learner.base_weights())

    def one_round(self) -> None:
        """Gathers the next round, learns from it, and starts what may start."""
        start = time.monotonic()
        sync = self.order_ahead()
        ticket, version = self.tickets.popleft()
        scored = self.collect.gather(ticket)
        gathered = time.monotonic()
        batch = self.run.algorithm.make_batch(scored, self.statistics)
        assert isinstance(batch, StepBatch), type(batch)
        staleness = self.done - self.rounds_learned(version)
        learned = self.learner.update(batch, round=self.done + 1)
        self.check_ratio(learned, staleness)
        self.done += 1
        updated = time.monotonic()
        waited = gathered - start - sync
        seconds = {"sync": sync, "update": updated - gathered, "round": updated - start}
        self.record(scored, learned, staleness, waited, seconds)
        # a checkpoint comes after everything that its round writes: what it does not cover is written again on resume
        if self.due(self.run.evaluate.every):
            self.evaluate(self.learner.weights_to_show())
        if self.due(self.run.checkpoint.every):
            self.save()

    def due(self, every: int) -> bool:
        """Whether something that happens every so many rounds, and after the last one, happens now (0: only then)."""
        return self.done == self.run.rounds or (every > 0 and self.done % every == 0)

    def order_ahead(self) -> float:
        """Orders every round that may start under the current weights. Returns the seconds it took to publish them."""
        run, start = self.run, time.monotonic()
        barrier = (self.done // run.checkpoint.every + 1) * run.checkpoint.every
        last = min(self.done + 1 + run.runtime.max_staleness, barrier, run.rounds)
        if self.ordered < last:
            weights = self.learner.weights()
            for round in range(self.ordered + 1, last + 1):
                ticket = self.collect.order(run.prompts.units(run.seed, round, run.plan), weights)
                self.tickets.append((ticket, weights.version))
            self.ordered = last
        return time.monotonic() - start

    def rounds_learned(self, version: int) -> int:
        """How many rounds a policy version has seen."""
        return version // (self.run.learner.updates_per_round * self.run.learner.epochs)

    def check_ratio(self, learned: Mapping[str, float], staleness: int) -> None:
        """Refuses to go on when the first batch of an on-policy run replays to other numbers than it was made with."""
        limit, found = self.run.algorithm.ratio_limit, learned.get("ratio/first_update", 0.0)
        if limit is not None and staleness == 0 and found > limit:
            raise UserError(
                f"max|ratio - 1| before the first update must be <= {limit:g} (a tenth of the clip range), got {found:g}; "
                "give rollout and learner the same device and threads, set learner.steps_per_pass to 1, or widen the clip range"
            )

    def record(
        self,
        scored: Sequence[Scored],
        learned: Mapping[str, float],
        staleness: int,
        waited: float,
        seconds: Mapping[str, float],
    ) -> None:
        """Writes the metrics line of a round."""
        titles = [r.title for r in self.run.rewards]
        samples = sum(len(s.unit.prompts) for s in scored)
        self.counts["samples"] += samples
        self.counts["denoiser_calls"] += samples * self.run.plan.steps
        self.counts["reward_queries"] += samples * len(titles)
        work = {phase: sum(s.seconds.get(phase, 0.0) for s in scored) for phase in ("rollout", "reward")}
        share = waited / max(sum(work.values()), 1e-9)
        line: dict[str, Any] = {"round": self.done, "policy_version": self.learner.version, **self.counts}
        for title, value_B in [("total", _joined(s.total_B for s in scored))] + [
            (t, _joined(s.raw[t] for s in scored)) for t in titles
        ]:
            line[f"reward/{title}/mean"] = float(np.nanmean(value_B)) if np.isfinite(value_B).any() else float("nan")
            line[f"reward/{title}/std"] = float(np.nanstd(value_B)) if np.isfinite(value_B).any() else float("nan")
        line["samples_dropped"] = int(sum((~s.kept_B).sum() for s in scored))
        line.update(learned)
        line["staleness/max"] = staleness
        line.update(self.collect.facts())
        line.update({f"seconds/{p}": work[p] * share for p in work} | {f"seconds/{p}": s for p, s in seconds.items()})
        if self.recorder is not None:
            with checkpoint.disk_errors(self.folder):
                self.recorder.write(line)
            self.on_record(line)

    def save(self) -> None:
        """A checkpoint of this round."""
        if not self.learner.is_main:
            return
        checkpoint.save(
            self.folder,
            checkpoint.Checkpoint(
                round=self.done,
                tensors=self.learner.state_dict(),
                facts={"statistics": self.statistics.state_dict(), "counts": self.counts},
            ),
            run_identity=self.identity,
            keep=self.run.checkpoint.keep,
        )

    def sample_fixed(self, weights: Weights) -> list[Scored]:
        """The evaluation's prompts and noise under these weights."""
        run = self.run
        units = evaluate.evaluation_units(
            run.prompts.held_out(run.evaluate.prompts), run.plan, run.evaluate.seed, run.samples_per_unit
        )
        return self.collect.gather(self.collect.order(units, weights))

    def evaluate(self, weights: Weights) -> None:
        """Samples the fixed prompts, writes the grid and a line of evaluations.jsonl."""
        start = time.monotonic()
        scored = self.sample_fixed(weights)
        if self.recorder is not None:
            summary = evaluate.summarise(scored, self.trained, self.held_out)
            line = {"round": self.done, **summary, "seconds": time.monotonic() - start}
            with checkpoint.disk_errors(self.folder):
                self.recorder.write_evaluation(line)
                evaluate.write_samples(self.folder, self.done, scored, self.run.evaluate.grid)
            self.on_record({"evaluation": line})
        self.shown = (weights.tag, scored)

    @property
    def trained(self) -> list[str]:
        return [r.title for r in self.run.rewards]

    @property
    def held_out(self) -> list[str]:
        return [r.title for r in self.run.evaluate.rewards]

    def finish(self) -> None:
        """Base and aligned on the same prompts and noise, the exported policy, and the report."""
        aligned_weights = self.learner.weights_to_show()
        base = self.sample_fixed(self.learner.base_weights())
        aligned = self.shown[1] if self.shown[0] == aligned_weights.tag else self.sample_fixed(aligned_weights)
        if self.recorder is None:
            return
        from rlalign.report import write_report

        policy = self.learner.policy
        policy.set_weights(dict(aligned_weights.tensors))
        result = evaluate.compare(base, aligned, self.trained, self.held_out)
        result["round"] = self.done
        result["kl/per_step_gaussian"] = evaluate.kl_to_reference(policy, aligned)
        with checkpoint.disk_errors(self.folder):
            evaluate.write_json(self.folder / "evaluation.json", result)
            policy.save(self.folder / "policy")
            self.recorder.close()
            write_report(self.folder)


def _joined(parts: Any) -> np.ndarray:
    return np.concatenate(list(parts))
