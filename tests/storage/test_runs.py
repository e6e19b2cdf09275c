"""Runs whose folder is on a real S3 server: the same numbers as in a folder, whatever happens to
the run, to the store or to a checkpoint."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rlalign
from rlalign.alignment.loop import train_local
from rlalign.cli import main
from rlalign.config import Run
from rlalign.core.registry import UserError
from rlalign.learning.folders import refuse_for_new_run
from rlalign.storage import folders, lease, session
from tests.runs import assert_same_run, final_tensors, points_run, quiet
from tests.stores import Bucket, Door, name_store

pytestmark = pytest.mark.usefixtures("often", "without_report")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    train_local(cheap_run(), folder, resume=False, on_record=quiet)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """The working folders of this machine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def find() -> list[Path]:
        return [one for place in tmp_path.glob("rlalign-*") for one in place.iterdir()]

    return find


def cheap_run() -> Run:
    """Four rounds in which there is little to compute."""
    few = ("learner.updates_per_round=1", "learner.shards=1", "runtime.rollout.workers=1")
    return points_run("rewards=[{name: centroid}]", *few)


def at_round(round: int, do: Callable[[], Any]) -> Callable[[dict[str, Any]], None]:
    """Does something when this round is over, once."""
    left = [round]

    def on_record(line: dict[str, Any]) -> None:
        if line.get("round") in left:
            left.clear()
            do()

    return on_record


def wait_for(found: Callable[[], Any]) -> None:
    while not found():
        time.sleep(0.01)


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


@pytest.mark.promise
def test_it_is_the_run_in_a_folder(
    bucket: Bucket, reference: Path, tmp_path: Path, home: Callable[[], list[Path]]
) -> None:
    url = bucket.url("runs/first")
    train_local(cheap_run(), url, resume=False, on_record=quiet)
    copied = bucket.copy_to("runs/first", tmp_path / "copied")
    assert_same_run(copied, reference)
    here = {p.relative_to(reference).as_posix() for p in reference.rglob("[!.]*") if p.is_file()}
    there = {key.removeprefix("runs/first/") for key in bucket.list()}
    events = re.compile("tensorboard/.*|report.html")
    assert {n for n in there if not events.match(n)} == {n for n in here if not events.match(n)}
    assert any(map(events.match, there))
    assert json.loads((copied / "status.json").read_text())["state"] == "ended"
    assert home() == []
    with pytest.raises(UserError, match=f"{url} holds a run; go on with: rlalign train --resume"):
        train_local(cheap_run(), url, resume=False, on_record=quiet)


