"""A run folder of an earlier version goes on with the numbers that that version would have
given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from rlalign.cli import main
from rlalign.config import identity_of, load_begun, load_run
from rlalign.rewards.hpsv2 import HpsV2

EARLIER = Path(__file__).parent / "earlier_run"


@pytest.mark.promise
@pytest.mark.usefixtures("without_report")
def test_a_run_of_an_earlier_version_goes_on_as_it_would_have(tmp_path: Path) -> None:
    shutil.copytree(EARLIER, tmp_path / "run")
    assert main(["train", "--resume", str(tmp_path / "run"), "rounds=2", "--local"]) == 0
    line = json.loads(
        (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[1]
    )
    state = load_file(tmp_path / "run" / "checkpoints" / "round-00002" / "state.safetensors")
    weights = [tensor for name, tensor in state.items() if name.startswith("policy/")]
    line["policy/sum_of_squares"] = float(sum((tensor.double() ** 2).sum() for tensor in weights))
    expected = json.loads((EARLIER / "second_round.json").read_text(encoding="utf-8"))
    # bit for bit on the machine that wrote it; with 256 rows of zeros in T5's place the entropy
    # differs in the third figure
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_settings_that_came_later_are_as_they_were_before(tmp_path: Path) -> None:
    begun, anew = load_begun(EARLIER / "config.yaml"), load_run(EARLIER / "config.yaml")
    assert (begun.policy.t5_tokens, anew.policy.t5_tokens) == (0, 256)  # type: ignore[attr-defined]
    assert begun.policy.adapter == ""
    assert identity_of(begun) != identity_of(anew), "the default of today gives other numbers"
    assert load_begun(EARLIER / "config.yaml", ["policy.t5_tokens=256"]) == anew, (
        "what is said counts"
    )

    data = yaml.safe_load((EARLIER / "config.yaml").read_text(encoding="utf-8"))
    data["rewards"] = [{"name": "hpsv2", "weights": "w.safetensors"}]
    data["evaluate"]["rewards"] = [
        {"name": "hpsv2", "weights": "w.safetensors", "label": "clean", "antialias": False}
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    run = load_begun(tmp_path / "config.yaml")
    (trained,), (held_out,) = run.rewards, run.evaluate.rewards
    assert isinstance(trained, HpsV2)
    assert isinstance(held_out, HpsV2)
    assert (trained.antialias, held_out.antialias) == (True, False)
