"""Runs whose prompts are encoded by an actor."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rlalign.alignment.loop import train_local
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.runtime import train_on_ray
from tests.policies.family_runs import PATHS, run_of
from tests.processes import first_of, process_of
from tests.runs import assert_same_run, quiet

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_on_it_is_the_run_with_text_encoders(
    killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the local run, undisturbed and with the encoder killed after the first
    evaluation."""
    monkeypatch.setattr("rlalign.report.write_report", quiet)
    write_pipeline(tmp_path / "flux", FAMILIES["flux"], seed=1)
    policy = {"name": "flux", "path": str(tmp_path / "flux"), "text_tokens": 16}
    here = run_of(policy, PATHS["flow"], {"name": "grpo"})
    train_local(here, tmp_path / "here", resume=False, on_record=quiet)
    seen: list[int] = []

    def kill_once(record: dict[str, Any]) -> None:
        if killed and not seen and "evaluation" in record:
            seen.append(process_of(first_of("encoder")))
            os.kill(seen[0], signal.SIGKILL)

    run = run_of({**policy, "embeddings": "actor"}, PATHS["flow"], {"name": "grpo"})
    train_on_ray(run, tmp_path / "ray", resume=False, on_record=kill_once)
    assert bool(seen) == killed
    assert_same_run(tmp_path / "here", tmp_path / "ray")
