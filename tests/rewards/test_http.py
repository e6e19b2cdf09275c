"""The client of a reward over HTTP, against real servers: rlalign's own (without Ray), and ones
that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import ssl
import threading

import numpy as np
import pytest
import torch

from rlalign.core.prompts import Prompt, record_of
from rlalign.core.registry import UserError, build
from rlalign.data.shapes import draw, random_scene
from rlalign.rewards.base import score
from rlalign.runtime.serving import answer
from rlalign.web import protocol as http_protocol
from rlalign.web.front import Front
from rlalign.web.listening import bound, listen, url_of
from rlalign.web.token import TOKEN_ENV, digest
from tests.certificates import write_certificate
from tests.runs import metrics, small_run
from tests.servers import scripted

TOKEN = "a-token-of-a-test-0123456789"


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv(TOKEN_ENV, TOKEN)


class Server:
    """rlalign's own server in a thread, with the reward in the same process; can be ended and
    started again."""

    def __init__(self, reward, *, token=TOKEN, **certificate):
        self.reward, self.certificate, self.bodies = reward, certificate, []
        self.scorer = reward.load("cpu")
        self.front = Front(
            title=reward.title, score=self._score, token=digest(token) if token else None
        )
        self.port = 0

    async def _score(self, body):
        self.bodies.append(body)
        return await asyncio.to_thread(answer, self.reward, self.scorer, body)

    def start(self):
        made = bound("127.0.0.1", self.port)
        self.url, self.port = url_of(made, encrypted=bool(self.certificate)), made.getsockname()[1]
        ready = threading.Event()

        async def main():
            self._end = asyncio.current_task().cancel
            self._loop = asyncio.get_running_loop()
            with contextlib.suppress(asyncio.CancelledError):
                await listen(self.front, made, on_ready=ready.set, **self.certificate)

        self._thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
        self._thread.start()
        assert ready.wait(600)
        return self

    def end(self):
        self._loop.call_soon_threadsafe(self._end)
        self._thread.join(600)
        assert not self._thread.is_alive()

    __enter__ = start

    def __exit__(self, *_):
        self.end()


def good(count=2):
    return 200, {}, http_protocol.scores_body(np.arange(count, dtype=np.float32), "x")


def client(url, **changes):
    return build("rewards", {"name": "http", "url": url, **changes})


def ask(reward, media=None, prompts=("a", "b")):
    media = np.zeros((len(prompts), 1, 3, 4, 4), dtype=np.uint8) if media is None else media
    return score(reward, reward.load("cpu"), media, prompts)


def drawn(count):
    scenes = [random_scene(np.random.default_rng(i)) for i in range(count)]
    media = np.stack([draw(s, np.random.default_rng(i)) for i, s in enumerate(scenes)])
    return np.ascontiguousarray(media.transpose(0, 3, 1, 2))[:, None], [s.caption for s in scenes]


# --- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jpeg", "shapes"])
def test_scores_are_bitwise_those_of_the_reward_itself(name):
    media, prompts = drawn(20)
    reward = build("rewards", {"name": name})
    with Server(reward) as server:
        found = ask(client(server.url, batch=7), media, prompts)
    np.testing.assert_array_equal(found, score(reward, reward.load("cpu"), media, prompts))
    assert len(server.bodies) == 3


def length_of_words(media_BFCHW, prompts):
    return torch.tensor([float(len(record_of(prompt).get("words", ""))) for prompt in prompts])


def test_records_arrive_at_the_reward():
    media, _ = drawn(3)
    prompts = [Prompt("a sign", {"words": "OPEN"}), "a cat", Prompt("a sign", {"words": "NO"})]
    reward = build(
        "rewards", {"name": "function", "call": "tests.rewards.test_http:length_of_words"}
    )
    with Server(reward) as server:
        assert ask(client(server.url, batch=2), media, prompts).tolist() == [4.0, 0.0, 2.0]


def test_an_older_server_that_knows_no_records_is_said():
    said = b'{"error": "the body must be a JSON object with the keys \\"prompts\\" and no others"}'
    with scripted((400, {}, said)) as server, pytest.raises(UserError, match="an older server"):
        ask(client(server.url), prompts=(Prompt("a", {"n": 1}), "b"))


def test_every_pixel_arrives_as_it_was():
    media = np.arange(256, dtype=np.uint8).reshape(1, 2, 1, 16, 8).repeat(3, axis=2)
    with Server(build("rewards", {"name": "jpeg"})) as server:
        ask(client(server.url), media, ["a"])
    arrived, prompts = http_protocol.read_request(server.bodies[0])
    np.testing.assert_array_equal(arrived, media)
    assert prompts == ["a"]


@pytest.mark.slow
def test_a_run_has_the_same_metrics_as_with_the_reward_itself(tmp_path):
    from rlalign.alignment.loop import train_local

    def trained(folder, reward):
        run = small_run(
            "rounds=1", "plan.steps=2", "evaluate.every=0", f"rewards={json.dumps([reward])}"
        )
        train_local(run, folder, resume=False, on_record=lambda _: None)
        return metrics(folder)

    with Server(build("rewards", {"name": "jpeg"})) as server:
        there = trained(tmp_path / "there", {"name": "http", "url": server.url, "label": "jpeg"})
    assert server.bodies
    assert there == trained(tmp_path / "here", {"name": "jpeg"})
    for file in (tmp_path / "there").rglob("*"):
        assert file.is_dir() or TOKEN.encode() not in file.read_bytes(), f"the token is in {file}"


def test_a_score_that_failed_there_is_the_clients_to_answer_for():
    reward = build(
        "rewards", {"name": "function", "call": "tests.rewards.test_http:missing_when_dark"}
    )
    media = np.stack([np.full((1, 3, 4, 4), v, dtype=np.uint8) for v in (0, 255)])
    with Server(reward) as server:
        assert np.isnan(ask(client(server.url, on_error="drop"), media)).tolist() == [True, False]
        assert ask(client(server.url, on_error=-3.0), media).tolist() == [-3.0, 1.0]
        with pytest.raises(
            UserError, match=r"rewards\.http returned nan for 'a'; set its on_error"
        ):
            ask(client(server.url), media)


def missing_when_dark(media_BFCHW, prompts):
    value_B = media_BFCHW.mean((1, 2, 3, 4))
    return torch.where(value_B > 0, value_B, torch.nan)


def fails_when_dark(media_BFCHW, prompts):
    if (media_BFCHW.mean((1, 2, 3, 4)) == 0).any():
        raise RuntimeError("too dark\nTraceback (most recent call last)")
    return media_BFCHW.mean((1, 2, 3, 4))


def test_a_reward_that_fails_there_is_said_in_one_sentence_or_dropped_alone():
    reward = build(
        "rewards", {"name": "function", "call": "tests.rewards.test_http:fails_when_dark"}
    )
    media = np.stack([np.full((1, 3, 4, 4), v, dtype=np.uint8) for v in (0, 255)])
    with Server(reward) as server:
        with pytest.raises(
            UserError,
            match=r"answered 500: the reward function failed: RuntimeError: too dark; see",
        ) as e:
            ask(client(server.url), media)
        assert "Traceback" not in str(e.value)
        assert np.isnan(ask(client(server.url, on_error="drop"), media)).tolist() == [True, False]


def test_a_prompt_that_the_reward_cannot_score_is_a_users_mistake():
    with Server(build("rewards", {"name": "shapes"})) as server:
        with pytest.raises(
            UserError, match=r"answered 422: rewards\.shapes: prompt 'a' is not a caption of shapes"
        ):
            ask(client(server.url, on_error="drop"))


# --- who is let in -------------------------------------------------------------------------------


def test_a_wrong_token_is_refused_at_once(monkeypatch):
    """Also with a large body, which the server does not take in."""
    monkeypatch.setenv("OTHER_TOKEN", "quite-another-token-0123456789")
    media = np.random.default_rng(0).integers(0, 256, (8, 1, 3, 512, 512), dtype=np.uint8)
    with Server(build("rewards", {"name": "jpeg"})) as server:
        with pytest.raises(
            UserError, match=r"answered 401: .*; the token in OTHER_TOKEN is not the server's"
        ) as refused:
            ask(client(server.url, token_env="OTHER_TOKEN"), media, ["a"] * 8)
    assert server.bodies == []
    assert "quite-another" not in str(refused.value)


def test_without_a_token_on_both_sides(monkeypatch):
    monkeypatch.delenv(TOKEN_ENV)
    with Server(build("rewards", {"name": "jpeg"}), token=None) as server:
        assert ask(client(server.url, token_env="")).shape == (2,)
        with pytest.raises(
            UserError,
            match=rf"rewards\.http\.token_env: the environment variable {TOKEN_ENV} must hold",
        ):
            ask(client(server.url))


def test_the_token_is_neither_shown_nor_sent_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    (tmp_path / ".netrc").chmod(0o600)
    with (
        scripted(good()) as other,
        scripted((307, {"Location": other.url + "/score"}, b"")) as server,
    ):
        monkeypatch.setenv("HTTP_PROXY", other.url)
        monkeypatch.setenv("http_proxy", other.url)
        reward = client(server.url)
        with pytest.raises(
            UserError,
            match="answered 307; it is a redirect, and the token goes to no other address",
        ):
            ask(reward)
        assert server.sent[0][0]["Authorization"] == f"Bearer {TOKEN}"
        assert other.sent == []
    scorer = reward.load("cpu")
    assert TOKEN not in f"{reward!r} {scorer!r} {reward.model_dump_json()}"
    assert TOKEN.encode() not in pickle.dumps(reward)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"url": "scores.example.org"}, r"rewards\.url must be a URL such as"),
        ({"url": "ftp://127.0.0.1"}, r"rewards\.url must be a URL such as"),
        ({"url": "http://127.0.0.1:port"}, r"rewards\.url must be a URL such as"),
        ({"url": "https://me:hunter2@example.org"}, r"rewards\.url: a URL with a user, a password"),
        (
            {"url": "https://example.org/?key=hunter2"},
            r"rewards\.url: a URL with a user, a password",
        ),
        ({"url": "http://scores.example.org"}, r"rewards\.url must be https for another machine"),
        ({"url": "http://0.0.0.0:8900"}, r"rewards\.url must be https for another machine"),
        ({"token_env": "not-a-name"}, r"rewards\.token_env must match"),
        ({"timeout_seconds": 0}, r"rewards\.timeout_seconds must be > 0"),
        ({"batch": 257}, r"rewards\.batch must be <= 256"),
    ],
)
def test_settings_that_are_refused(settings, rule):
    with pytest.raises(UserError, match=rule) as refused:
        build("rewards", {"name": "http", **settings})
    assert "hunter2" not in str(refused.value)


def test_plain_http_to_another_machine_when_asked_for():
    assert (
        client("http://scores.example.org", allow_plain_http=True).url
        == "http://scores.example.org"
    )


def test_https_trusts_only_who_is_named(tmp_path):
    pem, key = write_certificate(tmp_path, "IP:127.0.0.1")
    assert ssl.create_default_context(cafile=pem)
    with Server(
        build("rewards", {"name": "jpeg"}), ssl_certfile=str(pem), ssl_keyfile=str(key)
    ) as server:
        assert server.url.startswith("https://")
        with pytest.raises(
            UserError, match="its certificate is not trusted; name who signed it in ca_file"
        ):
            ask(client(server.url))
        assert ask(client(server.url, ca_file=str(pem))).shape == (2,)
    with pytest.raises(UserError, match=r"rewards\.http\.ca_file: no such file 'nowhere\.pem'"):
        ask(client(server.url, ca_file="nowhere.pem"))


# --- servers that misbehave ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        (503, {"Retry-After": "0"}, b""),
        (429, {}, b"{}"),
        (502, {}, b"<html>"),
        (504, {}, b""),
        None,
    ],
)
def test_a_failure_that_passes_is_tried_again(first):
    with scripted(first, first, good()) as server:
        assert ask(client(server.url)).tolist() == [0.0, 1.0]
    assert len(server.sent) == 3
    assert server.sent[0][1] == server.sent[2][1], "the same request"


@pytest.mark.parametrize("seconds", [1.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_a_server_that_is_down_for_a_while_is_waited_for(seconds):
    """It dies between two requests and comes back on the same port; the scores are as if it had
    not."""
    media, prompts = drawn(6)
    reward = build("rewards", {"name": "jpeg"})
    server = Server(reward).start()
    asker = client(server.url)
    scorer = asker.load("cpu")
    before = score(asker, scorer, media, prompts)
    server.end()
    found = []
    waiting = threading.Thread(
        target=lambda: found.append(score(asker, scorer, media, prompts)), daemon=True
    )
    waiting.start()
    waiting.join(seconds)
    assert waiting.is_alive(), "nobody answers, and it keeps trying"
    with server:
        waiting.join()
    np.testing.assert_array_equal(found, [before])


@pytest.mark.parametrize("down", [None, (503, {}, b'{"error": "too many requests"}')])
def test_patience_has_an_end_and_then_the_policy_decides(down):
    with scripted(down) as server:
        with pytest.raises(
            UserError,
            match=r"rewards\.http: http://127.* times in \d+ seconds \(patience_seconds\); is it",
        ):
            ask(client(server.url, patience_seconds=0.5))
        assert len(server.sent) > 1
        assert np.isnan(ask(client(server.url, patience_seconds=0.1, on_error="drop"))).all()
        assert ask(client(server.url, patience_seconds=0.1, on_error=-1.0)).tolist() == [-1.0, -1.0]


def test_nobody_at_the_address():
    made = bound("127.0.0.1", 0)
    with pytest.raises(
        UserError, match=r"does not answer \(ConnectionError\), 1 times in 0 seconds"
    ):
        ask(client(url_of(made, encrypted=False), patience_seconds=0))
    made.close()


def test_an_answer_that_does_not_come_is_given_up():
    """One server is silent, one sends a byte now and then: both are over the timeout."""
    hold = threading.Event()

    async def silent(body):
        await asyncio.to_thread(hold.wait)
        return 200, b"{}"

    with Server(build("rewards", {"name": "jpeg"})) as server:
        server.front.score = silent
        with pytest.raises(
            UserError, match=r"did not answer within 0\.3 s \(timeout_seconds\), 1 times"
        ):
            ask(client(server.url, timeout_seconds=0.3, patience_seconds=0))
        hold.set()
    with scripted((200, {"Drips": "yes"}, b" " * 100)) as server:
        with pytest.raises(
            UserError, match=r"did not answer within 0\.3 s \(timeout_seconds\), 1 times"
        ):
            ask(client(server.url, timeout_seconds=0.3, patience_seconds=0))


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        ((200, {}, b"<html>"), "the answer must be JSON; is it a reward server"),
        ((200, {}, b'{"scores": [1]}'), "a list of 2 numbers or nulls, got 1"),
        ((200, {}, b'{"scores": [1, "2"]}'), r"scores\[1\] must be a number"),
        ((200, {}, b" " * (2**20 + 1)), "the answer is larger than 1,048,576 bytes"),
        ((200, {"Content-Encoding": "gzip"}, b"x"), "the answer must not be compressed"),
        ((400, {}, b'{"error": "the body is bad"}'), "answered 400: the body is bad"),
        ((404, {}, b""), "answered 404; url is the address without /score"),
        ((413, {}, b""), "answered 413; lower batch"),
        (
            (500, {}, b'{"error": "it broke\\nTraceback: secret"}'),
            "answered 500: it broke; see the server's log",
        ),
        ((418, {}, b'{"error": {"a": 1}}'), "answered 418$"),
    ],
)
def test_an_answer_that_makes_no_sense_names_the_url_and_the_rule(answer, rule):
    with scripted(answer) as server:
        with pytest.raises(
            UserError, match=rf"^rewards\.http: {server.url}/score:? .*{rule}"
        ) as refused:
            ask(client(server.url))
    assert len(server.sent) == 1, "asking again would not help"
    assert "secret" not in str(refused.value)
