"""A process that logs three rounds to one sink: what tests of sinks start, so that what a package
keeps in its home, its settings and its threads end with it.

    python -m tests.sinks.logged FOLDER SINK_AS_JSON RESUME_AT
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from rlalign.core.pictures import write_grid
from rlalign.core.registry import build
from rlalign.learning.log import Log
from rlalign.sinks.base import Origin

SETTINGS = {"name": "trial", "plan": {"steps": 10}, "rewards": [{"name": "shapes", "weight": 1.0}]}


def main(folder: Path, sink: Mapping[str, Any], resume_at: int) -> None:
    """Logs, and prints what a user would be told as JSON."""
    origin = Origin(folder=folder, name="trial", settings=SETTINGS, resume_at=resume_at)
    # a tracker's tables are made when they are made
    log = Log([build("sinks", sink)], origin, patience=3600.0)
    for round in (1, 2, 3):
        log.write({"round": round, "reward/total/mean": 0.25 * round, "missing": float("nan")})
    for file in ("config.yaml", "report.html"):
        (folder / file).write_text(file, encoding="utf-8")
        log.keep(folder / file)
    (folder / "samples").mkdir(exist_ok=True)
    media = np.zeros((2, 1, 3, 16, 16), dtype=np.uint8)
    for name in ("round-00003.png", "round-00003-changes.png"):
        write_grid(folder / "samples" / name, media, ["a", "b"], [0.0, 1.0])
        log.show(3, folder / "samples" / name)
    clips = np.zeros((2, 3, 3, 16, 16), dtype=np.uint8)
    clips[:, 1:] = 200
    write_grid(folder / "samples" / "round-00004.png", clips, ["a", "b"], [0.0, 1.0])
    log.show(4, folder / "samples" / "round-00004.png")
    log.close(ended=True)
    print("told:", json.dumps(log.take_notes()))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How such a process ended."""

    told: list[str]
    said: str
    """All that it printed."""
    arguments: set[str]
    """The command lines of the processes that it started, and its own."""


def log_rounds(
    folder: Path, sink: Mapping[str, Any], *, resume_at: int = -1, **environment: str
) -> Outcome:
    """Runs ``main`` in a process with a home of its own and these variables."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_"))}
    command = [sys.executable, "-m", "tests.sinks.logged", str(folder), json.dumps(sink)]
    process = psutil.Popen(
        [*command, str(resume_at)],
        env={**kept, "HOME": str(home), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen: set[str] = set()
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(process.pid, seen, over))
    watch.start()
    said, _ = process.communicate()
    over.set()
    watch.join()
    assert process.returncode == 0, said
    told = [line for line in said.splitlines() if line.startswith("told: ")]
    return Outcome(told=json.loads(told[0].removeprefix("told: ")), said=said, arguments=seen)


def _watch(number: int, seen: set[str], over: threading.Event) -> None:
    while not over.wait(0.05):
        try:
            root = psutil.Process(number)
            for one in [root, *root.children(recursive=True)]:
                seen.add(" ".join(one.cmdline()))
        except psutil.Error:  # it has ended meanwhile
            continue


def files_with(words: Sequence[str], *folders: Path) -> list[Path]:
    """Files that hold one of the words."""
    wanted = [word.encode() for word in words]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(word in path.read_bytes() for word in wanted)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
