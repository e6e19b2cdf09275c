"""What a run does round by round, and what it holds between two rounds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rlalign.algorithms.base import Memory
from rlalign.alignment import control, costs, cursors
from rlalign.alignment._constraints import apply_constraints
from rlalign.alignment._display import Display, OnRecord
from rlalign.alignment.assemble import differentiable_scorer, preference_pairs
from rlalign.alignment.collect import Collect
from rlalign.alignment.refit import Refit
from rlalign.config import Run, dump, identity_of, plain_identity_of
from rlalign.core.batches import Batch, DifferentiableScorer, PairBatch, PromptBatch
from rlalign.core.files import replacing, write_whole
from rlalign.core.progress import Tell
from rlalign.core.records import Scored, Unit, Weights
from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import write_pairs
from rlalign.data.pairs.reader import Pairing
from rlalign.learning import checkpoint, evaluate
from rlalign.learning.guard import Guard
from rlalign.learning.learner import Learner
from rlalign.learning.reward_facts import reward_facts

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
        self.display: Display | None = None
        """Of the one process that writes."""
        self.identity = identity_of(run)
        self.pairs: Pairing | None = None
        self.refit = Refit(run, folder) if run.refit is not None else None
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
            self.follow_guard()
            self.counts = dict(found.facts["counts"])
            self.done = self.ordered = found.round
        cursors.resume(self.votes, self.folder, {} if found is None else found.facts)
        if self.learner.is_main:
            with checkpoint.disk_errors(self.folder):
                write_whole(self.folder / "config.yaml", dump(self.run))
                resume_at = self.done if found else -1
                self.display = Display(self.run, self.folder, self.on_record, resume_at)
        if self.done == 0:
            self.evaluate(self.learner.base_weights())
            self.base = self.shown.without_samples()

    @property
    def votes(self) -> Pairing | None:
        """The pairs that rounds, or the fits of the reward, learn from."""
        return self.pairs if self.refit is None else self.refit.votes

    def has_pairs(self) -> bool:
        """Waits until there is what the next round learns from; false where the run is asked to
        stop meanwhile."""
        if self.votes is None or not self.votes.grows:
            return True
        number = self.done if self.refit is None else self.refit.number(self.done)
        ready = cursors.wait(
            self.votes, number, self.folder, self.learner.accelerator, self.on_record
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
        ruled = apply_constraints(self.run.rewards, self.run.combine, scored)
        batch = self.batch(ruled)
        telling = self.telling("updates", round=self.done + 1)
        learned = self.learner.update(batch, round=self.done + 1, tell=telling)
        self.write_pairs(ruled)
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
            reward = self.reward_weights(self.done)
            for round in range(self.ordered + 1, last + 1):
                ticket = self.collect.order(self.units(round), weights, reward)
                self.tickets.append((ticket, self.done))
            self.ordered = last
        return time.monotonic() - start

    def reward_weights(self, round: int) -> Weights | None:
        """Those of the reward that scores the round after ``round``, at the process that orders;
        -1 means before the first. None where no reward is fitted anew."""
        if self.refit is None or not self.learner.is_main:
            return None
        tell = self.telling("updates of the reward", round=self.done + 1)
        return self.refit.weights(self.refit.number(round), tell)

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
            for phase, spent in one.seconds.items():
                work[phase] = work.get(phase, 0.0) + spent
        share = waited / max(work["rollout"] + work["reward"], 1e-9)
        # the line, in the order of the columns
        line: dict[str, Any] = {
            "round": self.done,
            "policy_version": self.learner.version,
            **self.counts,
        }
        line.update(evaluate.round_facts(scored, self.trained))
        line.update(reward_facts(scored, self.run.rewards))
        line.update(learned)
        if self.refit is not None:
            line.update(self.refit.measures(self.refit.number(self.done - 1 - staleness)))
        elif self.pairs is not None:
            line.update(self.pairs.measures(self.done - 1))
        line["staleness/max"] = staleness
        line.update(self.collect.facts())
        line.update(
            {f"seconds/{p}": work[p] * share for p in work}
            | {f"seconds/{p}": s for p, s in seconds.items()}
        )
        if self.display is not None:
            self.display.write_round(line)

    def telling(self, what: str, *, round: int) -> Tell:
        """Reports how much of the work at hand is done (round 0: of an evaluation): every
        TELL_SECONDS, in a long run less often, as a cluster's coordinator keeps what is
        reported."""
        start = time.monotonic()

        def tell(done: int, of: int) -> None:
            now = time.monotonic()
            pause = TELL_SECONDS * min(10.0, max(1.0, (now - self.began) / 300))
            if self.display is None or now - self.told < pause:
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
                    **cursors.facts(self.votes),
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
        ticket = self.collect.order(units, weights, self.reward_weights(self.done - 1))
        return self.collect.gather(ticket, self.telling("units", round=0))

    def evaluate(self, weights: Weights) -> None:
        """Samples the fixed prompts, writes the grid and a line of evaluations.jsonl."""
        start = time.monotonic()
        self.shown = self.measure(weights)
        # one process writes what is measured
        if self.display is not None:
            self.display.show(self.done, self.shown.scored)
            line = {"round": self.done, **self.shown.summary, KL: self.shown.kl}
            self.display.write_evaluation({**line, "seconds": time.monotonic() - start})
        # every process knows the verdict
        found = control.agreed({**self.shown.summary, KL: self.shown.kl}, self.learner.accelerator)
        verdict = self.guard.observe(self.done, found)
        self.follow_guard()
        if verdict:
            self.on_record({"note": verdict})

    def follow_guard(self) -> None:
        """Learns at the rate and with the KL weight that the guard asks for."""
        self.learner.scale_rate(self.guard.rate)
        if self.guard.kl != 1.0:
            algorithm: Any = self.run.algorithm
            weight = algorithm.kl_weight * self.guard.kl
            self.learner.loss = algorithm.model_copy(update={"kl_weight": weight}).loss

    def measure(self, weights: Weights, *, distance: bool = True) -> _Shown:
        """The fixed prompts under these weights; how far they are from the pretrained ones, where
        that is asked for."""
        scored = self.sample_fixed(weights)
        summary = evaluate.summarise(scored, self.trained, self.held_out, self.run.evaluate.by)
        asked = distance and (self.display is not None or self.learner.policy.is_spread)
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
        # (a reward that was fitted anew has other weights than when it scored the base)
        base = self.base if self.refit is None else None
        base = base or self.measure(self.learner.base_weights(), distance=False)
        if self.shown.tag != aligned_weights.tag:
            self.shown = self.measure(aligned_weights)
        if self.display is None:
            return

        # compared, exported and reported by one process
        policy = self.learner.policy
        policy.set_weights(dict(aligned_weights.tensors))
        by = self.run.evaluate.by
        result = evaluate.compare(
            base.scored, self.shown.scored, self.trained, self.held_out, by, before=base.summary
        )
        result["round"] = self.done
        if self.guard.stopped:
            result["stopped"] = self.guard.reason
        result[KL] = self.shown.kl
        with checkpoint.disk_errors(self.folder), replacing(self.folder / "policy") as scratch:
            policy.save(scratch)
        self.display.finish(result)

    def close(self) -> None:
        """Closes what is written to, where the run did not come to its end."""
        if self.display is not None:
            self.display.close(ended=False)
