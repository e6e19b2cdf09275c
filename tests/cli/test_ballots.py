"""``rlalign ballots``: results, people, export and import; whose votes count; what is refused."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from rlalign.ballots.store import Store
from rlalign.cli import main
from tests.votes import Voted, png


@pytest.fixture
def voted(tmp_path: Path) -> Voted:
    voted = Voted(tmp_path / "votes.db")
    for name, count in (("anna", 3), ("bert", 2)):
        for number in range(count):
            voted.vote(voted.person(name), f"c{number}", [number, 100])
    return voted


@pytest.fixture
def place(voted: Voted, tmp_path: Path) -> str:
    return str(tmp_path / "votes.db")


def test_results_are_json_of_every_number(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ballots", place, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["campaign"] == "shapes" and len(found["people"]) == 2
    assert sum(found["choices"].values()) == 5


def test_results_are_told_in_the_pages_words(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ballots", place]) == 0
    lines = {tuple(line.split()[:2]): line for line in capsys.readouterr().out.splitlines()}
    assert lines["campaign", "shapes"]
    assert "0 skipped" in lines["Votes", "5"]
    assert lines["People", "2"]
    assert "random 5" in lines["Pairs", "chosen"]
    assert any(line.startswith("p100") and "0.00" in line for line in lines.values()), "a ranking"


def test_people_are_listed_left_out_taken_in_and_deleted(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def people() -> dict[str, list[str]]:
        assert main(["ballots", place, "people"]) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        return {line.split()[0]: line.split()[2:4] for line in lines}

    assert people() == {"anna": ["active", "3"], "bert": ["active", "2"]}
    assert main(["ballots", place, "leave-out", "bert"]) == 0
    assert people()["bert"] == ["left_out", "2"]
    assert main(["ballots", place, "take-in", "bert"]) == 0
    assert main(["ballots", place, "delete", "bert", "--yes"]) == 0
    assert "bert: 2 votes are blanked" in capsys.readouterr().out
    assert people()["(deleted)"] == ["deleted", "0"]
    store = Store.open(place)
    assert len(list(store.votes("shapes"))) == 3


@pytest.mark.parametrize(("answer", "left"), [("y", 3), ("n", 5), ("", 5)])
def test_a_deletion_is_asked_for_at_a_terminal(
    place: str,
    answer: str,
    left: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs) as terminal, os.fdopen(ours, "wb", buffering=0) as keys:
        keys.write(f"{answer}\n".encode())
        monkeypatch.setattr("sys.stdin", terminal)
        code = main(["ballots", place, "delete", "bert"])
    printed = capsys.readouterr()
    assert "Blank all votes, the name and the token of bert?" in printed.err
    assert code == (0 if left == 3 else 2)
    assert ("nothing is deleted" in printed.err) == (left == 5)
    assert len(list(Store.open(place).votes("shapes"))) == left


def test_a_deletion_that_nobody_can_confirm_needs_yes(place: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlalign", "ballots", place, "delete", "bert"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 2
    assert "say --yes to do it unasked" in done.stderr and "Traceback" not in done.stderr
    assert len(list(Store.open(place).votes("shapes"))) == 5


def test_an_export_has_a_card_and_no_vote_of_those_left_out(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet as pq

    assert main(["ballots", place, "leave-out", "anna"]) == 0
    assert main(["ballots", place, "export", str(tmp_path / "pairs.parquet")]) == 0
    assert "2 pairs" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "pairs.parquet").num_rows == 2
    assert (tmp_path / "pairs.card.md").is_file()
    assert main(["ballots", place, "export", str(tmp_path / "x.parquet"), "--min-ms", "5000"]) == 2
    assert "campaign 'shapes' has no vote to write" in capsys.readouterr().err


def test_label_studios_votes_are_taken_in_once(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    tasks = [
        {
            "id": 7,
            "data": {"prompt": "a dog", "image1": "1.png", "image2": "2.png"},
            "annotations": [
                {
                    "completed_by": who,
                    "created_at": "2026-11-01T10:00:00Z",
                    "lead_time": 3.0,
                    "result": [{"type": "pairwise", "value": {"selected": "right"}}],
                }
                for who in (1, 2, 3)
            ],
        }
    ]
    (tmp_path / "export.json").write_text(json.dumps(tasks), encoding="utf-8")
    new = str(tmp_path / "new.db")
    assert main(["ballots", new, "import", str(tmp_path / "export.json")]) == 2
    assert "--campaign must name the campaign" in capsys.readouterr().err
    command = ["ballots", place, "import", str(tmp_path / "export.json"), "--campaign", "studio"]
    assert main(command) == 0
    assert "3 votes" in capsys.readouterr().out
    assert main(command) == 0
    assert "0 votes" in capsys.readouterr().out
    store = Store.open(place)
    votes = list(store.votes("studio"))
    assert [store.content(vote.best) for vote in votes] == [png(2)] * 3
    assert len({vote.ballot.annotator for vote in votes}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.db"], "STORE must be the file of a store of votes or a URL, got 'nowhere.db'"),
        (["PLACE", "shout"], "VERB must be one of results, people, export"),
        (["PLACE", "export"], "export needs a file, as votes.parquet, got ''"),
        (
            ["PLACE", "export", "x.parquet", "--min-gold", "2"],
            "should be less than or equal to 1",
        ),
        (["new.db", "import", "none.json"], "import needs a file that is there, got 'none.json'"),
        (["PLACE", "export", "x.csv"], "name a file that ends in .parquet, got 'x.csv'"),
        (["PLACE", "leave-out"], "leave-out needs a person's name"),
        (["PLACE", "leave-out", "ann"], "NAME must be a person's, got 'ann'; did you mean 'anna'?"),
        (["PLACE", "leave-out", "anna", "--yes"], "--yes is for delete, which asks, got leave-out"),
        (["PLACE", "results", "x"], "results takes nothing more, got 'x'"),
        (["PLACE", "--campaign", "no"], "campaign must be one of shapes"),
    ],
)
def test_mistakes_are_one_message(
    place: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [place if one == "PLACE" else one for one in arguments]
    assert main(["ballots", *given]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
