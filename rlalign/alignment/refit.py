"""The reward that a run fits anew on people's votes, between two rounds.

    votes up to a cursor --fit_reward--> weights --with the next order--> whoever scores

A fit starts from the folder that the reward's ``path`` names and takes all votes up to the cursor:
its weights follow from (run, cursor) alone, never from an earlier fit, and are those of ``rlalign
fit-reward`` with ``preferences.upto``. Fit number k scores what is ordered when k * every to
(k + 1) * every - 1 rounds are done, which without staleness are rounds k * every + 1 to
(k + 1) * every; what comes before the first round is scored by the reward as it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlalign.config import Run
from rlalign.core.progress import Tell
from rlalign.core.records import Weights
from rlalign.core.registry import UserError
from rlalign.data.pairs.growing import GrowingPairs
from rlalign.fitting.reward import FitReward, fit_reward
from rlalign.learning import checkpoint
from rlalign.networks.towers import CONFIG, WEIGHTS

FOLDER = "refits"
"""Of the run folder: a folder for each of the last fits, as ``fit-reward`` writes it."""


class Refit:
    """The fits of one run. ``votes`` decides which votes each of them sees."""

    def __init__(self, run: Run, folder: Path) -> None:
        assert run.refit is not None, "asked for"
        self.settings = run.refit
        self.votes = GrowingPairs(run.refit.preferences, run.seed, "fit")
        self._run = run
        self._folder = folder / FOLDER
        fitted = next(r.fitted for r in run.rewards if r.title == run.refit.reward)
        assert fitted is not None, "checked by the settings"
        self._start = fitted
        self._read: Weights | None = None

    def number(self, round: int) -> int:
        """Which fit scores what is ordered when ``round`` rounds are done."""
        return round // self.settings.every

    def weights(self, number: int, tell: Tell) -> Weights:
        """The reward's weights after fit ``number``, which is made where it is not there; before
        the first fit (-1) those that it starts from."""
        from safetensors.torch import load_file

        cursor = self.votes.cursors[number] if number >= 0 else 0
        if self._read is None or self._read.version != cursor:
            folder = self._start if number < 0 else self._fit(cursor, tell)
            self._read = Weights(
                version=cursor, kind=self.settings.reward, tensors=load_file(folder / WEIGHTS)
            )
        return self._read

    def measures(self, number: int) -> Mapping[str, float]:
        """What the metrics line says of the votes of a fit, and of the fit where it is here."""
        found = dict(self.votes.measures(number))
        file = self._out(self.votes.cursors[number]) / "fit.json"
        if file.is_file():
            facts = json.loads(file.read_text(encoding="utf-8"))
            found |= {f"refit/{key}": facts[key] for key in ("accuracy", "loss", "trained_on")}
        return found

    def _fit(self, cursor: int, tell: Tell) -> Path:
        """The folder of the reward that the votes up to ``cursor`` make."""
        out = self._out(cursor)
        reward = out / "reward"
        if not (reward / "reward.json").is_file():

            def report(stage: str, done: int, of: int, loss: float) -> None:
                tell(done, of)

            try:
                fit_reward(self.config(cursor), progress=report)
            except UserError as error:
                raise UserError(f"refit: {error}") from error

        # what the last fits need no more, and fits before them
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        kept = sorted(self._folder.iterdir())[-self._run.checkpoint.keep :]
        for other in self._folder.iterdir():
            if other not in (*kept, out):
                shutil.rmtree(other)
        return reward

    def _out(self, cursor: int) -> Path:
        return _fit_folder(self._folder, cursor)

    def config(self, cursor: int) -> FitReward:
        """The settings of ``rlalign fit-reward`` for the votes up to a cursor."""
        refit = self.settings
        runtime = self._run.runtime
        said: dict[str, Any] = {
            "seed": self._run.seed,
            "out": self._out(cursor),
            "device": runtime.device,
            "threads": runtime.learner.threads,
            "model": {
                "architecture": str(self._start / CONFIG),
                "pretrained": str(self._start / WEIGHTS),
            },
            "preferences": {**refit.preferences.model_dump(), "upto": cursor},
            "held_out": refit.held_out,
            "fit": refit.fit.model_dump(),
        }
        return FitReward.model_validate(said)


def last_weights(run: Run, folder: Path) -> Weights | None:
    """The weights of the reward as the last fit before a run's newest checkpoint has made them;
    None where the run's folder does not hold that fit."""
    from safetensors.torch import load_file

    assert run.refit is not None, "asked for"
    found = checkpoint.read_newest(folder)
    number = (found.round - 1) // run.refit.every
    cursor = int(found.facts["cursors"][number])
    file = _fit_folder(folder / FOLDER, cursor) / "reward" / WEIGHTS
    if not file.is_file():
        return None
    return Weights(version=cursor, kind=run.refit.reward, tensors=load_file(file))


def _fit_folder(folder: Path, cursor: int) -> Path:
    return folder / f"votes-{cursor:09d}"
