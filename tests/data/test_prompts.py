"""Sources of prompts, and how a round's prompts are dealt to units."""

from __future__ import annotations

import itertools

import pytest
import torch

from rlalign.core.records import Plan
from rlalign.core.registry import UserError, build
from rlalign.data import shapes
from rlalign.data.prompts.base import Prompts, prompt_id
from rlalign.diffusion.noise import unit_noise

PLAN = Plan(steps=3)
WORDS = [f"prompt {i}" for i in range(10)]


def prompts(name: str, **settings) -> Prompts:
    return build("prompts", {"name": name, **settings})


def listed(words=WORDS, **settings) -> Prompts:
    return prompts("list", prompts=words, **settings)


def rows(units):
    """(prompt, prompt id, sample id) of every sample of a round, in order."""
    return [row for u in units for row in zip(u.prompts, u.prompt_ids, u.sample_ids, strict=True)]


# prompt ids


def test_an_id_is_a_stable_63_bit_number_of_the_text():
    assert prompt_id("a red circle") == 5070956507599001626, "pinned: it is part of the noise's key"
    assert prompt_id("ein grüner Kreis") != prompt_id("ein gruener Kreis")
    assert all(0 <= prompt_id(w) < 2**63 for w in WORDS)


def test_no_two_captions_share_an_id():
    everything = [c for split in shapes.SPLITS for c in shapes.captions(split)]
    assert len({prompt_id(c) for c in everything}) == len(everything)


# drawing


def test_a_round_is_drawn_by_seed_and_round_alone():
    source = listed(per_round=4, per_unit=2)
    assert source.draw(0, 1) == listed(per_round=4, per_unit=4, samples_per_prompt=9).draw(0, 1)
    assert source.draw(0, 1) != source.draw(0, 2)
    assert source.draw(0, 1) != source.draw(1, 1)
    assert all(number == prompt_id(text) for number, text in source.draw(0, 1))


def test_a_round_has_no_prompt_twice_while_the_pool_lasts():
    for round in range(20):
        drawn = [text for _, text in listed(per_round=10, per_unit=5).draw(0, round)]
        assert sorted(drawn) == sorted(WORDS)


def test_a_small_pool_is_used_evenly():
    drawn = [text for _, text in listed(per_round=25, per_unit=5).draw(0, 1)]
    assert len(drawn) == 25
    assert {drawn.count(word) for word in WORDS} == {2, 3}


def test_over_many_rounds_every_prompt_gets_its_share():
    """2 000 rounds of 4 out of 10, seed 0: each prompt 800 times, within 4.5 standard deviations of
    a hypergeometric draw."""
    source = listed(per_round=4, per_unit=4)
    counts = dict.fromkeys(WORDS, 0)
    for round in range(2000):
        for _, text in source.draw(0, round):
            counts[text] += 1
    spread = (2000 * 0.4 * 0.6) ** 0.5
    assert all(abs(n - 800) < 4.5 * spread for n in counts.values())


# units


def test_units_hold_consecutive_prompts_each_repeated():
    source = listed(per_round=6, per_unit=2, samples_per_prompt=3)
    units = source.units(7, 5, PLAN)
    assert [str(u.key) for u in units] == ["train/5/0", "train/5/1", "train/5/2"]
    expected = [text for _, text in source.draw(7, 5) for _ in range(3)]
    assert [text for u in units for text in u.prompts] == expected
    for unit in units:
        assert len(unit.prompts) == 6
        assert unit.sample_ids == (0, 1, 2, 0, 1, 2)
        assert unit.prompt_ids == tuple(prompt_id(p) for p in unit.prompts)
        assert unit.seed == 7
        assert unit.plan == PLAN


@pytest.mark.parametrize("words", [WORDS, WORDS[:1], ["same", "same", "other"]])
def test_no_two_samples_of_a_round_share_their_noise(words):
    """A prompt that is drawn twice, or stands twice in the list, has samples of its own each
    time."""
    drawn = rows(listed(words, per_round=12, per_unit=3, samples_per_prompt=2).units(0, 1, PLAN))
    assert len(drawn) == 24
    assert len({(number, sample) for _, number, sample in drawn}) == 24


