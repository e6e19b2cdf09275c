"""The page's parts that need no server: languages, words, rates, tokens, settings."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

import pytest

from rlalign.core.registry import UserError
from rlalign.web.vote.people import MANY_PEOPLE, ONE_PERSON, Secret, join_url, read_secret
from rlalign.web.vote.rates import Rate, network_of
from rlalign.web.vote.results import lay_out
from rlalign.web.vote.templates import FREE_KEYS, REASON_KEYS, STATIC, TEMPLATES, reason_keys
from rlalign.web.vote.words import LANGUAGES, choose_language, read_blocked, read_languages

# --- languages ------------------------------------------------------------------------------------


def test_every_text_that_the_page_asks_for_is_in_every_language() -> None:
    languages = read_languages()
    assert {"en", "ja"} <= set(languages)
    asked = set()
    for file in TEMPLATES.iterdir():
        asked |= set(re.findall(r"words\.(\w+)", file.read_text(encoding="utf-8")))
    for file in STATIC.glob("*.js"):
        asked |= set(re.findall(r"words\.(\w+)", file.read_text(encoding="utf-8")))
    for texts in languages.values():
        assert asked <= set(texts)
    made = ("error_", "wait_", "reason_", "results_", "language")
    assert {key for key in languages["en"] if not key.startswith(made)} <= asked, "none is idle"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda texts: texts.pop("skip"), "missing: skip"),
        (lambda texts: texts.update(more="x"), "not known: more"),
        (lambda texts: texts.update(progress="{done}"), r"progress must hold the places"),
        (lambda texts: texts.update(skip=1), "whose values are texts"),
    ],
)
def test_a_language_that_is_not_whole_is_refused(tmp_path: Path, change, rule: str) -> None:
    texts = json.loads((LANGUAGES / "en.json").read_text(encoding="utf-8"))
    change(texts)
    (tmp_path / "de.json").write_text(json.dumps(texts), encoding="utf-8")
    with pytest.raises(UserError, match=rule):
        read_languages(tmp_path)


def test_a_folder_of_languages_comes_on_top(tmp_path: Path) -> None:
    texts = json.loads((LANGUAGES / "en.json").read_text(encoding="utf-8"))
    (tmp_path / "de.json").write_text(json.dumps({**texts, "language": "Deutsch"}), "utf-8")
    assert read_languages(tmp_path)["de"]["language"] == "Deutsch"


@pytest.mark.parametrize(
    ("wanted", "accepted", "chosen"),
    [
        ("ja", "en", "ja"),
        ("xx", "ja,en;q=0.5", "ja"),
        ("", "en;q=0.4, ja-JP;q=0.9", "ja"),
        ("", "fr, de", "en"),
        ("", "ja;q=x", "en"),
        ("", "", "en"),
    ],
)
def test_the_language_is_the_chosen_one_else_the_browsers(
    wanted: str, accepted: str, chosen: str
) -> None:
    assert choose_language(wanted, accepted, ["en", "ja"]) == chosen


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "held"),
    [
        ("a nude figure", True),
        ("NUDE", True),
        ("ｎｕｄｅ figure", True),
        ("nüde", True),
        ("nu\u200bde", True),
        ("self-harm", True),
        ("a denuded hill in Essex", False),
        ("a sailor, sextant in hand", False),
        ("ヌードの絵", True),
        ("ヌートリアと黄色いイエローの花", False),
        ("", False),
    ],
)
def test_words_are_found_whole_in_any_spelling(prompt: str, held: bool) -> None:
    assert read_blocked().holds(prompt) is held


def test_the_list_of_words_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("# none of these\nPurple  cow # a poem\n", encoding="utf-8")
    blocked = read_blocked(file)
    assert blocked.holds("one purple, cow") and not blocked.holds("purple hen and cow")
    with pytest.raises(UserError, match="the list of words must be a text file"):
        read_blocked(tmp_path / "none.txt")


# --- rates and tokens -----------------------------------------------------------------------------


def test_a_rate_lets_a_burst_pass_and_then_so_many_a_second() -> None:
    now = [0.0]
    rate = Rate(per_second=2.0, burst=3, clock=lambda: now[0], most=2)
    assert [rate.take("one") for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert rate.take("two") == 0.0
    now[0] = 0.5
    assert [rate.take("one") for _ in range(2)] == [0.0, 0.5]
    now[0] = 60.0
    assert [bool(rate.take("one")) for _ in range(4)] == [False, False, False, True]
    rate.take("two")
    rate.take("three")  # "one" asked longest ago, and is forgotten
    assert rate.take("one") == 0.0


def test_an_address_is_one_of_version_4_or_a_network_of_version_6() -> None:
    assert network_of("192.0.2.7") == "192.0.2.7"
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:2") == "2001:db8::/64"
    assert network_of("2001:db8:0:1::1") != network_of("2001:db8::1")
    assert network_of("::ffff:192.0.2.7") == "192.0.2.7"
    assert network_of("none") == "none"


def test_the_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    made = read_secret(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_secret(file).text == made.text
    assert [one.name for one in tmp_path.iterdir()] == ["secret"]
    file.write_text("short\n", encoding="utf-8")
    with pytest.raises(UserError, match="the secret of a page has at least"):
        read_secret(file)


def test_tokens_and_keys_hold_for_their_page_and_person() -> None:
    secret, other = Secret("a" * 20), Secret("b" * 20)
    one, many = secret.invitation(), secret.invitation(many=True)
    assert (secret.invites(one), secret.invites(many)) == (ONE_PERSON, MANY_PEOPLE)
    assert one != secret.invitation()
    for token in (one, one[:-1], one + "x", "", "p", "\u00e9"):
        assert other.invites(token) is None
    key = secret.key_of("ada", "0123")
    assert secret.uid_of("ada", key) == "0123"
    assert secret.uid_of("grace", key) is None
    assert other.uid_of("ada", key) is None
    assert join_url("https://vote.example.org/", "t") == "https://vote.example.org/#join=t"


def test_reasons_have_letters_of_their_own() -> None:
    keys = reason_keys(("looks", "prompt", "mood", "light"))
    assert keys == {"looks": "l", "prompt": "f", "mood": "b", "light": "c"}
    assert len(set(FREE_KEYS) | set(REASON_KEYS.values())) == len(FREE_KEYS) + len(REASON_KEYS)
    assert not (set(FREE_KEYS) | set(REASON_KEYS.values())) & set("suzmn")


def test_results_are_laid_out_on_one_scale() -> None:
    """Two policies with intervals from -1 to 1 and an anchor at 0, by hand."""
    share = {"count": 3, "of": 4, "value": 0.75, "interval": (0.30, 0.95)}
    none = {"count": 0, "of": 0, "value": None, "interval": (0.0, 1.0)}
    quality = {"annotator": "f" * 32, "votes": 4, "skips": 1, "gold": share, "repeats": none}
    quality |= {"left": share, "ties": none, "median_ms": 2340.0}
    standing = {"wins": 3.0, "votes": 4, "win_rate": 0.6, "more_votes": 190}
    found = {
        "choices": {"left": 3, "right": 1, "skip": 1},
        "by_rule": {"random": 1, "fisher": 3},
        "people": [{"quality": quality, "name": "", "status": "left_out", "fault": ""}],
        "per_hour": [(0.0, 2), (3600.0, 4)],
        "gold": share,
        "repeats": none,
        "left": share,
        "agreement": None,
        "agreement_interval": (None, None),
        "alpha": None,
        "usual_alpha": (0.2, 0.5),
        "disagreement": [{"caption": "c", "uids": ("a", "b"), "votes": [1, 1], "none": 2}],
        "ranking": {
            "anchor": "base",
            "left": -0.1,
            "left_low": -0.2,
            "left_high": 0.0,
            "wins": ((0.0, 3.0), (1.0, 0.0)),
            "standings": (
                {"policy": "new", "strength": 0.5, "low": -1.0, "high": 1.0, **standing},
                {"policy": "base", "strength": 0.0, "low": 0.0, "high": 0.0, **standing},
            ),
        },
    }
    page = lay_out(found, read_languages()["en"], str.upper)
    line = page["ranking"]["lines"][0]
    assert (line["from"], line["at"], line["to"]) == (0.0, 165.0, 220.0)
    assert (page["ranking"]["zero"], line["interval"]) == (110.0, "−1.00 … 1.00")
    assert page["rules"] == [{"rule": "fisher", "votes": "3"}, {"rule": "random", "votes": "1"}]
    assert [hour["height"] for hour in page["hours"]] == [50.0, 100.0]
    assert page["disagreement"][0]["pictures"] == [
        {"key": "A", "votes": 1},
        {"key": "B", "votes": 1},
    ]
    cards = {card["name"]: (card["value"], card["note"]) for card in page["cards"]}
    assert cards["Votes"] == ("4", "1 skipped")
    assert cards["People"] == ("0", "1 left out")
    assert cards["Known answers found"] == ("75 %", "30 % … 95 % · 3 / 4")
    assert cards["Krippendorff's alpha"] == ("–", "preferences usually reach 0.2 to 0.5")
    assert page["people"][0]["name"] == "ffffffff" and page["people"][0]["seconds"] == "2.3"
