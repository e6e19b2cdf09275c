"""What may travel between a reward's client and its server, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rlalign.core.prompts import Prompt, record_of
from rlalign.core.registry import UserError
from rlalign.web import protocol as http_protocol
from rlalign.web import token as http_token
from rlalign.web.protocol import read_request, read_scores, requests_of, scores_body
from rlalign.web.refused import Refused


def media_of(samples=3, frames=2, height=5, width=7):
    return np.random.default_rng(0).integers(
        0, 256, (samples, frames, 3, height, width), dtype=np.uint8
    )


def body(**changes):
    text = base64.b64encode(http_protocol.png(media_of()[0, 0])).decode()
    return json.dumps({"prompts": ["a"], "media": [[text]], **changes}).encode()


def encoded(file: bytes) -> bytes:
    return body(media=[[base64.b64encode(file).decode()]])


def chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def png_of(width=2, height=2, *, kind=(8, 2, 0, 0, 0), before=b"", data=None) -> bytes:
    """A PNG made by hand, of black pixels unless the image data is given."""
    data = zlib.compress(bytes(height * (1 + 3 * width))) if data is None else data
    header = chunk(b"IHDR", struct.pack(">II", width, height) + bytes(kind))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (4, 4)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("most", [1, 2, 3, 256])
def test_what_is_sent_is_what_arrives(most):
    media, prompts = media_of(), ["a red circle", 'quotes " and \\', "grüße 🟥\n"]
    sent = list(requests_of(media, prompts, most))
    assert [count for count, _ in sent] == {1: [1, 1, 1], 2: [2, 1], 3: [3], 256: [3]}[most]
    back = [read_request(b) for _, b in sent]
    found = np.concatenate([m for m, _ in back])
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, media)
    assert [one for _, p in back for one in p] == prompts


def test_records_are_sent_with_the_prompts_that_have_some():
    prompts = ["a", Prompt("b", {"tag": "grün", "include": [{"count": 2}]}), "c"]
    sent = [body for _, body in requests_of(media_of(), prompts, 2)]
    assert [sorted(json.loads(one)) for one in sent] == [
        ["media", "prompts", "records"],
        ["media", "prompts"],
    ], "what an older server takes, where no prompt has one"
    back = [one for body in sent for one in read_request(body)[1]]
    assert back == prompts
    assert [dict(record_of(one)) for one in back] == [{}, dict(record_of(prompts[1])), {}]


def test_a_record_too_large_for_a_request_is_a_users_mistake():
    large = Prompt("a", {"text": "x" * http_protocol.MAX_RECORD_BYTES})
    with pytest.raises(UserError, match=r"at most 65,536 bytes as JSON, got 65,548 of 'a'"):
        list(requests_of(media_of(1), [large], 2))


def test_requests_keep_to_the_limits(monkeypatch):
    media, prompts = media_of(6), list("abcdef")
    [(_, whole)] = requests_of(media, prompts, 256)
    monkeypatch.setattr(http_protocol, "MAX_BODY_BYTES", len(whole) // 2)
    sent = list(requests_of(media, prompts, 256))
    assert len(sent) > 1
    assert all(len(b) <= len(whole) // 2 for _, b in sent)
    np.testing.assert_array_equal(np.concatenate([read_request(b)[0] for _, b in sent]), media)
    monkeypatch.setattr(http_protocol, "MAX_PIXELS", 2 * 2 * 5 * 7)
    assert [count for count, _ in requests_of(media, prompts, 256)] == [2, 2, 2]


def test_a_sample_too_large_for_any_request_is_a_users_mistake(monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_protocol, "MAX_BODY_BYTES", 500)
        with pytest.raises(UserError, match=r"bytes is too large .* or fewer frames"):
            list(requests_of(media_of(frames=9), list("abc"), 4))
    monkeypatch.setattr(http_protocol, "MAX_FRAMES", 1)
    with pytest.raises(UserError, match=r"2 frames of 7 x 5 is too large .* at most 1 frames"):
        list(requests_of(media_of(), list("abc"), 4))


@pytest.mark.parametrize(
    ("status", "rule", "wrong"),
    [
        (400, "must be JSON", b""),
        (400, "must be JSON", b"\xff\xfe"),
        (400, "must be JSON", b'{"prompts": [NaN], "media": [[]]}'),
        (400, "must be JSON", b'{"prompts": [], "prompts": [], "media": []}'),
        (400, "must be JSON", b"9" * 10_000),
        (400, "nested too deeply", b"[" * 200_000),
        (400, "keys", b"[]"),
        (400, "keys", body(more=1)),
        (400, "same length", body(prompts=[])),
        (400, "same length", body(prompts="a")),
        (400, "same length", body(prompts=["a", "b"])),
        (400, r"prompts\[0\] must be text", body(prompts=[None])),
        (400, r"prompts\[0\] must be text", body(prompts=["\ud800"])),
        (413, r"prompts\[0\] has more", body(prompts=["a" * 10_001])),
        (413, "at most 256 samples, got 257", body(prompts=["a"] * 257, media=[["x"]] * 257)),
        (413, "at most 256 frames, got 257", body(media=[["x"] * 257])),
        (400, "list of frames", body(media=[[]])),
        (400, "list of frames", body(media=["x"])),
        (400, "list of frames", body(prompts=["a", "b"], media=[["x"], ["x", "x"]])),
        (400, "PNG in base64", body(media=[[5]])),
        (400, "PNG in base64", body(media=[["not base64!"]])),
        (400, "PNG in base64", body(media=[["ü"]])),
        (400, "PNG in base64", encoded(b"GIF89a" + bytes(40))),
        (400, "8 bits a channel", encoded(saved("L"))),
        (400, "8 bits a channel", encoded(saved("RGBA"))),
        (400, "8 bits a channel", encoded(saved("P"))),
        (400, "8 bits a channel", encoded(png_of(kind=(16, 2, 0, 0, 0)))),
        (400, "8 bits a channel", encoded(png_of(kind=(8, 2, 0, 0, 1)))),
        (413, "sides from 1 to 8192 pixels, got 0 x 2", encoded(png_of(0))),
        (413, "got 2147483647 x 2", encoded(png_of(2**31 - 1, data=b""))),
        (400, "not a whole PNG", encoded(png_of()[:-14])),
        (400, "not a whole PNG", encoded(png_of(data=zlib.compress(b"\0")))),
        (400, "not a whole PNG", encoded(png_of(data=b"no zlib"))),
    ],
)
def test_what_is_malformed_is_refused_in_one_sentence(status, rule, wrong):
    with pytest.raises(Refused, match=rule) as refused:
        read_request(wrong)
    assert refused.value.status == status
    assert len(refused.value.sentence) < 200 and "\n" not in refused.value.sentence


def test_pictures_of_one_request_have_one_size():
    files = [base64.b64encode(png_of(width)).decode() for width in (2, 3)]
    with pytest.raises(Refused, match=r"media\[1\]\[0\] is 3 x 2 and the first 2 x 2: one size"):
        read_request(body(prompts=["a", "b"], media=[[f] for f in files]))


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    """Many large pictures in a small body: the sizes in the headers are added up first."""
    monkeypatch.setattr(http_protocol, "_decoded", lambda *_: pytest.fail("decoded"))
    bomb = base64.b64encode(png_of(8192, 8192, data=b"")).decode()
    with pytest.raises(Refused, match="at most 67,108,864 pixels") as refused:
        read_request(body(prompts=["a", "b"], media=[[bomb], [bomb]]))
    assert refused.value.status == 413


def test_texts_inside_a_picture_are_not_unpacked():
    """A compressed text may unpack to anything; the picture is read without it."""
    text = chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(10**8)))
    media, _ = read_request(encoded(png_of(before=text)))
    np.testing.assert_array_equal(media, np.zeros((1, 1, 3, 2, 2), dtype=np.uint8))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 10_000))
def test_a_damaged_request_is_read_or_refused(noise, at):
    """Bytes put over a good request: nothing but Refused comes out of it."""
    [(_, good)] = requests_of(media_of(2), ["a", "b"], 2)
    at %= len(good)
    status = 200
    try:
        media, prompts = read_request(good[:at] + noise + good[at + len(noise) :])
        assert media.shape[0] == len(prompts)
    except Refused as refused:
        status = refused.status
    assert status in (200, 400, 413)


def test_scores_survive_the_way_bitwise():
    score_B = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * np.float32(1e-30)
    score_B[:3] = [np.nan, np.inf, -np.inf]
    back = np.array(read_scores(scores_body(score_B, "x"), 1000), dtype=np.float32)
    assert np.isnan(back[:3]).all()
    np.testing.assert_array_equal(back[3:], score_B[3:])


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        ("must be JSON", b"<html>"),
        ("must be JSON", b'{"scores": [NaN]}'),
        ("must be JSON", b"[" * 200_000),
        ("list of 1 numbers or nulls, got none", b"{}"),
        ("list of 1 numbers or nulls, got none", b"[1]"),
        ("got 2", b'{"scores": [1, 2]}'),
        (r"scores\[0\] must be a number", b'{"scores": ["1"]}'),
        (r"scores\[0\] must be a number", b'{"scores": [true]}'),
        (r"scores\[0\] must be a number that float32 holds", b'{"scores": [1e39]}'),
    ],
)
def test_a_malformed_answer_is_an_error(rule, wrong):
    with pytest.raises(ValueError, match=rule):
        read_scores(wrong, 1)
    assert math.isnan(read_scores(b'{"scores": [null]}', 1)[0])


def test_a_token_is_compared_whole():
    kept = http_token.digest("a-token-of-some-length")
    assert http_token.knows_token([b"Bearer a-token-of-some-length"], kept)
    assert http_token.knows_token([b"bearer  a-token-of-some-length "], kept)
    for wrong in (
        [],
        [b"a-token-of-some-length"],
        [b"Bearer "],
        [b"Bearer a-token-of-some-lengt"],
        [b"Basic x"],
    ):
        assert not http_token.knows_token(wrong, kept)
    assert not http_token.knows_token([b"Bearer a-token-of-some-length"] * 2, kept)
    assert not http_token.knows_token([b"Bearer \xff\xfe"], kept)


@pytest.mark.parametrize(
    "weak", ["", "short", "with a space in the middle", "ümlaut-ümlaut-ümlaut"]
)
def test_a_weak_token_is_refused_and_not_shown(monkeypatch, weak):
    monkeypatch.setenv("SOME_TOKEN", weak)
    with pytest.raises(
        UserError, match=r"^here: the environment variable SOME_TOKEN must hold the token"
    ) as refused:
        http_token.read_token("SOME_TOKEN", "here")
    assert not weak or weak not in str(refused.value)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *(
            ("127.0.0.1", True),
            ("127.9.9.9", True),
            ("::1", True),
            ("localhost", True),
            ("0.0.0.0", False),
        ),
        *(
            ("::", False),
            ("10.0.0.1", False),
            ("localhost.example.org", False),
            ("127.0.0.1.example.org", False),
        ),
    ],
)
def test_loopback_is_this_machine_only(host, expected):
    assert http_token.is_loopback(host) is expected