def test_the_noise_keys_do_not_depend_on_the_units_size():
    """The same samples with the same noise, however many prompts go into a unit."""
    found = {}
    for per_unit in (1, 2, 3, 6):
        units = listed(WORDS[:4], per_round=6, per_unit=per_unit, samples_per_prompt=2).units(
            3, 1, PLAN
        )
        assert len(units) == 6 // per_unit
        found[per_unit] = (rows(units), torch.cat([unit_noise(u, 1, (2, 2)) for u in units]))
    for (one, noise_one), (two, noise_two) in itertools.pairwise(found.values()):
        assert one == two
        assert torch.equal(noise_one, noise_two)
    assert len(torch.unique(found[1][1][:, 0, 0])) == 12


def test_per_unit_must_divide_per_round():
    with pytest.raises(UserError, match=r"^prompts\.per_unit must divide per_round \(16\), got 5$"):
        listed(per_unit=5)


@pytest.mark.parametrize("setting", ["per_round", "samples_per_prompt", "per_unit"])
def test_counts_are_positive(setting):
    with pytest.raises(UserError, match=rf"^prompts\.{setting} must be >= 1, got 0$"):
        listed(**{setting: 0})


# the sources


def test_shapes_trains_on_train_captions_and_evaluates_on_held_out_ones():
    source = prompts("shapes")
    train, held_out = set(shapes.captions("train")), set(shapes.captions("held_out"))
    assert set(source.pool()) == train
    evaluated = [text for _, text in source.held_out(64)]
    assert len(set(evaluated)) == 64
    assert set(evaluated) <= held_out
    assert not held_out & train
    assert source.held_out(8) == source.held_out(64)[:8]


def test_shapes_can_be_limited_to_a_fixed_choice():
    few, more = prompts("shapes", limit=5), prompts("shapes", limit=50)
    assert len(set(few.pool())) == 5
    assert list(more.pool()[:5]) == list(few.pool())
    assert set(more.pool()) <= set(shapes.captions("train"))
    assert few.held_out(10) == more.held_out(10)
    assert {text for _, text in few.draw(0, 1)} == set(few.pool())


def test_a_list_is_its_own_pool():
    source = listed(held_out_prompts=["x", "y"])
    assert list(source.pool()) == WORDS
    assert source.held_out(2) == [(prompt_id("x"), "x"), (prompt_id("y"), "y")]
    assert [text for _, text in source.held_out(3)] == ["x", "y", "x"], "starts over"
    assert [text for _, text in listed().held_out(2)] == WORDS[:2], (
        "none given: the first of the pool"
    )


def test_an_empty_list_is_refused():
    with pytest.raises(UserError, match=r"^prompts\.prompts must hold at least 1, got \[\]"):
        listed([])


def test_a_file_has_a_prompt_on_each_line(tmp_path):
    path, held_out = tmp_path / "train.txt", tmp_path / "test.txt"
    path.write_text("a cat\n\n  a dog  \nein grüner Kreis\n", encoding="utf-8")
    held_out.write_text("a bird", encoding="utf-8")
    source = prompts("file", path=str(path), per_round=3, per_unit=3)
    assert list(source.pool()) == ["a cat", "a dog", "ein grüner Kreis"]
    assert [text for _, text in source.held_out(2)] == ["a cat", "a dog"]
    assert {text for _, text in source.draw(0, 1)} == set(source.pool())
    assert [
        t for _, t in prompts("file", path=str(path), held_out_path=str(held_out)).held_out(1)
    ] == ["a bird"]


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(
        UserError, match=r"prompts\.path must hold at least one prompt, got an empty file"
    ):
        prompts("file", path=str(path)).draw(0, 1)


