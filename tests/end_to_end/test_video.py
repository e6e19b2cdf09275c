"""The run files of clips: kills and resuming change nothing; the slow ones learn as they should."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rlalign.alignment.loop import train_local
from rlalign.config import Run, load_run
from rlalign.learning import checkpoint
from rlalign.runtime import train_on_ray
from tests.processes import first_of, process_of
from tests.runs import CONFIGS, assert_same_run, quiet

SMALL = (
    "plan.steps=4",
    "plan.window=2",
    "prompts.per_round=2",
    "prompts.samples_per_prompt=4",
    "prompts.per_unit=1",
    "evaluate.prompts=2",
    "evaluate.every=1",
    "evaluate.grid=2",
    "checkpoint.every=1",
    "runtime.rollout.workers=2",
)


def small(rounds: int) -> Run:
    return load_run(CONFIGS / "tiny_video_grpo.yaml", [*SMALL, f"rounds={rounds}"])


@pytest.mark.slow
@pytest.mark.ray
def test_kills_and_resuming_change_nothing(tmp_path: Path) -> None:
    """Three rounds in one process; two there and the third as a resumed run; and on Ray, where a
    rollout worker is killed after the first and the learner after the second."""
    train_local(small(3), tmp_path / "whole", resume=False, on_record=quiet)
    train_local(small(2), tmp_path / "resumed", resume=False, on_record=quiet)
    train_local(small(3), tmp_path / "resumed", resume=True, on_record=quiet)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")

    folder = tmp_path / "killed"
    victims = {1: "rollout", 2: "learner"}

    def disturb(line: dict[str, Any]) -> None:
        victim = victims.pop(line.get("round", 0), None)
        if victim is None:
            return
        process = checkpoint.writer(folder) if victim == "learner" else process_of(first_of(victim))
        assert process is not None
        os.kill(process, signal.SIGKILL)

    train_on_ray(small(3), folder, resume=False, on_record=disturb)
    assert not victims, f"never killed: {victims}"
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_more_of_what_held_out_captions_say_happens(seed: int, tmp_path: Path) -> None:
    """docs/video.md has the gains of the three seeds; clips move no less than before."""
    run = load_run(CONFIGS / "tiny_video_grpo.yaml", [f"seed={seed}", "evaluate.every=0"])
    train_local(run, tmp_path / "run", resume=False, on_record=quiet)
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8"))
    base, gain = result["base"], result["gain"]
    assert base["reward/motion/mean"] < 0.7
    assert gain["reward/motion/mean"] >= 0.10
    assert gain["held_out/dynamic_degree/mean"] >= -0.05 * base["held_out/dynamic_degree/mean"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smoothness_alone_freezes_clips_and_the_guard_stops_it(tmp_path: Path) -> None:
    """At least half of the dynamic degree is lost without the guard, at most a tenth with it."""
    kept = {}
    for name, more in (("free", ["guard.limits=[]"]), ("guarded", [])):
        run = load_run(CONFIGS / "tiny_video_frozen.yaml", more)
        train_local(run, tmp_path / name, resume=False, on_record=quiet)
        result = json.loads((tmp_path / name / "evaluation.json").read_text(encoding="utf-8"))
        moved = "held_out/dynamic_degree/mean"
        kept[name] = 1.0 + result["gain"][moved] / result["base"][moved]
    assert kept["free"] <= 0.5
    assert kept["guarded"] >= 0.9
