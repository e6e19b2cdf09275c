"""Control and status files: merged, whole, forgotten at the start, and honest about a process that
is gone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlalign.alignment import control
from rlalign.cli import main
from rlalign.core.registry import UserError


def test_what_is_asked_adds_up(tmp_path: Path) -> None:
    assert control.asked(tmp_path) == control.Asked()
    control.ask(tmp_path, rollout_workers=4)
    control.ask(tmp_path, reward_workers={"jpeg": 2})
    assert control.asked(tmp_path) == control.Asked(rollout_workers=4, reward_workers={"jpeg": 2})
    control.ask(tmp_path, stop=True)
    assert control.asked(tmp_path).rollout_workers == 4
    control.forget(tmp_path)
    assert control.asked(tmp_path) == control.Asked()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"stop": "perhaps"}', '{"rollout_workers": 0}', '{"other": 1}', "\x00"]
)
def test_a_damaged_file_asks_for_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "control.json").write_text(text)
    assert control.asked(tmp_path) == control.Asked()


def test_status_tells_round_reward_and_time_left(tmp_path: Path) -> None:
    status = control.Status(tmp_path, 10, name="test")
    for number, seconds in enumerate((1.0, 2.0, 3.0), start=1):
        status.record(
            {
                "round": number,
                "staleness/max": 0,
                "reward/total/mean": 0.1 * number,
                "seconds/round": seconds,
                "seconds/reward/my judge": 0.6 * seconds,
                "seconds/reward/jpeg": 0.01 * seconds,
            }
        )
    found = control.status_of(tmp_path)
    assert (found["state"], found["round"], found["rounds"]) == ("running", 3, 10)
    assert found["reward"] == pytest.approx(0.3)
    assert found["eta_seconds"] == pytest.approx(7 * 2.0)
    assert found["reward_shares"] == {"my judge": pytest.approx(0.6), "jpeg": pytest.approx(0.01)}


def test_the_status_command_names_the_rewards_that_take_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = control.Status(tmp_path, 10, name="test")
    line = {"round": 1, "staleness/max": 0, "seconds/round": 5.0}
    shares = {"my judge": 3.0, "jpeg": 0.01, "ocr": 0.5}
    status.record(line | {f"seconds/reward/{title}": s for title, s in shares.items()})
    assert main(["status", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "slow rewards my judge 60 %, ocr 10 % of the last round" in said


def test_the_status_command_tells_nodes_and_their_hours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that has ended the hours alone are left, and the nodes that had to go; nothing is
    said of its workers."""
    kinds = [
        {"group": name, "market": market, "cpus": 4.0, "gpus": gpus, "hours": hours}
        for name, market, gpus, hours in (("", "", 0.0, 0.5), ("cards", "spot", 2.0, 1.25))
    ]
    hours = {"hours": 1.75, "cpu_hours": 7.0, "gpu_hours": 1.25}
    status = control.Status(tmp_path, 10, name="test")
    status.write(nodes={"used": 3, "draining": 1, "drained": 2, **hours, "kinds": kinds})
    pool = {"ready": 1, "starting": 0, "lost": 0, "wanted": 1, "busy": 0, "restarts": 0}
    status.write(pools={"rollout": pool})
    said = []
    for state in ("running", "stopped"):
        status.write(state=state)
        assert main(["status", str(tmp_path)]) == 0
        said.append(" ".join(capsys.readouterr().out.split()))
    assert "nodes 3 in use, 1 draining, 2 had to go so far" in said[0]
    assert "nodes 2 had to go so far" in said[1]
    assert "rollout workers 1 ready of 1" in said[0] and "workers" not in said[1]
    for one in said:
        assert "node hours 1.75 (4 CPU: 0.50; cards, spot, 4 CPU, 2 GPU: 1.25); 7.00 CPU" in one
        assert "7.00 CPU hours, 1.25 GPU hours" in one


def test_what_is_not_a_round_changes_nothing(tmp_path: Path) -> None:
    status = control.Status(tmp_path, 10, name="test")
    status.record({"note": "hello"})
    status.record({"evaluation": {"round": 0}})
    assert not (tmp_path / "status.json").exists()


def test_a_run_whose_process_is_gone_is_lost(tmp_path: Path) -> None:
    code = """
import pathlib, sys
from rlalign.alignment.control import Status

Status(pathlib.Path(sys.argv[1]), 5).write(state="running")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert control.status_of(tmp_path)["state"] == "lost"


def test_one_on_another_machine_is_lost_when_it_is_silent(tmp_path: Path) -> None:
    status = control.Status(tmp_path, 5)
    status.write(state="running", host="elsewhere")
    assert control.status_of(tmp_path)["state"] == "running"
    found = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**found, "updated": found["updated"] - 60}))
    assert control.status_of(tmp_path)["state"] == "lost"


def test_no_status_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="has no status.json; name the folder of a run that was started"
    ):
        control.status_of(tmp_path)
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        control.status_of(tmp_path)


def test_reading_a_status_waits_for_no_torch() -> None:
    code = (
        "import sys, rlalign.alignment.control, rlalign.cli.operate, rlalign.runtime.jobs.runs; "
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