def test_a_missing_or_unreadable_file_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    for path in (tmp_path / "no.txt", tmp_path / "latin.txt"):
        with pytest.raises(
            UserError, match=r"prompts\.path must be a readable UTF-8 text file, got "
        ):
            prompts("file", path=str(path)).draw(0, 1)
    (tmp_path / "yes.txt").write_text("a cat")
    source = prompts("file", path=str(tmp_path / "yes.txt"), held_out_path=str(tmp_path / "no.txt"))
    with pytest.raises(UserError, match=r"prompts\.held_out_path must be a readable"):
        source.held_out(1)


# text as it is


def read(path, content: str | bytes) -> list[str]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(prompts("file", path=str(path)).pool())


def refused_prompts(path, content: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        read(path, content)
    message = str(caught.value)
    assert (
        message.startswith("prompts.path must be ")
        and repr(str(path)) in message
        and "\n" not in message
    )
    return message


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    path = tmp_path / "p.txt"
    assert read(path, "\ufeffa cat\n\ufeffa dog\r\n") == ["a cat", "a dog"], (
        "as two files put together have it"
    )
    with pytest.raises(UserError, match="got an empty file"):
        read(path, "\ufeff\n")


def test_newlines_alone_end_a_prompt(tmp_path):
    inside = [
        "one\u2028two",
        "one\x85two",
        "one\x0ctwo",
        "one\x0btwo",
        "one\x1ctwo",
        "one\x1e\u2029two",
    ]
    for newline in ("\n", "\r\n", "\r"):
        assert read(tmp_path / "p.txt", newline.join(inside)) == inside
    path = tmp_path / "p.txt"
    with path.open(encoding="utf-8-sig") as opened:
        assert list(prompts("file", path=str(path)).pool()) == [line.strip() for line in opened], (
            "as Python reads it"
        )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a cat\n".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        ("a cat\n".encode("utf-32"), "it is UTF-32; save it as UTF-8"),
        ("a cat\na dog".encode("utf-16-le"), "line 1 holds a NUL"),
        ("a cat\nein Kätzchen".encode("latin-1"), "byte 11 is not (line 2)"),
        (b"a cat\n\xed\xa0\xbd", "byte 6 is not (line 2)"),
        (b"\x1f\x8b\x08\x00abc", "byte 1 is not"),
    ],
)
def test_other_encodings_and_files_of_bytes_are_refused(tmp_path, content, said):
    assert said in refused_prompts(tmp_path / "p.txt", content)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("p.json", '["a cat"]', "JSON"),
        ("p.txt", '["a cat",\n "a dog"]', "JSON"),
        ("p.txt", '["a cat", "a dog"]', "JSON"),
        ("p", '{"prompts": [\n"a cat"\n]}', "JSON"),
        ("p.txt", b"ARROW1\0\0", "Arrow"),
        ("p.xlsx", b"PK\x03\x04", "a spreadsheet"),
    ],
)
def test_tables_that_are_not_read_are_refused_with_the_way_out(tmp_path, name, content, kind):
    message = refused_prompts(tmp_path / name, content)
    assert f"which is a table that is not read ({kind}); write it as one of these" in message


@pytest.mark.parametrize(
    "lines",
    [
        ["{a cat}", "{a dog}"],
        ["[a cat]", "a dog"],
        ['{"a": 1}', "a dog"],
        ["a cat, asleep, prompt", "a dog"],
        ["a photo of a cat, 4k", "a photo of a dog, 4k"],
        ["text, not a picture", "a cat, asleep"],
        ['"a cat"', "'a dog'"],
        ["a\tcat", "a\tdog"],
    ],
)
def test_prompts_that_look_a_little_like_a_table_are_prompts(tmp_path, lines):
    assert read(tmp_path / "p.txt", "\n".join(lines)) == lines


def test_half_of_a_surrogate_pair_is_no_prompt():
    with pytest.raises(
        UserError, match=r"prompts\.prompts: prompt 1 must be text, got half of a surrogate pair"
    ):
        listed(["a cat", "a \ud83d"])
