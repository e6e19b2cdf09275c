"""Checkpoints on a real disk: whole or not at all, and every kind of damage is named and
refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlalign.core.registry import UserError
from rlalign.learning import checkpoint
from rlalign.learning.checkpoint import Checkpoint, exclusive, folder_of, latest, read_tensors, save

RUN = "0123456789abcdef"


def made(round: int, *, size: int = 8) -> Checkpoint:
    tensors = {
        "policy/a": torch.full((size,), float(round)),
        "policy/b": torch.randn(3, 2).t(),  # not contiguous
        "optimiser/step/a": torch.tensor(float(round)),
        "half": torch.randn(2).half(),
        "version": torch.tensor(round),
    }
    return Checkpoint(
        round=round,
        tensors=tensors,
        facts={"statistics": {"7": [0.1, 1 / 3]}, "counts": {"samples": round}},
    )


def put(folder: Path, *rounds: int, keep: int = 9) -> None:
    for round in rounds:
        save(folder, made(round), run_identity=RUN, keep=keep)


def there(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_what_is_saved_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    original = made(10)
    target = save(tmp_path, original, run_identity=RUN, keep=2)
    assert target == tmp_path / "checkpoints" / "round-00010"
    assert sorted(p.name for p in target.iterdir()) == ["state.json", "state.safetensors"]
    found = latest(tmp_path, run_identity=RUN)
    assert found is not None
    assert (found.round, found.facts) == (10, original.facts)
    assert found.tensors.keys() == original.tensors.keys()
    for name, tensor in original.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert torch.equal(read_tensors(tmp_path)["policy/a"], original.tensors["policy/a"])


def test_nothing_is_pickled(tmp_path: Path) -> None:
    """The tensor file opens with safetensors' own header (a length, then JSON); the other file is
    JSON."""
    put(tmp_path, 1)
    blob = (folder_of(tmp_path, 1) / "state.safetensors").read_bytes()
    length = int.from_bytes(blob[:8], "little")
    assert set(json.loads(blob[8 : 8 + length])) >= {"policy/a", "version"}
    assert (
        json.loads((folder_of(tmp_path, 1) / "state.json").read_text())["format"]
        == checkpoint.FORMAT
    )
    source = Path(checkpoint.__file__).read_text()
    assert "pickle" not in source
    assert "torch.load" not in source
    assert "torch.save" not in source


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert latest(tmp_path, run_identity=RUN) is None
    with pytest.raises(UserError, match="has no checkpoint yet"):
        read_tensors(tmp_path)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    put(tmp_path, 5, 10, 15, keep=2)
    assert there(tmp_path) == ["round-00010", "round-00015"]
    put(tmp_path, 100_000, keep=2)
    assert there(tmp_path) == ["round-00015", "round-100000"]  # by number, not by spelling
    found = latest(tmp_path, run_identity=RUN)
    assert found is not None
    assert found.round == 100_000


def test_saving_a_round_again_replaces_it(tmp_path: Path) -> None:
    put(tmp_path, 5)
    save(tmp_path, made(5, size=2), run_identity=RUN, keep=2)
    assert read_tensors(tmp_path)["policy/a"].shape == (2,)


def test_leftovers_of_a_dead_save_are_ignored_and_swept(tmp_path: Path) -> None:
    put(tmp_path, 5)
    left = tmp_path / "checkpoints" / ".round-00010.12345"
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half of it")
    found = latest(tmp_path, run_identity=RUN)
    assert found is not None
    assert found.round == 5
    put(tmp_path, 15)
    assert there(tmp_path) == ["round-00005", "round-00015"]


def test_a_save_that_fails_halfway_leaves_the_old_one(tmp_path: Path) -> None:
    """The tensors are written, then the facts turn out not to be JSON: the old checkpoint is what
    remains."""
    put(tmp_path, 5)
    broken = Checkpoint(round=10, tensors=made(10).tensors, facts={"statistics": object()})
    with pytest.raises(TypeError):
        save(tmp_path, broken, run_identity=RUN, keep=1)
    found = latest(tmp_path, run_identity=RUN)
    assert found is not None
    assert found.round == 5
    put(tmp_path, 10, keep=1)
    assert there(tmp_path) == ["round-00010"]


def test_a_killed_save_leaves_the_old_one(tmp_path: Path) -> None:
    """A process gets SIGKILL when half of its tensor file is on the disk."""
    put(tmp_path, 5)
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.learning.test_checkpoint import RUN, made\n"
        "from rlalign.learning import checkpoint\n"
        "write = checkpoint.write_durably\n"
        "def half(path, blob):\n"
        "    write(path, blob[: len(blob) // 2])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.write_durably = half\n"
        "checkpoint.save(Path(sys.argv[1]), made(10), run_identity=RUN, keep=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=child_environment(), check=False
    )
    assert done.returncode == -9
    assert (
        len(there(tmp_path)) == 2
    )  # the old one, and half of the new one under a name that does not count
    found = latest(tmp_path, run_identity=RUN)
    assert found is not None
    assert found.round == 5


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def flip(file: Path, place: int) -> None:
    blob = bytearray(file.read_bytes())
    blob[place] ^= 1
    file.write_bytes(bytes(blob))


@pytest.mark.parametrize("place", [0, 20, -30, -1])
def test_one_flipped_bit_of_the_tensors_is_found(tmp_path: Path, place: int) -> None:
    put(tmp_path, 5, 10)
    flip(folder_of(tmp_path, 10) / "state.safetensors", place)
    with pytest.raises(
        UserError,
        match=r"round-00010 is damaged: .*delete .*round-00010 to resume from the one before it",
    ):
        latest(tmp_path, run_identity=RUN)


def test_one_flipped_bit_of_the_facts_is_found(tmp_path: Path) -> None:
    """At every place of state.json: it is no JSON, or another format, another run's, or its
    checksum is wrong."""
    put(tmp_path, 5)
    file = folder_of(tmp_path, 5) / "state.json"
    for place in range(len(file.read_bytes())):
        flip(file, place)
        with pytest.raises(UserError, match="round-00005"):
            latest(tmp_path, run_identity=RUN)
        flip(file, place)
    assert latest(tmp_path, run_identity=RUN) is not None


def test_a_truncated_file_is_found(tmp_path: Path) -> None:
    put(tmp_path, 5)
    for name in ("state.safetensors", "state.json"):
        file = folder_of(tmp_path, 5) / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="is damaged"):
            latest(tmp_path, run_identity=RUN)
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    put(tmp_path, 5)
    (folder_of(tmp_path, 5) / name).unlink()
    with pytest.raises(UserError, match=f"is incomplete: {name} is missing"):
        latest(tmp_path, run_identity=RUN)


@pytest.mark.parametrize("text", ['{"format": "rlalign checkpoint 99"}', "{}", "[]", "1"])
def test_a_foreign_format_is_refused(tmp_path: Path, text: str) -> None:
    put(tmp_path, 5)
    (folder_of(tmp_path, 5) / "state.json").write_text(text)
    with pytest.raises(UserError, match="is foreign: its format must be 'rlalign checkpoint 1'"):
        latest(tmp_path, run_identity=RUN)


def test_another_runs_checkpoint_is_refused_but_can_be_read(tmp_path: Path) -> None:
    put(tmp_path, 5)
    with pytest.raises(UserError, match="belongs to another run.*start anew in another folder"):
        latest(tmp_path, run_identity="another")
    assert read_tensors(tmp_path)["version"].item() == 5


def test_identity_ignores_what_does_not_touch_the_weights() -> None:
    run = {
        "name": "a",
        "seed": 0,
        "rounds": 3,
        "runtime": {"rollout": {"workers": 1}},
        "learner": {"lr": 1e-4},
    }
    same = {
        **run,
        "name": "b",
        "rounds": 30,
        "runtime": {"rollout": {"workers": 4}},
        "evaluate": {},
        "checkpoint": {},
    }
    assert checkpoint.identity(run) == checkpoint.identity(same)
    assert checkpoint.identity(run) != checkpoint.identity({**run, "seed": 1})
    assert checkpoint.identity(run) != checkpoint.identity({**run, "learner": {"lr": 2e-4}})


def test_what_is_written_beside_and_by_how_many_threads_is_no_part_of_the_identity(
    tmp_path: Path,
) -> None:
    """But it was: such a checkpoint is still its run's."""
    run = {"seed": 0, "write_pairs": "all", "preferences": {"path": "a", "workers": 3}}
    other = {"seed": 0, "write_pairs": "", "preferences": {"path": "a", "workers": 0}}
    assert (
        checkpoint.identity(run) == checkpoint.identity(other) == checkpoint.plain_identity(other)
    )
    assert checkpoint.plain_identity(run) != checkpoint.identity(run)
    assert checkpoint.identity(run) != checkpoint.identity(
        {**run, "preferences": {"path": "b", "workers": 3}}
    )
    assert checkpoint.identity({**run, "preferences": None}) != checkpoint.identity(run)
    save(tmp_path, made(5), run_identity=checkpoint.plain_identity(run), keep=1)
    older = checkpoint.plain_identity(run)
    assert latest(tmp_path, run_identity=checkpoint.identity(run), older=older) is not None
    with pytest.raises(UserError, match="belongs to another run"):
        latest(
            tmp_path,
            run_identity=checkpoint.identity({**run, "seed": 1}),
            older=checkpoint.plain_identity({**run, "seed": 1}),
        )


