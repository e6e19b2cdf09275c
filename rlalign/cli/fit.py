"""``rlalign fit-reward``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from rlalign.cli.common import OutFolder, Overrides, exit_when_stopped, file_argument


def fit_reward(
    config: Annotated[Path, file_argument("A fit-reward file.")],
    overrides: Overrides = None,
    out: OutFolder = None,
) -> None:
    """Fit a Bradley-Terry reward on preference pairs. The same command goes on with a run that was
    stopped."""
    from rlalign.config import load_settings
    from rlalign.fitting.reward import FitReward
    from rlalign.fitting.reward import fit_reward as fit
    from rlalign.learning.folders import refuse_what_is_there

    more = [f"out={json.dumps(str(out))}"] if out is not None else []
    settings = load_settings(FitReward, config, [*(overrides or []), *more])
    # a run that was stopped has left one of these, and is gone on with
    own = ("checkpoints", "pairs.parquet", "pairs.json")
    if not any((settings.out / name).exists() for name in own):
        refuse_what_is_there(settings.out, "name another with --out DIR")
    with exit_when_stopped("stopped; the same command goes on"):
        folder = fit(settings)
    facts = json.loads((settings.out / "fit.json").read_text(encoding="utf-8"))
    print(
        f"held-out pairs: the winner has the higher score in {100 * facts['accuracy']:.1f} %"
        f" (standard error {100 * facts['standard_error']:.1f}) of {facts['decided']} pairs of"
        f" {facts['prompts']} prompts"
    )
    print(f"reward: {folder}\nreport: {settings.out / 'fit.html'}")
