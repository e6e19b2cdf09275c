"""``rlalign rllib``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rlalign.cli.common import Overrides, exit_when_stopped, file_argument, folder_option


def rllib(
    config: Annotated[Path, file_argument("A run file.")],
    overrides: Overrides = None,
    runners: Annotated[
        int, typer.Option(min=0, help="RLlib's env runners; 0 samples in the learner's process.")
    ] = 0,
    out: Annotated[Path | None, folder_option("The folder; runs/NAME-rllib when left out.")] = None,
) -> None:
    """Train a run file by RLlib's PPO instead of rlalign's loop: a reference for small models.

    Denoising is the Gymnasium environment of rlalign/alignment/environment.py, the policy an
    RLModule; rounds, samples, learning rate, epochs and clip range are the run file's.
    """
    from rlalign.config import load_run
    from rlalign.learning.folders import never_began, owned, refuse_what_is_there
    from rlalign.runtime.cluster import prepare_environment

    # what can be refused is refused before Ray is started
    run = load_run(config, overrides or [])
    folder = out or Path("runs") / f"{run.name}-rllib"
    if not (folder.is_dir() and never_began(folder)):
        refuse_what_is_there(folder, "name another with --out DIR")
    prepare_environment(None)
    from rlalign.cli.train import summary
    from rlalign.runtime.rllib import train

    with exit_when_stopped("stopped"), owned(folder, resume=False):
        final = train(run, folder, _print_round, runners=runners)
    print(summary(final))
    print(f"policy: {folder / 'policy'}")


def _print_round(line: dict[str, Any]) -> None:
    if "round" in line:
        print(f"round {line['round']:>3}  reward {line['reward/total/mean']:+.4f}", flush=True)
