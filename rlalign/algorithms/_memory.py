"""What an algorithm remembers from round to round: reward statistics per prompt, and earlier
transitions to replay.

It is part of a checkpoint: tensors and JSON-able facts, no pickles.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch

from rlalign.algorithms._advantages import PromptStatistics
from rlalign.core.batches import StepBatch
from rlalign.core.prompts import Prompt, record_of
from rlalign.core.records import Plan, Unit, UnitKey

_FIELDS = ("latents", "log_prob", "stochastic", "advantage", "reward")


class Memory:
    """A run's memory, handed to ``Algorithm.make_batch``, which may change it."""

    def __init__(self) -> None:
        self._statistics: dict[str, PromptStatistics] = {}
        self._earlier: deque[StepBatch] = deque()

    def statistics_of(self, title: str) -> PromptStatistics:
        """The running statistics of a reward, or of the "total"."""
        return self._statistics.setdefault(title, PromptStatistics())

    def with_earlier(self, fresh: StepBatch, rounds: int) -> StepBatch:
        """The transitions of up to ``rounds`` earlier rounds, oldest first, then the fresh ones,
        which are remembered."""
        joined = [*self._earlier, fresh]
        self._earlier.append(fresh)
        while len(self._earlier) > rounds:
            self._earlier.popleft()
        columns: dict[str, Any] = {}
        for name in ("units", *_FIELDS):
            columns[name] = tuple(chain.from_iterable(vars(batch)[name] for batch in joined))
        return StepBatch(**columns)

    def facts(self) -> dict[str, Any]:
        """JSON-able: the statistics, and the units of the remembered transitions."""
        units = [list(map(_unit_facts, batch.units)) for batch in self._earlier]
        kept = {title: one.state_dict() for title, one in sorted(self._statistics.items())}
        return {
            "statistics": kept.pop("total", {}),
            "statistics_by_reward": kept,
            "earlier": units,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """The remembered transitions under ``memory/ROUND/UNIT/FIELD``."""
        found: dict[str, torch.Tensor] = {}
        for r, batch in enumerate(self._earlier):
            for name in _FIELDS:
                found |= {f"memory/{r}/{u}/{name}": t for u, t in enumerate(vars(batch)[name])}
        return found

    def load(self, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of ``facts`` and ``tensors``."""
        # checkpoints of before advantages might be taken of each reward have the total's alone
        kept = {"total": facts["statistics"], **facts.get("statistics_by_reward", {})}
        for title, state in kept.items():
            self.statistics_of(title).load_state_dict(state)
        self._earlier.clear()
        for r, units in enumerate(facts["earlier"]):
            columns: dict[str, Any] = {"units": tuple(map(_unit, units))}
            for name in _FIELDS:
                keys = (f"memory/{r}/{u}/{name}" for u in range(len(units)))
                columns[name] = tuple(tensors[key] for key in keys)
            self._earlier.append(StepBatch(**columns))


def _unit_facts(unit: Unit) -> dict[str, Any]:
    facts = {**asdict(unit), "key": list(unit.key), "plan": unit.plan.model_dump()}
    records = [dict(record_of(prompt)) for prompt in unit.prompts]
    return {**facts, "records": records} if any(records) else facts


def _unit(facts: Mapping[str, Any]) -> Unit:
    # units of plain prompts have no records, nor have checkpoints of before they were kept
    prompts = facts["prompts"]
    records = facts.get("records", [{}] * len(prompts))
    return Unit(
        key=UnitKey(*facts["key"]),
        prompts=tuple(Prompt(t, r) if r else t for t, r in zip(prompts, records, strict=True)),
        prompt_ids=tuple(facts["prompt_ids"]),
        sample_ids=tuple(facts["sample_ids"]),
        seed=facts["seed"],
        plan=Plan(**facts["plan"]),
    )
