"""``rlalign vote``: it prints its link, serves, ends by Ctrl-C with code 130, and says what is
wrong."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from rlalign.cli import main
from tests.votes import png


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A campaign on a folder of pictures; the working folder is its own."""
    (tmp_path / "set" / "a dog").mkdir(parents=True)
    for number in range(4):
        (tmp_path / "set" / "a dog" / f"{number}.png").write_bytes(png(number))
    file = tmp_path / "vote.yaml"
    file.write_text(
        "name: dogs\nsource: {pictures: set}\nexport: votes.parquet\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    return file


@pytest.mark.promise
def test_it_serves_until_it_is_stopped(config: Path) -> None:
    command = [sys.executable, "-m", "rlalign", "vote", str(config), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as page:
        assert page.stdout is not None and page.stderr is not None
        line = page.stdout.readline()
        link = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert link is not None and "votes: runs/votes/dogs.db; Ctrl-C ends it" in line
        session = requests.Session()
        session.trust_env = False
        assert "dogs" in session.get(link.group()).text
        page.send_signal(signal.SIGINT)
        assert page.wait() == 130
        err = page.stderr.read()
    assert "stopped; the votes are in runs/votes/dogs.db" in err and "Traceback" not in err
    assert (config.parent / "runs" / "votes" / "dogs.db").is_file()
    assert not (config.parent / "votes.parquet").exists(), "nobody has voted"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["source.pictures=nowhere"], "source.pictures must name a file or folder that is there"),
        (["mode=loud"], "mode must be 'pairs', 'chain', 'rank' or 'ab'"),
        (["sauce=1"], "sauce: unknown setting; did you mean 'source'?"),
        (["server.port=99999999"], "server.port must be <= 65535"),
        (["--address", "auto"], "--address is for source.policy"),
    ],
)
def test_mistakes_are_one_message(
    config: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vote", str(config), "server.port=0", *overrides]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
