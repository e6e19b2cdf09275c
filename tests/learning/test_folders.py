"""Folders of runs that never began: the same command begins again, and nobody's files are
touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlalign.alignment.loop import train_local
from rlalign.cli import main
from rlalign.config import dump, load_run
from rlalign.core.registry import UserError
from rlalign.learning import folders
from rlalign.learning.checkpoint import DRIVER_LOCK
from tests.runs import CONFIGS, assert_same_run, metrics, points_run

QUICKSTART = str(CONFIGS / "quickstart.yaml")
SETTINGS = [
    "rewards=[{name: jpeg}]",
    "evaluate.rewards=[]",
    "rounds=2",
    "evaluate.every=0",
    "checkpoint.every=5",
]
SETTINGS += [
    "write_pairs=best_and_worst",
    "plan.steps=2",
    "prompts.per_round=2",
    "evaluate.prompts=2",
]
SETTINGS += ["learner.shards=1", "runtime.rollout.workers=1"]


def run_file(folder: Path) -> str:
    """Two rounds that save nothing before their end."""
    file = folder / "run.yaml"
    file.write_text(dump(points_run(*SETTINGS)), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train_local(points_run(*SETTINGS), folder, resume=False, on_record=lambda _: None)
    return folder


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Any:
    """The one message of a command that ends with code 2."""

    def run(*arguments: str | Path) -> str:
        capfd.readouterr()
        assert main([str(a) for a in arguments]) == 2
        return capfd.readouterr().err.splitlines()[-1].removeprefix("error: ")

    return run


def all_of(folder: Path) -> list[str]:
    """What a folder holds, but for what depends on the clock."""
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    return sorted(name for name in found if not name.startswith("tensorboard"))


# training


@pytest.mark.promise
def test_every_mistake_may_be_mended_and_the_command_given_again(
    undisturbed: Path, tmp_path: Path, refused: Any
) -> None:
    folder, config = tmp_path / "run", run_file(tmp_path)
    where = ["--local", "--out", folder]
    mistakes = {
        f"prompts={{name: file, path: {tmp_path}/promtps.txt}}": "promtps.txt",
        f"policy.path={tmp_path}/tiyn": "tiyn",
        f"rewards=[{{name: bradley_terry, path: {tmp_path}/rewrad}}]": "rewrad",
        "plan.rule=flow_sde": "plan.rule",
    }
    for mistake, named in mistakes.items():
        assert named in refused("train", config, mistake, *where)
        # a path that is not there is refused before there is a folder
        assert ("never began" if folder.exists() else "has no config.yaml") in refused(
            "train", "--resume", folder, "--local"
        )
    assert main(["train", config, *map(str, where)]) == 0
    assert_same_run(folder, undisturbed)
    assert all_of(folder) == all_of(undisturbed)


def stop_at(what: str) -> Any:
    def on_record(line: dict[str, Any]) -> None:
        if what in line:
            raise KeyboardInterrupt

    return on_record


@pytest.mark.promise
def test_a_run_that_is_stopped_before_round_1_begins_again_or_goes_on(
    undisturbed: Path, tmp_path: Path
) -> None:
    """The first evaluation is written, under other settings; neither command is misled by it."""
    again, resumed = tmp_path / "again", tmp_path / "resumed"
    for folder, seed in ((again, "seed=7"), (resumed, "seed=0")):
        with pytest.raises(KeyboardInterrupt):
            train_local(
                points_run(*SETTINGS, seed), folder, resume=False, on_record=stop_at("evaluation")
            )
        assert {"config.yaml", "evaluations.jsonl", "samples/round-00000.png"} <= set(
            all_of(folder)
        )
        (folder / "preferences").mkdir()
        (folder / "preferences" / "round-00001.parquet").write_bytes(
            b"of a round that was not done"
        )
    assert main(["train", run_file(tmp_path), "--local", "--out", str(again)]) == 0
    assert main(["train", "--resume", str(resumed), "--local"]) == 0
    for folder in (again, resumed):
        assert_same_run(folder, undisturbed)
        assert all_of(folder) == all_of(undisturbed)
        for name in ("samples/round-00000.png", "preferences/round-00001.parquet"):
            assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


DEADLY = """
import os, signal
from pathlib import Path
from rlalign.rewards.jpeg import Jpeg

scorer, calls, at = Jpeg().load("cpu"), [], Path(__file__).with_name("dies-at")

def score(media, prompts):
    calls.append(len(prompts))
    if at.is_file() and len(calls) == int(at.read_text()):
        os.kill(os.getpid(), signal.SIGKILL)
    return scorer(media, prompts)