@pytest.mark.slow
def test_a_second_process_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from rlalign.learning.checkpoint import exclusive\n"
        "with exclusive(Path(sys.argv[1]), patience_seconds=0.1):\n"
        "    print('got it')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with exclusive(tmp_path):
        second = subprocess.run(
            command, env=child_environment(), capture_output=True, text=True, check=False
        )
    assert second.returncode == 1
    assert "UserError" in second.stderr
    assert f"is being written by process {os.getpid()}; stop that one first" in second.stderr
    after = subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, check=True
    )
    assert after.stdout == "got it\n"


@pytest.mark.promise
def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from rlalign.learning.checkpoint import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=child_environment(), check=False
    )
    with exclusive(tmp_path, patience_seconds=0.0):
        pass


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; skipped where one may not be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_message_and_loses_nothing(small_disk: Path) -> None:
    run_folder = small_disk / "run"
    put(run_folder, 5)
    big = made(10, size=100_000)  # 400 kB on a disk of 64 KiB
    with pytest.raises(
        UserError, match=r"cannot write .*No space left on device.*rlalign train --resume .*run"
    ):
        save(run_folder, big, run_identity=RUN, keep=1)
    found = latest(run_folder, run_identity=RUN)
    assert found is not None
    assert found.round == 5
    put(run_folder, 10, keep=1)  # the sweep makes room
    assert there(run_folder) == ["round-00010"]


def test_a_full_device_is_one_message(tmp_path: Path) -> None:
    """/dev/full answers every write with ENOSPC, without needing the right to mount."""
    file = tmp_path / "metrics.jsonl"
    file.symlink_to("/dev/full")
    with (
        pytest.raises(UserError, match="No space left on device; mend that"),
        checkpoint.disk_errors(tmp_path),
    ):
        checkpoint.write_durably(file, b"{}")


def test_a_full_disk_under_a_library_is_the_same_message(small_disk: Path) -> None:
    from safetensors.torch import save_file

    with (
        pytest.raises(UserError, match="No space left on device; mend that"),
        checkpoint.disk_errors(small_disk),
    ):
        save_file({"a": torch.zeros(100_000)}, small_disk / "a.safetensors")


def test_other_disk_errors_are_not_relabelled(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), checkpoint.disk_errors(tmp_path):
        (tmp_path / "absent").read_text()
