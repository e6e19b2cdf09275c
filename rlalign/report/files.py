"""A run folder, as far as the run has come."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rlalign.learning.log import hide_secrets
from rlalign.learning.metrics import read_lines

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run folder holds, as far as it has come."""

    folder: Path
    settings: str
    """The text of config.yaml without passwords; empty where it is missing."""
    config: Mapping[str, Any]
    rounds: Sequence[Record]
    evaluations: Sequence[Record]
    final: Record | None
    """evaluation.json, if it is of the last round."""

    @property
    def done(self) -> int:
        """The last round that was learned."""
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    @property
    def trained(self) -> list[str]:
        """Titles of the rewards that the run trained on."""
        keys = dict.fromkeys(chain(*self.rounds[:1], *self.evaluations[:1]))
        titles = [k.split("/")[1] for k in keys if k.startswith("reward/") and k.endswith("/mean")]
        return [t for t in dict.fromkeys(titles) if t != "total"]

    @property
    def held_out(self) -> list[str]:
        """Titles of the rewards that were only measured."""
        keys = self.evaluations[0] if self.evaluations else {}
        return [k.split("/")[1] for k in keys if k.startswith("held_out/") and k.endswith("/mean")]


def read_run(folder: Path) -> RunFiles:
    """The files of a run folder; what is missing is empty."""
    import yaml

    settings = folder / "config.yaml"
    final = folder / "evaluation.json"
    text = settings.read_text(encoding="utf-8") if settings.is_file() else ""
    rounds = read_lines(folder / "metrics.jsonl")
    evaluations = read_lines(folder / "evaluations.jsonl")
    found = json.loads(final.read_text(encoding="utf-8")) if final.is_file() else None
    if found is not None and rounds and found["round"] != rounds[-1]["round"]:
        # the run was extended and has not come to its new end
        found = None
    return RunFiles(
        folder=folder,
        settings=hide_secrets(text),
        config=yaml.safe_load(text) or {},
        rounds=rounds,
        evaluations=evaluations,
        final=found,
    )