"""


@pytest.mark.promise
@pytest.mark.parametrize(("calls", "rounds"), [(2, 0), (4, 1)])
def test_kill_dash_nine_before_the_first_checkpoint(
    tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch, calls: int, rounds: int
) -> None:
    """One call is the first evaluation's, two are a round's."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "deadly.py").write_text(DEADLY)
    (tmp_path / "dies-at").write_text(str(calls))
    folder, config = tmp_path / "run", run_file(tmp_path)
    given = [config, "rewards=[{name: function, call: 'deadly:score'}]", "write_pairs=''"]
    command = [sys.executable, "-m", "rlalign", "train", *given, "--local", "--out", str(folder)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }
    killed = subprocess.run(command, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (tmp_path / "dies-at").unlink()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == rounds
    whole = tmp_path / "whole"
    assert main(["train", *given, "--local", "--out", str(whole)]) == 0
    if rounds:
        said = refused("train", *given, "--local", "--out", folder)
        assert said.startswith(
            f"{folder} is not empty; go on with: rlalign train --resume {folder}, or "
        )
        assert main(["train", "--resume", str(folder), "--local"]) == 0
    else:
        assert main(["train", *given, "--local", "--out", str(folder)]) == 0
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_ctrl_c_while_it_loads(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nprint('loading', flush=True)\ntime.sleep(600)\n"
    )
    folder = tmp_path / "run"
    reward = "rewards=[{name: function, call: 'slow:score'}]"
    command = [
        sys.executable,
        "-m",
        "rlalign",
        "train",
        run_file(tmp_path),
        reward,
        "--local",
        "--out",
        str(folder),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"loading\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert said.decode().endswith("stopped; no round was done, and the same command starts again\n")
    folders.refuse_for_new_run(folder)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_disk_that_is_full_before_round_1(tmp_path: Path, refused: Any) -> None:
    folder, config = tmp_path / "run", run_file(tmp_path)
    folder.mkdir()
    (folder / f".config.yaml.{os.getpid()}").symlink_to("/dev/full")
    said = refused("train", config, "--local", "--out", folder)
    assert said.endswith("No space left on device; mend that, then give the same command again")
    assert "never began" in refused("train", "--resume", folder, "--local")
    assert main(["train", config, "rounds=1", "--local", "--out", str(folder)]) == 0
    assert [line["round"] for line in metrics(folder)] == [1]


def test_a_folder_that_cannot_be(tmp_path: Path, refused: Any) -> None:
    config = run_file(tmp_path)
    assert "Not a directory" in refused("train", config, "--local", "--out", f"{config}/run")
    assert (
        "name too long"
        in refused("train", config, "--local", "--out", tmp_path / ("x" * 300)).lower()
    )


@pytest.mark.parametrize(
    "files",
    [
        {"config.yaml": "mine"},
        {"notes.txt": "mine"},
        {".driver": "1", "config.yaml": "", "notes.txt": "mine"},
        {".lock": "1", "config.yaml": "", "samples/mine.png": "mine"},
        {"status.json": '{"state": "mine"}'},
        {"status.json": "mine"},
        {"metrics.jsonl": "mine\n"},
        {".driver": "1", "policy/model_index.json": "mine"},
        {".driver": "1", "config.yaml": "", "checkpoints/round-00005/state.json": ""},
    ],
)
def test_what_somebody_else_has_written_stays(
    tmp_path: Path, refused: Any, files: dict[str, str]
) -> None:
    folder = tmp_path / "run"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    before = all_of(folder)
    assert refused("train", run_file(tmp_path), "--local", "--out", folder).startswith(
        f"{folder} is not empty; "
    )
    assert all_of(folder) == before
    assert {name: (folder / name).read_text(encoding="utf-8") for name in files} == files


def test_a_link_is_somebodys(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / DRIVER_LOCK).touch()
    (folder / "samples").symlink_to(elsewhere)
    assert not folders.never_began(folder)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {".driver": "", "status.json": "{}"},
        {
            ".lock": "12",
            "config.yaml": "",
            "metrics.jsonl": "",
            "tensorboard/events.out.tfevents.1.vm.2.0": "",
        },
        {"status.json": json.dumps({"state": "failed", "rounds": 3, "process": 7})},
        {
            ".driver": "1",
            "metrics.jsonl": '{"round": 1, "half',
            "checkpoints/.round-00001.7/state.json": "",
        },
        {".driver": "1", "control.json": '{"stop": true}', ".train/x/y": ""},
    ],
)
def test_what_a_run_leaves_before_its_first_round_is_as_good_as_nothing(
    tmp_path: Path, files: dict[str, str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    folders.refuse_for_new_run(folder)
    with folders.owned(folder, resume=False):
        left = [name for name in all_of(folder) if not name.startswith((".", "checkpoints/."))]
        assert left == []


def test_a_persons_own_config_is_not_resumed_over(tmp_path: Path, refused: Any) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    run_file(tmp_path)
    text = (tmp_path / "run.yaml").read_text(encoding="utf-8")
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    said = refused("train", "--resume", folder, "--local")
    assert said.endswith(
        f"only a config.yaml; start one with: rlalign train {folder}/config.yaml --out DIR"
    )
    assert (folder / "config.yaml").read_text(encoding="utf-8") == text


def test_a_run_that_has_begun_is_not_written_over(undisturbed: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds a run; go on with: rlalign train --resume"):
        train_local(points_run(*SETTINGS), undisturbed, resume=False, on_record=lambda _: None)
    assert (undisturbed / "metrics.jsonl").read_bytes() == before
    assert load_run(undisturbed / "config.yaml") == points_run(*SETTINGS)


# folders that are written at the end


def test_all_or_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with pytest.raises(FileNotFoundError), folders.all_or_nothing(folder) as unfinished:
        (unfinished / "a").write_text((unfinished / "b").read_text())
    assert not folder.exists()
    with folders.all_or_nothing(folder) as unfinished:
        (unfinished / "a").write_text("1")
        (unfinished / "in").mkdir()
        (unfinished / "in" / "b").write_text("2")
        folders.refuse_what_is_there(folder, "what is unfinished is hidden")
    with folders.all_or_nothing(folder) as unfinished:
        (unfinished / "in").mkdir()
        (unfinished / "in" / "c").write_text("3")
    assert all_of(folder) == ["a", "in/b", "in/c"]


@pytest.mark.slow
def test_what_a_killed_process_left_unfinished_is_swept(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from rlalign.learning.folders import all_or_nothing\n"
        "with all_or_nothing(Path(sys.argv[1])) as unfinished:\n"
        "    (unfinished / 'big').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    folders.refuse_what_is_there(tmp_path / "out", "hidden")
    with folders.all_or_nothing(tmp_path / "out") as unfinished:
        (unfinished / "small").write_text("y")
    assert all_of(tmp_path / "out") == ["small"]


# sampling, fitting, pretraining


SAMPLE = """
name: some
policy: {name: tiny}
plan: {steps: 2, eta: 1.0}
prompts: {name: list, prompts: [a red circle]}
pictures: 1
rewards: [{name: function, call: "moody:score"}]
sampler: {name: best_of_n, n: 2}
"""


def test_a_sampling_whose_scores_fail_leaves_what_it_has_and_starts_again(
    tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "from pathlib import Path\n\ndef score(media, prompts):\n"
    text += "    assert not Path(__file__).with_name('down').exists(), 'no server answers'\n"
    text += "    return media.reshape(len(media), -1).mean(1) / 255\n"
    (tmp_path / "moody.py").write_text(text)
    (tmp_path / "down").touch()
    folder, config = tmp_path / "out", tmp_path / "sample.yaml"
    config.write_text(SAMPLE)
    command = ["sample", str(config), "--local", "--out", str(folder)]
    assert "No such file" in refused(
        *command, f"prompts={{name: file, path: {tmp_path}/nowhere.txt}}"
    )
    assert not folder.exists()
    said = refused(*command)
    assert "no server answers" in said
    assert f"the pictures so far are in {folder}/so-far (so-far.png)" in said
    assert all_of(folder) == ["so-far/so-far.png"]
    (tmp_path / "down").unlink()
    assert main(command) == 0
    assert {"config.yaml", "pictures/00000.png", "report.html", "sample.json"} <= set(
        all_of(folder)
    )
    assert not (folder / "so-far").exists()
    assert refused(*command) == f"{folder} is not empty; name another with --out DIR"


def test_so_far_of_somebody_else_stays(tmp_path: Path, refused: Any) -> None:
    folder, config = tmp_path / "out", tmp_path / "sample.yaml"
    config.write_text(SAMPLE.replace('function, call: "moody:score"', "jpeg"))
    (folder / "so-far").mkdir(parents=True)
    (folder / "so-far" / "mine.png").touch()
    assert refused("sample", config, "--local", "--out", folder).startswith(
        f"{folder} is not empty"
    )


@pytest.mark.parametrize(
    ("command", "text", "mistake"),
    [
        ("fit-reward", "seed: 0\npreferences: {path: nowhere.parquet}\n", "nowhere.parquet"),
        ("pretrain", "seed: 0\nimages: 8\nautoencoder: {source: ./nowhere}\n", "nowhere"),
    ],
)
def test_a_mistake_leaves_no_folder(
    tmp_path: Path, refused: Any, command: str, text: str, mistake: str
) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    for _ in range(2):
        assert mistake in refused(command, tmp_path / "settings.yaml", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