@pytest.mark.promise
def test_commands_take_its_url(
    bucket: Bucket,
    reference: Path,
    tmp_path: Path,
    home: Callable[[], list[Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = bucket.url("runs/first")

    def stop() -> None:
        wait_for(lambda: "runs/first/status.json" in bucket.list())
        assert main(["scale", url, "--rollout", "2"]) == 2
        assert "has no workers to scale (yet)" in capsys.readouterr().err
        assert main(["stop", url, "--no-wait"]) == 0
        wait_for(lambda: any((one / "control.json").exists() for one in home()))

    train_local(cheap_run(), url, resume=False, on_record=at_round(1, stop))
    assert main(["status", url]) == 0
    assert re.search("points: stopped\n.* 1 of 4", capsys.readouterr().out)
    assert f"{url} is not running: its state is 'stopped'" in refused("stop", url, capsys=capsys)
    config = bucket.read("runs/first/config.yaml")
    (tmp_path / "run.yaml").write_bytes(config)
    mine = ("train", str(tmp_path / "run.yaml"), "--local", "--out", url)
    assert f"go on with: rlalign train --resume {url}" in refused(*mine, capsys=capsys)
    said = refused("train", "--resume", url, "--local", "seed=1", capsys=capsys)
    assert "seed must stay 0, got 1" in said
    said = refused("train", "--resume", bucket.url("none"), "--local", capsys=capsys)
    assert f"--resume must name a run folder, and '{bucket.url('none')}' has no config.yaml" in said

    assert main(["train", "--resume", url, "--local"]) == 0
    said = capsys.readouterr().out
    assert f"policy: {url}/policy" in said and f"report: {url}/report.html" in said
    copied = bucket.copy_to("runs/first", tmp_path / "copied")
    assert_same_run(copied, reference)

    assert main(["evaluate", url, "evaluate.prompts=2", "--out", str(tmp_path / "e")]) == 0
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["model"] == url
    policy = rlalign.load_policy(url).weights()
    trained = final_tensors(reference)
    assert all(torch.equal(policy[name], trained[f"policy/{name}"]) for name in policy)
    assert "--out must be a folder of this machine here" in refused(
        "evaluate", "tiny", "--out", url, capsys=capsys
    )


@pytest.mark.promise
def test_a_checkpoint_that_is_half_there_or_damaged(
    bucket: Bucket, reference: Path, tmp_path: Path
) -> None:
    url, last = bucket.url("run"), "run/checkpoints/round-00004"
    train_local(cheap_run(), url, resume=False, on_record=quiet)
    whole = bucket.read(f"{last}/state.safetensors")

    # damaged: it is named as a user calls it
    bucket.write(f"{last}/state.safetensors", whole[:-1])
    told = f"checkpoint s3://{bucket.name}/{last} is damaged: .*; delete s3://{bucket.name}/{last}"
    with pytest.raises(UserError, match=told):
        train_local(cheap_run(), url, resume=True, on_record=quiet)

    # half: as a writer that was killed leaves it, and the one before it is there
    bucket.delete(f"{last}/state.json")
    rounds: list[int] = []
    train_local(
        cheap_run(), url, resume=True, on_record=lambda line: rounds.append(line.get("round", 0))
    )
    assert [round for round in rounds if round] == [3, 4]
    assert bucket.read(f"{last}/state.safetensors") == whole
    assert_same_run(bucket.copy_to("run", tmp_path / "copied"), reference)


def test_two_writers(bucket: Bucket, reference: Path, tmp_path: Path) -> None:
    """The second one is refused, and the first one goes on."""
    url, said = bucket.url("run"), []

    def start_another() -> None:
        with pytest.raises(UserError, match="is being written by process .*; stop that one first"):
            train_local(cheap_run(), url, resume=True, on_record=said.append)

    train_local(cheap_run(), url, resume=False, on_record=at_round(2, start_another))
    assert_same_run(bucket.copy_to("run", tmp_path / "copied"), reference)


def test_who_was_taken_over_stops_and_publishes_no_more(
    bucket: Bucket, home: Callable[[], list[Path]]
) -> None:
    url = bucket.url("run")
    before: dict[str, bytes] = {}

    def take_over() -> None:
        other = {"owner": "other", "host": "elsewhere", "machine": "x", "process": 7}
        bucket.write(f"run/{lease.NAME}", json.dumps(other).encode())
        wait_for(lambda: any((one / session.KEPT).exists() for one in home()))
        before.update({key: bucket.read(key) for key in bucket.list()})

    with pytest.raises(UserError, match="is written by process 7 on elsewhere by now") as caught:
        train_local(cheap_run(), url, resume=False, on_record=at_round(2, take_over))
    (kept,) = home()
    assert f"its local copy is kept in {kept}" in str(caught.value)
    assert (kept / "metrics.jsonl").read_text().count("\n") == 2
    assert {key: bucket.read(key) for key in bucket.list()} == before


def test_a_store_that_goes_away_and_comes_back(
    bucket: Bucket, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door(bucket.endpoint)
    name_store(monkeypatch, door.endpoint)
    notes: list[str] = []

    def on_record(line: dict[str, Any]) -> None:
        notes.append(line.get("note", ""))
        if line.get("round") == 1:
            door.close()
        if line.get("round") == 3:
            # not before it was noticed
            wait_for(lambda: find_session()._notes)
            door.open()

    train_local(cheap_run(), bucket.url("run"), resume=False, on_record=on_record)
    door.close()
    told = [note for note in notes if "the run goes on, and asks again for up to 600 s" in note]
    assert told
    assert_same_run(bucket.copy_to("run", tmp_path / "copied"), reference)


def find_session() -> session.Session:
    (found,) = [work for *_, work in folders._opened.values() if work is not None]
    return found


@pytest.mark.promise
def test_a_store_that_stays_away_ends_the_run_with_its_copy(
    bucket: Bucket,
    reference: Path,
    home: Callable[[], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    door = Door(bucket.endpoint)
    name_store(monkeypatch, door.endpoint)
    monkeypatch.setattr(session, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(folders, "CLOSE_SECONDS", 0.2)

    def leave() -> None:
        door.close()
        wait_for(lambda: find_session()._error)

    with pytest.raises(UserError, match="did not take what the run writes for 0 s") as caught:
        train_local(cheap_run(), bucket.url("run"), resume=False, on_record=at_round(3, leave))
    (kept,) = home()
    assert f"go on with: rlalign train --resume {bucket.url('run')}, or from" in str(caught.value)
    assert f"the local copy is kept in {kept}" in str(caught.value)
    train_local(cheap_run(), kept, resume=True, on_record=quiet)
    assert_same_run(kept, reference)


def test_a_store_that_is_not_there_is_told_of(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    door = Door(bucket.endpoint)
    door.close()
    name_store(monkeypatch, door.endpoint)
    monkeypatch.setattr(folders, "OPEN_SECONDS", 0.1)
    said = refused("status", bucket.url("run"), capsys=capsys)
    assert f"{bucket.url('run')}: " in said
    assert "see that the URL, AWS_ENDPOINT_URL and the key in the environment" in said


@pytest.mark.promise
def test_a_run_that_never_began_is_begun_anew(bucket: Bucket, tmp_path: Path) -> None:
    """What it left is gone, what is somebody else's is not touched."""
    url = bucket.url("run")

    def fail(line: dict[str, Any]) -> None:
        raise KeyError("on purpose")

    with pytest.raises(KeyError):
        train_local(cheap_run(), url, resume=False, on_record=fail)
    left = bucket.list("run/")
    assert "run/config.yaml" in left and "run/status.json" in left
    events = [key for key in left if "tensorboard" in key]
    assert events
    with folders.look_at(url) as folder:
        refuse_for_new_run(folder)
    train_local(cheap_run(), url, resume=False, on_record=quiet)
    assert not set(events) & set(bucket.list("run/"))
    bucket.write("other/notes.txt", b"mine")
    with (
        folders.look_at(bucket.url("other")) as folder,
        pytest.raises(UserError, match=f"{bucket.url('other')} is not empty"),
    ):
        refuse_for_new_run(folder)
    assert bucket.read("other/notes.txt") == b"mine"
