"""The page of a campaign over real HTTP, with pictures of a queue and simulated people."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from rlalign.ballots.store import Store
from rlalign.core.registry import UserError
from rlalign.voting.judges import Judge
from rlalign.voting.serve import open_source, opened
from rlalign.voting.settings import load_vote, parse_vote
from rlalign.web.listening import bound, url_of
from rlalign.web.vote.people import read_secret
from rlalign.web.vote.serving import serve
from tests.votes import png
from tests.web.vote.person import Person


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four captions with four pictures each."""
    for caption in "abcd":
        (tmp_path / "set" / caption).mkdir(parents=True)
        for number in range(4):
            file = tmp_path / "set" / caption / f"{number}.png"
            file.write_bytes(png(50 * number + ord(caption) - 97))
    return tmp_path / "set"


def test_simulated_people_vote_over_the_page(pictures: Path, tmp_path: Path) -> None:
    """Two people at the page, who see a picture's file and nothing else, prefer the brighter."""
    vote = parse_vote(
        {
            "name": "bright",
            "source": {"pictures": str(pictures)},
            "store": str(tmp_path / "votes.db"),
            "shares": {"gold": 0.0, "repeat": 0.0, "shared": 0.0},
            "simulate": {
                "votes": 8,
                "utility": [{"name": "function", "call": "tests.voting.test_queue:brightness"}],
                "temperature": 0.01,
                "lapse": 0.0,
                "left": 0.0,
            },
        }
    )
    assert vote.simulate is not None
    judge = Judge(vote.simulate, 0)
    made = bound("127.0.0.1", 0)
    url = url_of(made, encrypted=False)
    with opened(vote, open_source(vote), print) as served:
        page = threading.Thread(
            target=lambda: serve(
                served.desk,
                vote.server,
                read_secret(tmp_path / "secret"),
                on_ready=lambda _: ready.set(),
                made=made,
            ),
            daemon=True,
        )
        ready = threading.Event()
        page.start()
        ready.wait()
        people = [Person(url, name=name) for name in ("anna", "bert")]
        given = 0
        while given < 8:
            person = people[given % 2]
            ballot = person.ballot()
            if "waiting" in ballot:
                continue
            contents = [person.get(f"/picture/{key}").content for key in ballot["pictures"]]
            said = judge.answer(ballot["prompt"], contents, given)
            assert person.vote(ballot["ballot"], said.choice).json()["status"] == "recorded"
            given += 1
    store = Store.open(tmp_path / "votes.db")
    votes = list(store.votes("bright"))
    assert len(votes) == 8
    for one in votes:
        best, other = one.best, next(u for u in one.ballot.shown if u != one.best)
        contents = [store.content(uid) or b"" for uid in (best, other)]
        utilities = judge.utilities(one.ballot.item.caption, contents)
        assert utilities[0] > utilities[1]


def test_an_export_is_written_when_the_campaign_ends(pictures: Path, tmp_path: Path) -> None:
    from rlalign.voting.serve import people_of

    vote = parse_vote(
        {
            "name": "ends",
            "source": {"pictures": str(pictures)},
            "store": str(tmp_path / "votes.db"),
            "export": str(tmp_path / "out.parquet"),
            "simulate": {
                "votes": 5,
                "people": 2,
                "utility": [{"name": "function", "call": "tests.voting.test_queue:brightness"}],
            },
        }
    )
    heard: list[str] = []
    with opened(vote, open_source(vote), heard.append) as served:
        assert people_of(served).run() == 5
    assert (tmp_path / "out.parquet").is_file()
    assert any("out.parquet" in line for line in heard)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {}}, "one of samples, pictures, policy and run must say"),
        ({"source": {"policy": "tiny", "run": "runs/x"}}, "got policy, run"),
        ({"source": {"policy": "tiny"}}, "prompts is required with source.policy"),
        ({"mode": "ab"}, "mode ab and source.against go together"),
        ({"votes_per_round": 4}, "votes_per_round is about source.run"),
        ({"low": 40}, "low must be <= ahead"),
        ({"shares": {"gold": 0.5, "shared": 0.5}}, "must sum to < 1, got 1.05"),
        ({"page": {"typing": True}}, "page.typing is for mode chain"),
        ({"rule": "best"}, "rule must be 'random', 'uncertain', 'fisher' or 'gap'"),
        (
            {"server": {"host": "0.0.0.0", "with_token": False}},
            "with_token false is for a loopback",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    pictures: Path, changes: dict[str, object], message: str
) -> None:
    data = {"name": "x", "source": {"pictures": str(pictures)}, **changes}
    with pytest.raises(UserError, match=message):
        parse_vote(data)


def test_a_file_is_read_with_overrides(tmp_path: Path) -> None:
    (tmp_path / "vote.yaml").write_text("name: x\nsource: {pictures: set}\n", encoding="utf-8")
    vote = load_vote(tmp_path / "vote.yaml", ["server.port=0", "mode=rank"])
    assert vote.server.port == 0 and vote.per_item == 3 and vote.place == "runs/votes/x.db"
    assert not vote.server.with_token
    assert load_vote(tmp_path / "vote.yaml", ["server.host=0.0.0.0"]).server.with_token
