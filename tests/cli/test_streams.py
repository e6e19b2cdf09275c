"""Terminals of every encoding, closed streams, readers who have gone: none of them ends a run."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlalign.cli import main
from rlalign.learning.metrics import round_line
from tests.runs import CONFIGS, SMALL, metrics

QUICKSTART, POINTS = (str(CONFIGS / f"{name}.yaml") for name in ("quickstart", "points"))
ONE_ROUND = [
    *SMALL,
    "rewards=[{name: jpeg}]",
    "evaluate.rewards=[]",
    "rounds=1",
    "evaluate.every=0",
]
ONE_ROUND += [
    "prompts.per_round=2",
    "learner.shards=1",
    "evaluate.prompts=2",
    "runtime.rollout.workers=1",
]
EMOJI = (
    "prompts={name: list, prompts: [a red circle \U0001f600, ± − 日本], per_round: 2, per_unit: 1,"
    " samples_per_prompt: 2}"
)
RLALIGN = [sys.executable, "-m", "rlalign"]
OLD_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ALONE = {
    k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL")
}


@pytest.fixture
def stand_in_for_stdout(monkeypatch):
    """Puts a stream of an encoding in the place of sys.stdout; its bytes are in its buffer."""

    def replace(encoding: str) -> io.TextIOWrapper:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, "stdout", stream)
        return stream

    return replace


@pytest.mark.promise
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16-le"])
def test_train_says_what_the_encoding_can(stand_in_for_stdout, tmp_path, encoding):
    stream, folder = stand_in_for_stdout(encoding), tmp_path / "läuft"
    assert main(["train", POINTS, *ONE_ROUND, EMOJI, "--local", "--out", str(folder)]) == 0
    stream.flush()
    said = stream.buffer.getvalue().decode(encoding)
    spread = f"{metrics(folder)[0]['reward/total/std']:.3f}"
    sign = "+-" if encoding == "ascii" else "±"
    assert f" {sign} {spread}" in said
    name = "l\\xe4uft" if encoding == "ascii" else "läuft"
    assert f"report: {tmp_path / name / 'report.html'}" in said
    assert ("−" in said) == (encoding == "utf-16-le"), "a reward below zero"
    assert (folder / "config.yaml").read_text(encoding="utf-8").count("\U0001f600") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["list"], 0), (["schema"], 0), (["check", QUICKSTART, EMOJI], 0), (["--help"], 0)],
)
def test_what_looks_speaks_ascii_too(stand_in_for_stdout, arguments, code):
    stream = stand_in_for_stdout("ascii")
    assert main(arguments) == code
    stream.flush()
    assert stream.buffer.getvalue()


def test_a_mistake_with_signs_is_one_message_in_ascii(monkeypatch, tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stderr", stream)
    where = ["--local", "--out", str(tmp_path / "run")]
    assert (
        main(
            [
                "train",
                QUICKSTART,
                f"prompts={{name: file, path: {tmp_path}/±\U0001f600.txt}}",
                *where,
            ]
        )
        == 2
    )
    stream.flush()
    said = stream.buffer.getvalue().decode("ascii")
    assert "+-\\U0001f600.txt" in said
    assert said.count("\n") == 1


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    master, terminal = os.openpty()
    os.close(master)
    return terminal


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unwritable", "code", "held_back"),
    [
        (closed_pipe, errno.EPIPE, False),
        (closed_terminal, errno.EIO, False),
        (lambda: os.open("/dev/full", os.O_WRONLY), errno.ENOSPC, True),
        (lambda: os.open(os.devnull, os.O_RDONLY), errno.EBADF, True),
    ],
    ids=["closed pipe", "closed terminal", "full disk", "read only"],
)
def test_a_run_goes_on_without_anyone_who_reads(monkeypatch, tmp_path, unwritable, code, held_back):
    for name in ("stdout", "stderr"):
        number = unwritable()
        with pytest.raises(OSError, match=re.escape(os.strerror(code))):
            os.write(number, b"x")
        stream = open(number, "w", encoding="utf-8", buffering=-1 if held_back else 1)  # noqa: PTH123, SIM115
        monkeypatch.setattr(sys, name, stream)
    assert main(["train", QUICKSTART, *ONE_ROUND, "--local", "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_a_process_of_an_old_locale_works_on_files_of_any_name(tmp_path):
    """File names and run files are UTF-8 there too; only the terminal keeps to ASCII."""
    folder, prompts = tmp_path / "läuft", tmp_path / "prömpts.txt"
    prompts.write_text("a red circle\na blue square\n", encoding="utf-8")
    file = (
        f"prompts={{name: file, path: {prompts}, per_round: 2, per_unit: 1, samples_per_prompt: 2}}"
    )
    done = subprocess.run(
        [
            *RLALIGN,
            "train",
            QUICKSTART,
            *ONE_ROUND,
            file,
            "policy.lora_rank=2",
            "--local",
            "--out",
            str(folder),
        ],
        env=ALONE | OLD_LOCALE,
        capture_output=True,
        text=True,
        encoding="ascii",
    )
    assert done.returncode == 0, done.stderr
    assert f" +- {metrics(folder)[0]['reward/total/std']:.3f}" in done.stdout
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path}/l\\xe4uft/report.html"


@pytest.mark.slow
def test_a_run_whose_reader_leaves_and_whose_errors_nobody_hears(tmp_path):
    command = [*RLALIGN, "train", QUICKSTART, *ONE_ROUND, "--local", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" 2>&- <&-', "sh", *command], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith(b"evaluation after round 0"):
        assert process.poll() is None, "the run ended before its reader left"
    process.stdout.close()
    assert process.wait() == 0
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.promise
@pytest.mark.parametrize(
    ("redirected", "code"),
    [
        (">&-", 0),
        (">&- 2>&- <&-", 0),
        ("| head -c 1", 0),
        (">/dev/full", 2),
        (">/dev/full 2>/dev/full", 2),
    ],
)
def test_what_only_tells_ends_where_nobody_listens(redirected, code):
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; '{sys.executable}' -m rlalign list {redirected}"],
        capture_output=True,
    )
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr


def test_a_name_that_is_no_text_is_refused(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff"
    done = subprocess.run(
        [*RLALIGN, "train", QUICKSTART, "--local", "--out", name], capture_output=True, env=ALONE
    )
    assert done.returncode == 2
    assert done.stderr.decode().endswith(
        "/\\udcff': names must be UTF-8, and this one is not; give it another name\n"
    )
    assert not Path(os.fsdecode(name)).exists()


def test_a_round_is_said_in_one_line_of_any_encoding():
    record = {
        "round": 1,
        "reward/total/mean": 0.5,
        "reward/total/std": 0.25,
        "grad_norm": 1.0,
        "seconds/round": 1.0,
    }
    record |= {f"seconds/{phase}": 0.0 for phase in ("rollout", "reward", "update", "sync")}
    assert "+0.5000 ± 0.250" in round_line(record, 2)
