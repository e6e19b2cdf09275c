"""The judge against real HTTP servers on loopback that speak the chat protocol, well or badly."""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
import math
import pickle
import sqlite3

import numpy as np
import pytest
from PIL import Image

from rlalign.core.prompts import Prompt
from rlalign.core.registry import UserError, build
from rlalign.rewards._judge_questions import SHIPPED, Questions
from rlalign.rewards.base import score
from tests.servers import scripted

KEY = "sk-a-key-of-a-test-0123456789"


def says(text="Good. Final Score: 4", top=None, tokens=10, **more):
    """A chat completion; ``top`` is token -> probability of the first word."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if top is not None:
        chances = [{"token": t, "logprob": math.log(p)} for t, p in top.items()]
        choice["logprobs"] = {"content": [{"token": next(iter(top)), "top_logprobs": chances}]}
    made = {"choices": [choice], "usage": {"total_tokens": tokens}, **more}
    return 200, {}, json.dumps(made).encode()


def refuses(status, message="no", headers=None, code=None):
    body = json.dumps({"error": {"message": message, "code": code}}).encode()
    return status, headers or {}, body


def judge(url, **more):
    settings = {"name": "vlm_judge", "model": "a-judge", "url": f"{url}/v1"}
    return build("rewards", {**settings, "patience_seconds": 0, "concurrency": 1, **more})


def media(count=1, frames=1, size=(4, 6)):
    made = np.random.default_rng(0).integers(0, 256, (count, frames, 3, *size), dtype=np.uint8)
    return np.ascontiguousarray(made)


def ask(made, *prompts, pictures=None):
    pictures = media(len(prompts)) if pictures is None else pictures
    return score(made, made.load("cpu"), pictures, prompts).tolist()


def request(server, number=0):
    return json.loads(server.sent[number][1])


# --- what is asked -------------------------------------------------------------------------------


def test_the_request_holds_the_picture_and_the_question():
    pictures = media(1, size=(5, 7))
    with scripted(says()) as server:
        assert ask(judge(server.url), "a red circle", pictures=pictures) == [0.75]
    sent = request(server)
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("a-judge", 0, 512)
    image, text = sent["messages"][0]["content"]
    assert "a red circle" in text["text"] and "from 1 (bad in both) to 5" in text["text"]
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(seen.transpose(2, 0, 1), pictures[0, 0])
    assert "Authorization" not in server.sent[0][0]


def test_frames_of_a_clip_go_into_one_question():
    with scripted(says()) as server:
        ask(judge(server.url), "a", pictures=media(1, frames=3))
    kinds = [part["type"] for part in request(server)["messages"][0]["content"]]
    assert kinds == ["image_url"] * 3 + ["text"]


def test_more_fields_go_with_it_and_null_takes_one_out():
    more = {"max_tokens": None, "max_completion_tokens": 9, "seed": 1}
    with scripted(says()) as server:
        ask(judge(server.url, extra=more), "a")
    sent = request(server)
    assert "max_tokens" not in sent
    assert (sent["max_completion_tokens"], sent["seed"]) == (9, 1)


def test_a_template_of_ones_own_sees_prompt_and_record(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("{{ prompt }}: {% for w in record.words %}[{{ w }}]{% endfor %}")
    with scripted(says()) as server:
        ask(judge(server.url, template=str(file)), Prompt("x", {"words": ["a", "{{ b }}"]}))
    assert request(server)["messages"][0]["content"][1]["text"] == "x: [a][{{ b }}]"


def test_geneval_records_become_a_question():
    record = {
        "tag": "position",
        "include": [
            {"class": "cat", "count": 2, "color": "red"},
            {"class": "cow", "count": 1, "position": ["left of", 0]},
        ],
    }
    [asked] = Questions("objects", "yes", "", "here").of("p", record, (1, 5))
    lines = asked.text.splitlines()
    assert lines[1:3] == ["- 2 x red cat", "- 1 x cow, left of the cat"]
    assert (asked.wanted, asked.against) == ({"yes"}, {"no"})


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ record.words }}", r"the prompt 'a' does not fit own\.txt: .*no attribute 'words'"),
        ("{{ prompt.__class__.__mro__ }}", "the prompt 'a' does not fit"),
        ("{% include 'other' %}", "the prompt 'a' does not fit"),
        ("{{ prompt", r"template: .*own\.txt:1: "),
        (None, "must be a file or one of fit_and_quality, objects, one_word, shows"),
    ],
)
def test_a_template_that_is_wrong_or_reaches_out_is_refused(tmp_path, template, said):
    file = tmp_path / "own.txt"
    if template is not None:
        file.write_text(template)
    with scripted(says()) as server:
        with pytest.raises(UserError, match=rf"rewards\.vlm_judge.*{said}"):
            ask(judge(server.url, template=str(file)), "a")
    assert not server.sent


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Final Score: 1", 0.0),
        ("Final Score: 5", 1.0),
        ("first 2 cats.\n**Final Score:** 3.5", 0.625),
        ("Final Score: 2, no: final score 4", 0.75),
        (" 3 \n", 0.5),
    ],
)
def test_a_mark_is_put_on_the_scale(text, value):
    with scripted(says(text)) as server:
        assert ask(judge(server.url), "a") == [value]


@pytest.mark.parametrize(
    ("top", "value"),
    [
        ({"Yes": 0.6, "No": 0.2, "The": 0.2}, 0.75),
        ({"Yes": 0.5, " yes": 0.1, "NO": 0.2}, 0.75),
        ({"No": 0.9}, 0.0),
        ({"yes": 1.0}, 1.0),
    ],
)
def test_the_probability_of_yes_is_taken_against_no(top, value):
    with scripted(says("Yes", top)) as server:
        assert ask(judge(server.url, answer="yes"), "a") == [pytest.approx(value)]
    assert request(server)["logprobs"] is True
    assert request(server)["top_logprobs"] == 20


def test_blank_first_tokens_are_passed_over():
    _, _, body = says("\nYes", {"Yes": 0.8, "No": 0.2})
    made = json.loads(body)
    blank = {"token": "\n", "top_logprobs": [{"token": "No", "logprob": 0.0}]}
    made["choices"][0]["logprobs"]["content"].insert(0, blank)
    with scripted((200, {}, json.dumps(made).encode())) as server:
        assert ask(judge(server.url, answer="yes"), "a") == [pytest.approx(0.8)]


LISTED = Prompt(
    "three cows", {"vqa_list": [["How many cows are there?", "three"], ["Is it a cow?", "Yes"]]}
)


def by_question(body):
    """Sure of the cow, and half sure of the number; says the number as word and as digit."""
    text = json.loads(body)["messages"][0]["content"][-1]["text"]
    assert text.endswith("Answer with a single word.")
    return says("x", {"three": 0.3, "3": 0.2, "two": 0.1} if "How" in text else {"Yes": 0.98})


@pytest.mark.parametrize(("mean", "value"), [("arithmetic", 0.74), ("geometric", 0.7)])
def test_listed_questions_are_averaged(mean, value):
    with scripted(by_question) as server:
        made = judge(server.url, answer="listed", mean=mean, concurrency=4)
        assert ask(made, LISTED) == [pytest.approx(value)]
    assert len(server.sent) == 2


def test_a_listed_answer_that_is_not_among_the_likeliest_has_no_probability():
    with scripted(says("x", {"two": 0.9})) as server:
        assert ask(judge(server.url, answer="listed", mean="geometric"), LISTED) == [0.0]


@pytest.mark.parametrize("record", [{}, {"vqa_list": []}, {"vqa_list": [["a"]]}])
def test_a_record_without_questions_is_named_and_nothing_is_asked(record):
    with scripted(by_question) as server:
        with pytest.raises(UserError, match="the prompt 'two' must have vqa_list in its record"):
            ask(judge(server.url, answer="listed"), LISTED, Prompt("two", record))
    assert not server.sent


def test_many_pictures_are_each_given_their_own_score():
    def by_brightness(body):
        data = json.loads(body)["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
        mean = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean()
        return says(f"Final Score: {1 + round(mean / 255 * 4, 2)}")

    pictures = np.stack([np.full((1, 3, 4, 4), v, dtype=np.uint8) for v in range(0, 256, 17)])
    with scripted(by_brightness) as server:
        made = judge(server.url, concurrency=8)
        together = ask(made, *["a"] * 16, pictures=pictures)
        alone = [ask(made, "a", pictures=pictures[i : i + 1])[0] for i in range(16)]
    assert together == alone == sorted(together)
    assert (together[0], together[-1]) == (0.0, 1.0)


# --- what goes wrong -----------------------------------------------------------------------------

NONSENSE = [
    (says("I cannot say."), "gives no mark that pattern finds"),
    (says("Final Score: 11"), "is 11, off the scale of 1 to 5"),
    (says(None), "gives no mark that pattern finds"),
]


@pytest.mark.parametrize(("answer", "said"), NONSENSE)
def test_an_answer_without_a_mark_is_a_missing_score(answer, said):
    with scripted(answer) as server:
        with pytest.raises(UserError, match=rf"rewards\.vlm_judge: \S+ {said}"):
            ask(judge(server.url), "a")
        assert math.isnan(ask(judge(server.url, on_error="drop"), "a")[0])
        assert ask(judge(server.url, on_error=0.25), "a") == [0.25]


def test_a_first_word_that_is_neither_is_a_missing_score():
    with scripted(says("The", {"The": 0.9})) as server:
        with pytest.raises(UserError, match="begins with neither yes nor no: 'The'"):
            ask(judge(server.url, answer="yes"), "a")


def test_a_server_without_logprobs_ends_the_run_at_once():
    with scripted(says("Yes")) as server:
        with pytest.raises(UserError, match="gives no logprobs; take answer: number"):
            ask(judge(server.url, answer="yes", on_error="drop"), "a")


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"choices": []}', b"\xff"])
def test_what_is_no_chat_completion_ends_the_run_at_once(body):
    with scripted((200, {}, body)) as server:
        with pytest.raises(UserError, match="the answer must .*; is it a chat server?"):
            ask(judge(server.url, on_error="drop"), "a")


PASSING = [
    refuses(429, "slow down", {"Retry-After": "0"}),
    refuses(500),
    refuses(503),
    None,  # hangs up
    (200, {"Content-Length": "999", "Connection": "close"}, b'{"choices": ['),  # in the middle
]


@pytest.mark.parametrize("failure", PASSING)
def test_what_may_pass_is_asked_again(failure):
    with scripted(failure, failure, says()) as server:
        assert ask(judge(server.url, patience_seconds=600), "a") == [0.75]
    assert len(server.sent) == 3


@pytest.mark.parametrize("failure", PASSING)
def test_what_does_not_pass_is_a_missing_score(failure):
    with scripted(failure) as server:
        assert math.isnan(ask(judge(server.url, on_error="drop"), "a")[0])
        with pytest.raises(UserError, match=r"1 times in 0 seconds \(patience_seconds\)"):
            ask(judge(server.url), "a")


def test_an_answer_that_takes_too_long_is_given_up():
    with scripted((200, {"Drips": "1"}, b" " * 600)) as server:
        with pytest.raises(UserError, match=r"did not answer within 0\.3 s \(timeout_seconds\)"):
            ask(judge(server.url, timeout_seconds=0.3), "a")


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_question_that_is_declined_costs_its_own_score(status):
    def dislikes_dogs(body):
        return refuses(status, "the content filter") if b"a dog" in body else says()

    with scripted(dislikes_dogs) as server:
        found = ask(judge(server.url, on_error="drop", patience_seconds=600), "a cat", "a dog")
        assert found[0] == 0.75 and math.isnan(found[1])
        with pytest.raises(UserError, match=rf"answered {status} \(the content filter\)"):
            ask(judge(server.url), "a dog")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (refuses(401, f"Incorrect API key provided: {KEY}"), "401; the key in A_KEY is not one"),
        (refuses(403, f"no {KEY}"), "403; the key in A_KEY may not do this"),
        (refuses(404, "no such model"), r"404 \(no such model\); url ends before"),
        (refuses(429, "pay", code="insufficient_quota"), r"429 \(pay\); the account has nothing"),
        (refuses(405, f"what is {KEY}"), r"405 \(what is \[key\]\)"),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), "302; it is a redirect"),
    ],
)
def test_a_refusal_that_stays_ends_the_run_and_never_shows_the_key(
    answer, said, monkeypatch, caplog
):
    monkeypatch.setenv("A_KEY", KEY)
    with scripted(answer) as server:
        made = judge(server.url, token_env="A_KEY", on_error="drop", patience_seconds=600)
        with pytest.raises(UserError, match=said) as caught:
            ask(made, "a")
    assert server.sent[0][0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value) + caplog.text


# --- the key, the budget, the cache --------------------------------------------------------------


def test_the_key_is_in_no_setting_and_no_log(monkeypatch, caplog):
    monkeypatch.setenv("A_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with scripted(says("nonsense")) as server:
        made = judge(server.url, token_env="A_KEY", on_error="drop")
        ask(made, "a")
    assert "the score is missing" in caplog.text
    shown = caplog.text + made.model_dump_json() + repr(made) + repr(pickle.dumps(made))
    assert KEY not in shown


@pytest.mark.parametrize("key", ["", "with space", "naïve"])
def test_a_key_that_is_missing_or_odd_is_refused(monkeypatch, key):
    monkeypatch.setenv("A_KEY", key)
    with pytest.raises(UserError, match="token_env: the environment variable A_KEY must hold") as e:
        judge("http://127.0.0.1:9", token_env="A_KEY").load("cpu")
    assert not key or key not in str(e.value)


def test_an_answer_is_kept_by_picture_question_and_model(tmp_path):
    cache = str(tmp_path / "answers.sqlite")
    with scripted(says()) as server:
        made = judge(server.url, cache=cache)
        first = ask(made, "a", "b")
        assert ask(made, "a", "b") == first
        assert len(server.sent) == 2
        ask(judge(server.url, cache=cache, model="another"), "a")
        ask(judge(server.url, cache=cache, highest=6), "a")
        ask(made, "a", pictures=media(1, size=(6, 4)))
        assert len(server.sent) == 5
    # the server is gone, and what is known is still known
    assert ask(made, "a", "b") == first


def test_the_same_question_about_the_same_picture_is_asked_once():
    with scripted(says()) as server:
        pictures = np.repeat(media(1), 4, axis=0)
        assert ask(judge(server.url, concurrency=4), *["a"] * 4, pictures=pictures) == [0.75] * 4
    assert len(server.sent) == 1


def test_nonsense_is_not_kept(tmp_path):
    made = {"cache": str(tmp_path / "answers.sqlite"), "on_error": "drop"}
    with scripted(says("what?"), says()) as server:
        assert math.isnan(ask(judge(server.url, **made), "a")[0])
        assert ask(judge(server.url, **made), "a") == [0.75]


def test_the_budget_bounds_requests_over_everyone_who_shares_the_cache(tmp_path):
    cache = str(tmp_path / "answers.sqlite")
    with scripted(says()) as server:
        made = judge(server.url, cache=cache, budget_requests=2, on_error="drop")
        assert ask(made, "a") == [0.75]
        found = ask(made, "b", "c")
        assert sorted(map(math.isnan, found)) == [False, True]
        assert ask(made, "a") == [0.75], "what is kept costs nothing"
        with pytest.raises(UserError, match=r"has taken 2 requests \(budget_requests\)"):
            ask(judge(server.url, cache=cache, budget_requests=2), "d")
    assert len(server.sent) == 2


def test_tries_and_tokens_count_too():
    with scripted(refuses(503), says(tokens=70)) as server:
        made = judge(server.url, patience_seconds=600, budget_tokens=70)
        scorer = made.load("cpu")
        assert score(made, scorer, media(1), ["a"]).tolist() == [0.75]
        assert scorer._ledger.spent() == (2, 70)
        with pytest.raises(UserError, match=r"has taken 70 tokens \(budget_tokens\)"):
            score(made, scorer, media(1), ["b"])
    assert len(server.sent) == 2


def test_a_cache_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, but long enough to look at" * 10)
    with pytest.raises(UserError, match=r"rewards\.vlm_judge\.cache cannot be used \(file is not"):
        judge("http://127.0.0.1:9", cache=str(tmp_path / "notes.txt")).load("cpu")


def test_the_cache_holds_no_key_and_no_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    file = tmp_path / "answers.sqlite"
    with scripted(says()) as server:
        ask(judge(server.url, cache=str(file), token_env="A_KEY"), "a secret prompt")
    [[question, reply]] = sqlite3.connect(file).execute("SELECT * FROM answers").fetchall()
    assert len(question) == 64 and json.loads(reply) == {
        "text": "Good. Final Score: 4",
        "chances": None,
    }
    assert KEY.encode() not in file.read_bytes()


@pytest.mark.promise
def test_a_run_with_a_judge_keeps_its_key_to_itself(tmp_path, monkeypatch, capfd):
    """A whole run, and a judge that stumbles, declines and talks nonsense: its scores are missing,
    the run ends well, and no file or line holds the key."""
    from rlalign.alignment.loop import train_local
    from tests.runs import small_run

    monkeypatch.setenv("A_KEY", KEY)
    turns = itertools.cycle([says(), refuses(400, f"not {KEY}"), says("?"), says()])
    with scripted(refuses(503, f"wait, {KEY}"), lambda _: next(turns)) as server:
        settings = {
            "name": "vlm_judge",
            "label": "judge",
            "model": "m",
            "url": f"{server.url}/v1",
            "token_env": "A_KEY",
            "on_error": "drop",
            "concurrency": 1,
            "cache": str(tmp_path / "answers.sqlite"),
        }
        run = small_run("rounds=1", f"rewards={json.dumps([{'name': 'jpeg'}, settings])}")
        train_local(run, tmp_path / "run", resume=False, on_record=print)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["reward/judge/mean"] == 0.75
    assert 0 < line["samples_dropped"] < 8
    assert line["seconds/reward/judge"] > 0 and line["seconds/reward/jpeg"] > 0
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes(), f"the key is in {file}"
    assert KEY not in "".join(capfd.readouterr())


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"url": "ftp://x"}, "url must be a URL such as https://api.example.org/v1"),
        ({"url": "http://10.0.0.1:8000/v1"}, "url must be https for another machine"),
        ({"url": "https://me:hunter2@x.org/v1"}, "a URL with a user, a password"),
        ({"lowest": 5.0}, "lowest must be < highest, got 5 and 5"),
        ({"pattern": "("}, "pattern must be a regular expression"),
        ({"pattern": "score"}, "pattern must have one group"),
        ({"extra": {"messages": []}}, "extra must not hold messages"),
        ({"token_env": "my-key"}, "token_env must match"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, said):
    settings = {"name": "vlm_judge", "model": "m", **changes}
    with pytest.raises(UserError, match=said) as caught:
        build("rewards", settings, "rewards.0")
    assert "hunter2" not in str(caught.value)


def test_the_address_may_be_the_whole_one():
    made = build(
        "rewards",
        {"name": "vlm_judge", "model": "m", "url": "https://x.org/v1/chat/completions/"},
    )
    assert made.url == "https://x.org/v1"


def test_every_template_that_ships_makes_a_question():
    record = {"include": [{"class": "cow", "count": 1}], "vqa_list": [["Is it?", "yes"]]}
    for file in SHIPPED.glob("*.txt"):
        kind = "listed" if file.stem == "one_word" else "number"
        [asked] = Questions(file.stem, kind, "vqa_list", "here").of("a cow", record, (0, 10))
        assert asked.text and "{" not in asked.text
