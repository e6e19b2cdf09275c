"""``rlalign convert``: what it refuses, and that nothing is run or written then.

That a converted file gives the published score is tested beside the rewards.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlalign.cli import main

HEAD = {
    f"layers.{n}.{kind}": torch.randn(2, 3) if kind == "weight" else torch.randn(2)
    for n in (0, 2, 4, 6, 7)
    for kind in ("weight", "bias")
}


class Command:
    """What runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def saved(content: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["convert", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_asks_for_code_is_refused_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: bool
) -> None:
    """As a zip archive and as torch saved before."""
    command = Command(f"touch {tmp_path / 'ran'}")
    file = tmp_path / "a.pt"
    file.write_bytes(saved({**HEAD, "more": command}, _use_new_zipfile_serialization=not old))
    message = refused(capsys, file)
    assert f"{os.system.__module__}.system" in message
    assert "weights_only" not in message  # nobody is told to switch the protection off
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


CASES = {
    "text": (b"not a pickle at all", "is damaged, or no file of torch's"),
    "empty": (b"", "is damaged, or no file of torch's"),
    "cut": (saved(HEAD)[:700], "is damaged, or no file of torch's"),
    "plain pickle": (pickle.dumps({"a": 1}), "it is no pickle of tensors"),
    "a list": (saved([torch.ones(2)]), "must hold named tensors, got a list"),
    "nothing": (saved({"state_dict": {}}), "must hold named tensors"),
    "optimiser": (saved({**HEAD, "lr": 0.1}), "got a float at 'lr'"),
    "no name": (saved({3: torch.ones(2)}), "got a Tensor at 3"),
    "sparse": (saved({"a": torch.eye(2).to_sparse()}), "got a Tensor at 'a'"),
    "another model": (saved({"fc.weight": torch.ones(2)}), "of no reward that rlalign knows"),
    "half a head": (saved(dict(list(HEAD.items())[:6])), "it holds 6 tensors (layers.0.weight"),
}


@pytest.mark.parametrize("case", CASES)
def test_another_file_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    content, message = CASES[case]
    (tmp_path / "a.pt").write_bytes(content)
    said = refused(capsys, tmp_path / "a.pt")
    assert message in said
    assert "a.pt" in said
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_it_writes_over_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "head.pth"
    file.write_bytes(saved(HEAD))
    assert "there is no such file" in refused(capsys, tmp_path / "b.pt")
    assert "must end in .safetensors" in refused(capsys, file, tmp_path / "b.pt")
    out = tmp_path / "new" / "b.safetensors"
    assert main(["convert", str(file), str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("predictor (10 tensors, 40 numbers, float32)")
    assert said[1] == f"{out}: for a run file, rewards: [{{name: aesthetic, head: {out}}}]"
    assert "is there already" in refused(capsys, file, out)
    assert "is a .safetensors file already" in refused(capsys, out)


def test_tensors_that_share_memory_are_written_whole(tmp_path: Path) -> None:
    shared = torch.randn(3, 2)
    tensors = {**HEAD, "layers.0.weight": shared.T, "layers.2.weight": shared[:2]}
    (tmp_path / "head.pth").write_bytes(saved(tensors))
    assert main(["convert", str(tmp_path / "head.pth")]) == 0
    found = load_file(tmp_path / "head.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
