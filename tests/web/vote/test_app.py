"""The routes of the page, over real sockets and a real store: what is taken, from whom, and how
often."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from rlalign.ballots.deal import Deal
from rlalign.ballots.store import Store
from rlalign.web.vote.ballots_desk import PictureList, Supply
from rlalign.web.vote.serving import ADMIN_ENV, PageSettings
from tests.certificates import write_certificate
from tests.web.vote.made_desk import Served
from tests.web.vote.person import Person

Make = Callable[..., Served]
ADMIN = "an-administrator-of-a-test"


def votes_of(page: Served) -> list:
    return list(page.store.votes("shapes"))


def test_a_vote_is_in_the_store_when_it_is_answered(serve_page: Make, tmp_path: Path) -> None:
    page = serve_page()
    person = Person(page.url)
    ballot = person.ballot()
    more = {"reasons": ["looks"], "points": [[1, 0.25, 0.5]], "decide_ms": 1234, "visible_ms": 900}
    answer = person.vote(ballot["ballot"], "right", **more, device={"input": "key", "load_ms": 7})
    assert answer.json()["status"] == "recorded"

    other = Store.open(tmp_path / "pairs.sqlite")
    (vote,) = other.votes("shapes")
    other.close()
    assert vote.ballot.id == ballot["ballot"]
    assert vote.answer.choice == "right"
    assert vote.answer.reasons == ("looks",)
    assert vote.answer.points == ((1, 0.25, 0.5),)
    assert (vote.answer.decide_ms, vote.answer.visible_ms) == (1234, 900)
    assert vote.answer.device == {"input": "key", "load_ms": 7}


def test_the_answer_carries_the_ballot_that_was_announced(serve_page: Make) -> None:
    person = Person(serve_page().url)
    ballot = person.ballot()
    seen = []
    for _ in range(9):
        following = person.vote(ballot["ballot"]).json()["next"]
        assert following["pictures"] == ballot["ahead"], "fetched while the one before was seen"
        assert following["ballot"] != ballot["ballot"]
        seen.append(ballot["prompt"])
        ballot = following
    assert ballot["progress"] == {
        "done": 9, "of": 10, "waiting": "", "made": 0, "to_make": 0, "round": None,
        "votes": None,
    }  # fmt: skip
    assert ballot["ahead"] == []
    assert person.vote(ballot["ballot"]).json()["next"]["waiting"] == "empty"
    assert len(set(seen)) == 9


def test_a_ballot_takes_one_vote_however_often_it_is_sent(serve_page: Make) -> None:
    page = serve_page()
    person = Person(page.url)
    ballot = person.ballot()["ballot"]
    same = {"ballot": ballot, "nonce": "one click", "choice": "left"}
    answers = [person.post("/vote", same).json() for _ in range(3)]
    answers.append(person.vote(ballot, "right").json())
    assert [answer["status"] for answer in answers] == ["recorded", "again", "again", "again"]
    assert len({answer["next"]["ballot"] for answer in answers}) == 1
    assert [vote.answer.choice for vote in votes_of(page)] == ["left"]


def test_a_reload_shows_the_open_ballot(serve_page: Make) -> None:
    person = Person(serve_page().url)
    assert person.ballot() == person.ballot()


def test_undo_opens_the_last_ballot_again(serve_page: Make) -> None:
    page = serve_page()
    person = Person(page.url)
    first = person.ballot()
    assert person.undo().status_code == 409
    following = person.vote(first["ballot"], "left").json()["next"]
    again = person.undo().json()
    assert (again["ballot"], again["pictures"]) == (first["ballot"], first["pictures"])
    assert again["ahead"] == following["pictures"]
    assert person.vote(first["ballot"], "tie").json()["next"]["ballot"] == following["ballot"]
    assert [vote.answer.choice for vote in votes_of(page)] == ["tie"]


def test_a_repeated_undo_takes_one_vote_back(serve_page: Make) -> None:
    page = serve_page()
    person = Person(page.url)
    for _ in range(2):
        person.vote(person.ballot()["ballot"])
    for _ in range(2):
        assert person.post("/undo", {"nonce": "one click"}).status_code == 200
    assert len(votes_of(page)) == 1


def test_nobody_votes_or_sees_with_the_ballot_of_another(serve_page: Make) -> None:
    page = serve_page()
    one, two = Person(page.url), Person(page.url)
    ballot = one.ballot()
    refused = two.vote(ballot["ballot"])
    assert (refused.status_code, refused.json()["code"]) == (403, "not_yours")
    key = ballot["pictures"][0]
    assert two.get(f"/picture/{key}").status_code == 404
    shown = one.get(f"/picture/{key}")
    assert shown.headers["content-type"] == "image/png"
    assert "immutable" in shown.headers["cache-control"]
    assert votes_of(page) == []


def test_a_ballot_that_has_waited_too_long_is_replaced(serve_page: Make) -> None:
    page = serve_page()
    person = Person(page.url)
    ballot = person.ballot()["ballot"]
    now = page.desk.clock()
    page.desk.clock = lambda: now + 1e5
    assert person.vote(ballot).json()["code"] == "expired"
    assert person.ballot()["ballot"] != ballot


def test_what_a_page_does_not_ask_is_refused(serve_page: Make) -> None:
    page = serve_page()
    person = Person(page.url)
    ballot = person.ballot()["ballot"]
    wrong = [
        {"choice": "rank", "ranking": [0, 1]},
        {"choice": "left", "reasons": ["no such reason"]},
        {"choice": "left", "points": [[2, 0.5, 0.5]]},
    ]
    for more in wrong:
        answer = person.vote(ballot, **more)
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_choice"), more
    assert votes_of(page) == []


# --- who may join, and what a browser is told -----------------------------------------------------


def test_a_join_link_is_one_person_on_every_machine(
    serve_page: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADMIN_ENV, ADMIN)
    page = serve_page(with_token=True)
    refused = Person(page.url)
    assert refused.joined.status_code == 403
    assert refused.get("/ballot").json() == {"waiting": "join"}
    assert Person(page.url, token="p" + "x" * 40).joined.status_code == 403

    token = page.secret.invitation()
    one, same = Person(page.url, token=token, name="Ada"), Person(page.url, token=token)
    assert one.ballot()["ballot"] == same.ballot()["ballot"]
    shared = page.secret.invitation(many=True)
    two, three = Person(page.url, token=shared), Person(page.url, token=shared)
    assert two.ballot()["ballot"] != three.ballot()["ballot"]
    assert [person.name for person in page.store.annotators()] == ["Ada", "", ""]
    for file in tmp_path.glob("pairs.sqlite*"):
        assert token.encode() not in file.read_bytes(), "the store keeps its digest alone"


def test_consent_comes_before_the_first_vote(serve_page: Make) -> None:
    from dataclasses import replace

    page = serve_page()
    text = {"consent": "Your votes train a model.", "consent_version": "2"}
    page.desk.about = replace(page.desk.about, **text)
    assert Person(page.url, consent="1").joined.json()["code"] == "consent"
    assert Person(page.url, consent="2").joined.status_code == 200
    assert page.store.annotators()[0].consent == "2"


def test_cookies_and_headers_keep_others_out(serve_page: Make, tmp_path: Path) -> None:
    page = serve_page()
    person = Person(page.url)
    cookie = person.joined.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "secure" not in cookie
    person.get("/")
    person.get("/static/vote.js")
    person.get("/nothing")
    person.vote("no ballot")
    for answer in person.answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy and "http" not in policy and "*" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "server" not in person.joined.headers

    # a cookie that was changed is nobody's
    name, value = person.session.cookies.items()[0]
    other = Person(page.url)
    other.session.cookies.clear()
    # (the last character has bits that are not read)
    changed = value[:-2] + ("A" if value[-2] != "A" else "B") + value[-1]
    other.session.cookies.set(name, changed)
    assert other.get("/ballot").json() == {"waiting": "join"}


def test_over_https_the_cookie_is_for_https(serve_page: Make, tmp_path: Path) -> None:
    pem, key = write_certificate(tmp_path, "IP:127.0.0.1")
    page = serve_page(certificate=str(pem), key=str(key))
    assert page.url.startswith("https://")
    session = requests.Session()
    session.trust_env = False
    session.verify = str(pem)
    answer = session.post(page.url + "/join", json={}, headers={"Origin": page.url})
    assert answer.status_code == 200
    assert "secure" in answer.headers["set-cookie"].lower()
    assert "ballot" in session.get(page.url + "/ballot").json()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": None}, 403),
        ({"Origin": "http://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "elsewhere.example"}, 421),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
    ],
)
def test_a_post_from_elsewhere_is_refused(
    serve_page: Make, headers: dict[str, str | None], status: int
) -> None:
    page = serve_page()
    person = Person(page.url)
    ballot = person.ballot()["ballot"]
    body = {"ballot": ballot, "nonce": "n", "choice": "left"}
    assert person.post("/vote", body, headers=headers).status_code == status
    assert votes_of(page) == []


def test_bodies_have_a_length_and_a_limit(serve_page: Make) -> None:
    person = Person(serve_page().url)
    kind = {"Content-Type": "application/json"}
    long = person.session.post(person.url + "/vote", data=b" " * 20_000, headers=kind)
    assert long.status_code == 413
    chunks = person.session.post(person.url + "/vote", data=iter([b"{", b"}"]), headers=kind)
    assert chunks.status_code == 411


def test_who_asks_too_often_waits(serve_page: Make) -> None:
    page = serve_page(person_per_second=0.001)
    person = Person(page.url)
    assert person.get("/ballot").status_code == 429
    by_address = serve_page("ab", address_per_second=0.2)
    one = Person(by_address.url)
    two = Person(by_address.url)
    assert one.joined.status_code == 200
    assert two.joined.status_code == 429
    assert two.joined.headers["retry-after"] == "1"


def test_a_page_for_others_has_a_token() -> None:
    with pytest.raises(ValueError, match=r"server.with_token false is for a loopback address"):
        PageSettings(host="0.0.0.0", with_token=False)
    with pytest.raises(ValueError, match=r"server.origin must name the address of the proxy"):
        PageSettings(behind_proxy=True)


def test_behind_a_proxy_the_page_has_its_name(serve_page: Make) -> None:
    page = serve_page(origin="https://vote.example.org")
    headers = {"Host": "vote.example.org", "Origin": "https://vote.example.org"}
    session = requests.Session()
    session.trust_env = False
    answer = session.post(page.url + "/join", json={}, headers=headers)
    assert answer.status_code == 200 and "secure" in answer.headers["set-cookie"].lower()
    assert (
        session.post(page.url + "/join", json={}, headers={"Origin": page.url}).status_code == 421
    )


# --- prompts, events, the administrator -----------------------------------------------------------


def test_typed_prompts_are_text_and_pass_the_list_of_words(serve_page: Make) -> None:
    page = serve_page("chain")
    person = Person(page.url)
    assert person.ballot()["waiting"] == "prompt"
    refused = person.post("/prompts", {"text": "A ＮＵＤＥ  figure"})
    assert (refused.status_code, refused.json()["code"]) == (400, "blocked")
    found = person.post("/prompts", {"text": "  <b>'quoted'</b>  \n & more "})
    assert found.status_code == 202
    assert found.json()["waiting"] == "broken"
    assert [text for _, text in page.store.prompts("shapes")] == ["<b>'quoted'</b> & more"]
    assert Person(serve_page().url).post("/prompts", {"text": "a tree"}).status_code == 403


def test_in_a_chain_the_winner_stays(serve_page: Make) -> None:
    page = serve_page("chain")
    person = Person(page.url)
    ballot = person.post("/prompts", {"text": ""}).json()
    seen = set(ballot["pictures"])
    for count in range(1, 5):
        right = ballot["pictures"][1]
        following = person.vote(ballot["ballot"], "right").json()["next"]
        assert right in following["pictures"], "the winner stays"
        (new,) = set(following["pictures"]) - {right}
        assert new in ballot["ahead"] and new not in seen
        assert following["chain"] == count
        seen.add(new)
        ballot = following
    assert person.vote(ballot["ballot"], "left").json()["next"]["waiting"] == "empty"


def test_undo_in_a_chain_brings_the_pair_back_and_the_other_winner_after_it(
    serve_page: Make,
) -> None:
    page = serve_page("chain")
    person = Person(page.url)
    first = person.post("/prompts", {"text": ""}).json()
    left, right = first["pictures"]
    assert left in person.vote(first["ballot"], "left").json()["next"]["pictures"]
    assert person.undo().json()["pictures"] == [left, right]
    following = person.vote(first["ballot"], "right").json()["next"]
    assert right in following["pictures"] and left not in following["pictures"]


def test_undo_in_a_chain_takes_back_the_pair_that_waits_behind_a_repeat(serve_page: Make) -> None:
    page = serve_page("chain")
    person = Person(page.url)
    first = person.post("/prompts", {"text": ""}).json()
    second = person.vote(first["ballot"], "left").json()["next"]

    # an own pair again comes before the pair that the choice has led to
    page.desk.dealer = Deal(gold=0.0, repeat=0.999, shared=0.0, repeat_after=1)
    repeat = person.vote(second["ballot"], "left").json()["next"]
    (annotator,) = page.store.annotators()
    asked = page.store.ballot(repeat["ballot"])
    assert asked is not None and asked.item.kind == "repeat"
    waiting = [one for one in page.store.items("shapes") if one.kind == "live"][-1]
    assert page.store.stock("shapes", 0.0).items == {"live": 1}

    assert person.undo().json()["ballot"] == second["ballot"]
    assert page.store.stock("shapes", 0.0).items == {}, "nothing of the undone choice is left"
    page.desk.dealer = Deal(gold=0.0, repeat=0.0, shared=0.0)
    following = person.vote(second["ballot"], "right").json()["next"]
    asked = page.store.ballot(following["ballot"])
    assert asked is not None and asked.item.id != waiting.id
    assert second["pictures"][1] in following["pictures"], "the other winner stays"
    assert annotator.id == asked.annotator


def test_a_repeat_does_not_move_a_chain(serve_page: Make) -> None:
    page = serve_page("chain")
    person = Person(page.url)
    first = person.post("/prompts", {"text": ""}).json()
    page.desk.dealer = Deal(gold=0.0, repeat=0.999, shared=0.0, repeat_after=0)
    repeat = person.vote(first["ballot"], "left").json()["next"]
    assert set(repeat["pictures"]) == set(first["pictures"])
    following = person.vote(repeat["ballot"], "left").json()["next"]
    assert following["chain"] == 1
    assert first["pictures"][0] in following["pictures"], "the winner of the pair itself"


def test_events_tell_of_votes_and_end_with_the_server(serve_page: Make) -> None:
    page = serve_page()
    person = Person(page.url)
    ballot = person.ballot()["ballot"]
    stream = person.get("/progress", stream=True)
    assert stream.headers["content-type"].startswith("text/event-stream")
    lines = (line for line in stream.iter_lines(decode_unicode=True) if line.startswith("data"))
    assert json.loads(next(lines)[5:])["done"] == 0
    person.vote(ballot)
    assert json.loads(next(lines)[5:])["done"] == 1


class Learning(PictureList):
    """A source of a run that learns."""

    said: Supply = Supply(round=3)

    def supply(self, prompt: str) -> Supply:
        return self.said


def test_it_tells_which_round_learns_and_from_which_votes(serve_page: Make) -> None:
    page = serve_page()
    source = page.desk.source = Learning()
    person = Person(page.url)
    progress = person.ballot()["progress"]
    assert (progress["round"], progress["votes"]) == (3, None)
    stream = person.get("/progress", stream=True)
    lines = (line for line in stream.iter_lines(decode_unicode=True) if line.startswith("data"))
    next(lines)
    object.__setattr__(source, "said", Supply(round=3, votes=(101, 200)))
    page.desk.notice.ring()
    assert json.loads(next(lines)[5:])["votes"] == [101, 200]


def test_results_and_votes_are_for_the_administrator(
    serve_page: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADMIN_ENV, ADMIN)
    page = serve_page(with_token=True)
    person = Person(page.url, token=page.secret.invitation())
    person.vote(person.ballot()["ballot"])
    for path in ("/results", "/results.json", "/export"):
        assert person.get(path).status_code == 401
    bearer = {"Authorization": f"Bearer {ADMIN}"}
    assert person.get("/results.json", headers=bearer).status_code == 200
    (line,) = person.get("/export", headers=bearer).text.splitlines()
    assert json.loads(line)["answer"]["choice"] == "left"

    # in a browser by a form
    wrong = person.session.post(page.url + "/admin", data={"token": "guess"})
    assert wrong.status_code == 403
    shown = person.session.post(page.url + "/admin", data={"token": ADMIN})
    assert shown.status_code == 200 and shown.url.endswith("/results")


def test_left_out_people_are_told(serve_page: Make) -> None:
    page = serve_page()
    person = Person(page.url)
    person.ballot()
    (annotator,) = page.store.annotators()
    page.store.set_status(annotator.id, "left_out", "too fast", 1.0)
    assert person.get("/ballot").json()["code"] == "left_out"


# --- what no browser sends ------------------------------------------------------------------------


def malformed(number: int, ballot: str) -> tuple[str, str, bytes, dict[str, str]]:
    """(method, path, body, headers) of a request that is wrong in one way, by its number."""
    rng = random.Random(number)
    kind = {"Content-Type": "application/json"}
    good = {"ballot": ballot, "nonce": f"n{number}", "choice": "left", "ranking": [], "points": []}
    odd = [None, True, -1, 1e308, 10**400, [], {}, "", "\x00", "\u202e", "x" * 70, [[]]]
    way = rng.randrange(8)
    if way == 0:  # a field of another kind
        key = rng.choice(["ballot", "nonce", "choice"])
        value = rng.choice([value for value in odd if value != "x" * 70 or key != "ballot"])
        return "POST", "/vote", json.dumps({**good, key: value}).encode(), kind
    if way == 1:  # lists and numbers out of bounds
        key = rng.choice(["ranking", "points", "reasons", "visible_ms", "decide_ms", "device"])
        value = rng.choice([None, True, -1, 1e308, "x", [None], [9], [[0, 2, 0]], {"a": 1}, [{}]])
        return "POST", "/vote", json.dumps({**good, key: value}).encode(), kind
    if way == 2:  # cut off
        body = json.dumps(good).encode()
        return "POST", "/vote", body[: rng.randrange(len(body))], kind
    if way == 3:  # bytes
        return "POST", rng.choice(["/vote", "/undo", "/join"]), rng.randbytes(200), kind
    if way == 4:  # deep, doubled, not a number
        texts = ["[" * 8000, '{"a": 1, "a": 2}', '{"nonce": NaN}', '"text"', "[]", "null", "7"]
        return "POST", rng.choice(["/vote", "/undo"]), rng.choice(texts).encode(), kind
    if way == 5:  # a place that is not there
        path = "/" + "".join(rng.choice("abc/.%2e\\~;") for _ in range(rng.randrange(1, 40)))
        return "GET", path, b"", {}
    if way == 6:  # a method, a kind or an origin that is not taken
        method = rng.choice(["PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"])
        return method, rng.choice(["/", "/vote", "/ballot"]), b"{}", kind
    path = rng.choice(["/picture/" + "x" * rng.randrange(1, 300), "/static/../app.py", "/vote"])
    return "GET", path, b"", {"Cookie": "rlalign-vote=" + "y" * rng.randrange(0, 200)}


def test_a_thousand_malformed_requests_are_refused_without_a_traceback(
    serve_page: Make, caplog: pytest.LogCaptureFixture
) -> None:
    page = serve_page()
    person = Person(page.url)
    ballot = person.ballot()["ballot"]
    for number in range(1000):
        method, path, body, headers = malformed(number, ballot)
        answer = person.session.request(method, page.url + path, data=body, headers=headers)
        assert 400 <= answer.status_code < 500, (number, method, path, body, answer.text)
        assert method == "HEAD" or answer.json()["error"], number
    assert votes_of(page) == []
    assert person.vote(ballot).json()["status"] == "recorded"
    assert [r for r in caplog.records if r.exc_info or r.levelname == "ERROR"] == []
