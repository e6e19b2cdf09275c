"""``rlalign fit-reward``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlalign.cli.train import STOPPED, refuse_what_is_there


def fit_reward(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A fit-reward file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder.", show_default=False)] = None,
) -> None:
    """Fit a Bradley-Terry reward on preference pairs. The same command goes on with a run that was stopped."""
    from rlalign.config import load_settings
    from rlalign.fit_reward import FitReward
    from rlalign.fit_reward import fit_reward as fit

    more = [f"out={json.dumps(str(out))}"] if out is not None else []
    settings = load_settings(FitReward, config, [*(overrides or []), *more])
    if not any((settings.out / made).exists() for made in ("checkpoints", "pairs.parquet", "pairs.json")):
        refuse_what_is_there(settings.out, "name another with --out DIR")
    try:
        folder = fit(settings)
    except KeyboardInterrupt as error:
        print("stopped; the same command goes on", file=sys.stderr)
        raise typer.Exit(STOPPED) from error
    found = json.loads((settings.out / "fit.json").read_text(encoding="utf-8"))
    print(
        f"held-out pairs: the winner has the higher score in {100 * found['accuracy']:.1f} % "
        f"(standard error {100 * found['standard_error']:.1f}) of {found['decided']} pairs of {found['prompts']} prompts"
    )
    print(f"reward: {folder}\nreport: {settings.out / 'fit.html'}")
