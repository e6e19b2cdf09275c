"""What a run does round by round, and what it holds between two rounds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rlalign.algorithms.base import Memory
from rlalign.alignment import control, costs, cursors
from rlalign.alignment.assemble import differentiable_scorer, preference_pairs
from rlalign.alignment.collect import Collect
from rlalign.config import Run, dump, identity_of, plain_identity_of
from rlalign.core.batches import Batch, DifferentiableScorer, PairBatch, PromptBatch
from rlalign.core.files import write_whole
from rlalign.core.progress import Tell
from rlalign.core.records import Scored, Unit, Weights
from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import write_pairs
from rlalign.data.pairs.reader import Pairing
from rlalign.learning import checkpoint, evaluate
from rlalign.learning.guard import Guard
from rlalign.learning.learner import Learner
from rlalign.learning.metrics import Recorder

OnRecord = Callable[[dict[str, Any]], None]
KL = "kl/per_step_gaussian"
TELL_SECONDS = 1.0
"""Between two reports of how much of the work at hand is done."""


class _Shown(NamedTuple):
    """An evaluation: of which weights, what was sampled, what was measured."""

    tag: tuple[str, int]
    scored: list[Scored]
    summary: Mapping[str, float]
    kl: float = 0.0
    """From the pretrained weights; known to the process that writes."""

    def without_samples(self) -> _Shown:
        """The scores alone: what is kept until the end of a run."""
        bare = [replace(one, trajectory=None, media_BFCHW=None) for one in self.scored]
        return self._replace(scored=bare)


class Alignment:
    """The state of a run between rounds."""

    def __init__(
        self, run: Run, folder: Path, collect: Collect, learner: Learner, on_record: OnRecord
    ) -> None:
        # who takes part
        self.run = run
        self.folder = folder
        self.collect = collect
        self.learner = learner
        self.on_record = on_record
        # what a checkpoint restores
        self.memory = Memory()
        self.guard = Guard(run.guard)
        self.done = 0
        self.counts = costs.NONE.copy()
        # what is ordered and not yet learned from
        # (ticket, rounds that its weights had learned)
        self.tickets: deque[tuple[int, int]] = deque()
        self.ordered = 0
        self.shown = _Shown(("", -1), [], {})
        self.base: _Shown | None = None
        self.recorder: Recorder | None = None
        self.identity = identity_of(run)
        self.pairs: Pairing | None = None
        self.scorer: DifferentiableScorer | None = None
        if run.algorithm.eats.sampled_by_loss:
            self.scorer = differentiable_scorer(run, learner.policy.device)
        self.asked_to_stop = False
        self.began = self.told = time.monotonic()

    def resume(self) -> None:
        """Takes up the newest checkpoint, or starts with the base model's evaluation."""
        found = checkpoint.latest(
            self.folder, run_identity=self.identity, older=plain_identity_of(self.run)
        )
        if found is not None:
            self.learner.load_state_dict(found.tensors)
            self.memory.load(found.facts["memory"], found.tensors)
            self.guard.load(found.facts["guard"])
            self.learner.scale_rate(self.guard.rate)
            self.counts = dict(found.facts["counts"])
            self.done = self.ordered = found.round
        cursors.resume(self.pairs, self.folder, {} if found is None else found.facts)
        if self.learner.is_main:
            with checkpoint.disk_errors(self.folder):
                write_whole(self.folder / "config.yaml", dump(self.run))
                self.recorder = Recorder(self.folder, self.done if found else -1)
        if self.done == 0:
            self.evaluate(self.learner.base_weights())
            self.base = self.shown.without_samples()

    def has_pairs(self) -> bool:
        """Waits until there is what the next round learns from; false where the run is asked to
        stop meanwhile."""
        if self.pairs is None or not self.pairs.grows:
            return True
        ready = cursors.wait(
            self.pairs, self.done, self.folder, self.learner.accelerator, self.on_record
        )
        self.asked_to_stop = not ready
        if self.asked_to_stop and self.done:
            self.save()
        return ready

    def one_round(self) -> None:
        """Gathers the next round, learns from it, and starts what may start."""
        start = time.monotonic()
        version = self.learner.version
        sync = self.order_ahead()
        scored = list[Scored]()
        staleness = 0
        if self.run.rolls_out:
            ticket, made_in = self.tickets.popleft()
            scored = self.collect.gather(ticket, self.telling("units", round=self.done + 1))
            staleness = self.done - made_in
        gathered = time.monotonic()
        batch = self.batch(scored)
        telling = self.telling("updates", round=self.done + 1)
        learned = self.learner.update(batch, round=self.done + 1, tell=telling)
        self.write_pairs(scored)
        self.check_ratio(learned, staleness)
        self.done += 1
        updated = time.monotonic()
        costs.add(self.counts, self.run, learned, updates=self.learner.version - version)
        waited = gathered - start - sync
        seconds = {"sync": sync, "update": updated - gathered, "round": updated - start}
        self.record(scored, learned, staleness, waited, seconds)
        # a checkpoint comes after everything that its round writes: what it does not cover is
        # written again on resume
        if self.due(self.run.evaluate.every):
            self.evaluate(self.learner.weights_to_show())
        # a stop waits for rounds that were ordered ahead, which is until the next checkpoint at
        # most: a run that goes on from here orders under the same weights as one that was never
        # stopped
        may_stop = not self.tickets and self.done < self.run.rounds
        self.asked_to_stop = may_stop and control.stop_agreed(self.folder, self.learner.accelerator)
        if self.due(self.run.checkpoint.every) or self.guard.stopped or self.asked_to_stop:
            self.save()

    @property
    def goes_on(self) -> bool:
        """Whether there is another round to do."""
        return self.done < self.run.rounds and not self.guard.stopped and not self.asked_to_stop

    def units(self, round: int) -> list[Unit]:
        """A round's units of work."""
        return self.run.prompts.units(self.run.seed, round, self.run.plan)

    def batch(self, scored: Sequence[Scored]) -> Batch:
        """What the next round learns from: its scored samples, a set of preferences, or prompts
        alone."""
        algorithm = self.run.algorithm
        if self.scorer is not None:
            return PromptBatch(units=tuple(self.units(self.done + 1)), scorer=self.scorer)
        if self.pairs is not None:
            pairs = preference_pairs(self.pairs, self.done, self.run.plan)
            return PairBatch(pairs=tuple(pairs), draws=algorithm.times_noised)
        return algorithm.make_batch(scored, self.memory)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many rounds, and after the last one, happens now
        (0: only then)."""
        return self.done == self.run.rounds or (every > 0 and self.done % every == 0)

    def write_pairs(self, scored: Sequence[Scored]) -> None:
        """The round's samples as a set of preferences, where that is asked for."""
        if not self.run.write_pairs or not self.learner.is_main:
            return
        from rlalign.data.pairs.ranking import pairs_of

        path = self.folder / "preferences" / f"round-{self.done + 1:05d}.parquet"
        rows = list(pairs_of(scored, self.run.write_pairs))
        if rows:
            with checkpoint.disk_errors(self.folder):
                write_pairs(path, rows)

    def order_ahead(self) -> float:
        """Orders every round that may start under the current weights. Returns the seconds it took
        to publish them."""
        run = self.run
        start = time.monotonic()
        barrier = (self.done // run.checkpoint.every + 1) * run.checkpoint.every
        last = min(self.done + 1 + run.runtime.max_staleness, barrier, run.rounds)
        if self.ordered < last and run.rolls_out:
            weights = self.learner.weights()
            for round in range(self.ordered + 1, last + 1):
                self.tickets.append((self.collect.order(self.units(round), weights), self.done))
            self.ordered = last
        return time.monotonic() - start

    def check_ratio(self, learned: Mapping[str, float], staleness: int) -> None:
        """Refuses to go on when the first batch of an on-policy run replays to other numbers than
        it was made with."""
        algorithm = self.run.algorithm
        found = learned.get("ratio/first_update", 0.0)
        limit = algorithm.ratio_limit(self.done + 1)
        if limit is not None and staleness == 0 and found > limit:
            raise UserError(
                f"max|ratio - 1| before the first update must be <= {limit:g} (a tenth of the clip"
                f" range), got {found:g}; give rollout and learner the same device and threads, set"
                " learner.steps_per_pass to 1, or widen the clip range"
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
        # samples so far by the rounds that their policy lagged behind: a histogram
        if scored:
            behind = f"staleness/samples_{staleness}_behind"
            self.counts[behind] = self.counts.get(behind, 0) + self.run.samples_per_round
        # the time that was waited for, shared out by who worked how long
        work = {"rollout": 0.0, "reward": 0.0}
        for one in scored:
            for phase in work:
                work[phase] += one.seconds.get(phase, 0.0)
        share = waited / max(sum(work.values()), 1e-9)
        # the line, in the order of the columns
        line: dict[str, Any] = {
            "round": self.done,
            "policy_version": self.learner.version,
            **self.counts,
        }
        line.update(evaluate.round_facts(scored, self.trained))
        line.update(learned)
        if self.pairs is not None:
            line.update(self.pairs.measures(self.done - 1))
        line["staleness/max"] = staleness
        line.update(self.collect.facts())
        line.update(
            {f"seconds/{p}": work[p] * share for p in work}
            | {f"seconds/{p}": s for p, s in seconds.items()}
        )
        if self.recorder is not None:
            with checkpoint.disk_errors(self.folder):
                self.recorder.write(line)
            self.on_record(line)

    def telling(self, what: str, *, round: int) -> Tell:
        """Reports how much of the work at hand is done (round 0: of an evaluation): every
        TELL_SECONDS, in a long run less often, as a cluster's coordinator keeps what is
        reported."""
        start = time.monotonic()

        def tell(done: int, of: int) -> None:
            now = time.monotonic()
            pause = TELL_SECONDS * min(10.0, max(1.0, (now - self.began) / 300))
            if self.recorder is None or now - self.told < pause:
                return
            self.told = now
            facts = {"round": round, "what": what, "done": done, "of": of, "seconds": now - start}
            self.on_record({"progress": facts})

        return tell

    def save(self) -> None:
        """A checkpoint of this round."""
        if not self.learner.is_main:
            return
        checkpoint.save(
            self.folder,
            checkpoint.Checkpoint(
                round=self.done,
                tensors={**self.learner.state_dict(), **self.memory.tensors()},
                facts={
                    "memory": self.memory.facts(),
                    "guard": self.guard.facts(),
                    "counts": self.counts,
                    **cursors.facts(self.pairs),
                },
            ),
            run_identity=self.identity,
            keep=self.run.checkpoint.keep,
        )

    def sample_fixed(self, weights: Weights) -> list[Scored]:
        """The evaluation's prompts and noise under these weights."""
        run = self.run
        units = evaluate.evaluation_units(
            run.prompts.held_out(run.evaluate.prompts),
            run.plan,
            run.evaluate.seed,
            run.samples_per_unit,
        )
        ticket = self.collect.order(units, weights)
        return self.collect.gather(ticket, self.telling("units", round=0))

    def evaluate(self, weights: Weights) -> None:
        """Samples the fixed prompts, writes the grid and a line of evaluations.jsonl."""
        start = time.monotonic()
        self.shown = self.measure(weights)
        # one process writes what is measured
        if self.recorder is not None:
            line = {"round": self.done, **self.shown.summary, KL: self.shown.kl}
            line["seconds"] = time.monotonic() - start
            with checkpoint.disk_errors(self.folder):
                self.recorder.write_evaluation(line)
                evaluate.write_samples(
                    self.folder, self.done, self.shown.scored, self.run.evaluate.grid
                )
            self.on_record({"evaluation": line})
        # every process knows the verdict
        verdict = self.guard.observe(self.done, self.shown.summary)
        self.learner.scale_rate(self.guard.rate)
        if verdict:
            self.on_record({"note": verdict})

    def measure(self, weights: Weights, *, distance: bool = True) -> _Shown:
        """The fixed prompts under these weights; how far they are from the pretrained ones, where
        that is asked for."""
        scored = self.sample_fixed(weights)
        summary = evaluate.summarise(scored, self.trained, self.held_out)
        asked = distance and self.recorder is not None
        kl = self.learner.kl_to_pretrained(weights, scored) if asked else 0.0
        return _Shown(weights.tag, scored, summary, kl)

    @property
    def trained(self) -> list[str]:
        return [r.title for r in self.run.rewards]

    @property
    def held_out(self) -> list[str]:
        return [r.title for r in self.run.evaluate.rewards]

    def finish(self) -> None:
        """Base and aligned on the same prompts and noise, the exported policy, and the report."""
        # both ends of the run, sampled and measured unless they have been
        aligned_weights = self.learner.weights_to_show()
        base = self.base or self.measure(self.learner.base_weights(), distance=False)
        if self.shown.tag != aligned_weights.tag:
            self.shown = self.measure(aligned_weights)
        if self.recorder is None:
            return
        from rlalign.report import write_report

        # compared, exported and reported by one process
        policy = self.learner.policy
        policy.set_weights(dict(aligned_weights.tensors))
        result = evaluate.compare(
            base.scored, self.shown.scored, self.trained, self.held_out, before=base.summary
        )
        result["round"] = self.done
        if self.guard.stopped:
            result["stopped"] = self.guard.reason
        result[KL] = self.shown.kl
        with checkpoint.disk_errors(self.folder):
            evaluate.write_json(self.folder / "evaluation.json", result)
            policy.save(self.folder / "policy")
            self.recorder.close()
            write_report(self.folder)
