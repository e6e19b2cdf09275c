"""Prompts from several sources with shares."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from rlalign.config import load_run
from rlalign.core.prompts import record_of
from rlalign.core.registry import UserError, build
from rlalign.data.prompts.base import Prompts, prompt_id
from rlalign.data.prompts.mix import Mix

A = [f"a {n}" for n in range(10)]
B = [f"b {n}" for n in range(3)]


def listed(words, **settings) -> dict:
    return {"name": "list", "prompts": list(words), **settings}


def mix(*shares, **settings) -> Prompts:
    sources = [{"share": s, "label": label, "prompts": p} for s, label, p in shares]
    found = build("prompts", {"name": "mix", "sources": sources, **settings})
    assert isinstance(found, Prompts)
    return found


def two(share=0.7, **settings) -> Prompts:
    return mix((share, "a", listed(A)), (1 - share, "b", listed(B)), **settings)


def test_a_round_has_the_stated_shares_and_says_the_source_of_each():
    drawn = [text for _, text in two(per_round=20, per_unit=20).draw(0, 1)]
    assert Counter(record_of(text)["source"] for text in drawn) == {"a": 14, "b": 6}
    assert all(text.startswith(record_of(text)["source"]) for text in drawn)
    # without replacement while a source lasts
    assert set(Counter(text for text in drawn if text.startswith("b")).values()) == {2}
    first = [record_of(text)["source"] for text in drawn]
    assert first != sorted(first), "the sources are mixed within a round"


@pytest.mark.parametrize("shares", [(0.7, 0.3), (1, 1, 1), (5, 0.01, 2.3), (1e-3, 1 - 1e-3)])
def test_the_sums_over_rounds_keep_to_the_shares(shares):
    """Rounded up or down in each round, and within three prompts in all, for 3,000 rounds."""
    found = mix(*((s, f"s{i}", listed(A)) for i, s in enumerate(shares)), per_round=8, per_unit=8)
    assert isinstance(found, Mix)
    wanted = [s / sum(shares) * 8 for s in shares]
    so_far = [0] * len(shares)
    for round in range(1, 3001):
        counts = found.counts(round)
        assert sum(counts) == 8
        assert all(abs(n - w) < 1 for n, w in zip(counts, wanted, strict=True))
        so_far = [a + b for a, b in zip(so_far, counts, strict=True)]
        assert all(abs(n - w * round) < 3 for n, w in zip(so_far, wanted, strict=True))


def test_whole_shares_are_exact_in_every_round():
    found = two(per_round=10, per_unit=10)
    assert isinstance(found, Mix)
    assert {tuple(found.counts(round)) for round in range(1, 500)} == {(7, 3)}


def test_a_round_is_drawn_by_seed_and_round_alone():
    found = two(per_round=8, per_unit=4)
    assert found.draw(0, 1) == two(per_round=8, per_unit=8, samples_per_prompt=9).draw(0, 1)
    assert found.draw(0, 1) != found.draw(0, 2)
    assert found.draw(0, 1) != found.draw(1, 1)
    assert all(number == prompt_id(text) for number, text in found.draw(0, 1))


def test_evaluation_takes_the_shares_in_any_beginning():
    found = mix(
        (3, "a", listed(A, held_out_prompts=["x", "y", "z"])),
        (1, "b", listed(B)),
    )
    held = found.held_out(8)
    assert [str(text) for _, text in held] == ["x", "y", "b 0", "z", "x", "y", "b 1", "z"]
    assert found.held_out(5) == held[:5]
    assert [record_of(text)["source"] for _, text in held[1:3]] == ["a", "b"]


def test_a_prompt_that_one_source_holds_out_and_another_trains_on_is_found():
    found = mix((1, "a", listed(A, held_out_prompts=["b 1"])), (1, "b", listed(B)))
    assert str(found.find_overlap()) == (
        "1 of 1 held-out prompts are trained on as well, such as 'b 1'"
    )
    assert two().find_overlap() is None


def test_a_mix_of_files_keeps_their_records(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "a cat", "tag": "x"}) + "\n")
    (tmp_path / "two.txt").write_text("a dog\n")
    found = build(
        "prompts",
        {
            "name": "mix",
            "sources": [
                {"share": 1, "prompts": {"name": "file", "path": str(tmp_path / "one.jsonl")}},
                {"share": 1, "prompts": {"name": "file", "path": str(tmp_path / "two.txt")}},
            ],
        },
    )
    assert isinstance(found, Mix)
    pool = found.pool()
    assert [(str(p), dict(record_of(p))) for p in pool] == [
        ("a cat", {"tag": "x", "source": "one"}),
        ("a dog", {"source": "two"}),
    ]
    assert record_of(pool[1]) == {"source": "two"}
    plain = found.model_copy(update={"field": ""})
    assert [dict(record_of(p)) for p in plain.pool()] == [{"tag": "x"}, {}]


def test_mistakes_within_a_mix_name_their_place(tmp_path):
    with pytest.raises(UserError, match=r"'a' appears twice; give one of them a label"):
        mix((1, "a", listed(A)), (1, "a", listed(B)))
    with pytest.raises(UserError, match=r"share must be > 0, got 0"):
        mix((0, "a", listed(A)))
    with pytest.raises(UserError, match=r"no plug-in 'lisst' on shelf prompts; did you mean"):
        mix((1, "a", {"name": "lisst", "prompts": ["a"]}))
    (tmp_path / "p.jsonl").write_text("{}\n")
    found = mix((1, "a", listed(A)), (1, "b", {"name": "file", "path": str(tmp_path / "p.jsonl")}))
    with pytest.raises(UserError, match=r"^prompts\.sources\.1\.prompts\.column must name"):
        found.draw(0, 1)


def test_a_run_file_names_a_mix_and_its_paths_are_located(tmp_path, monkeypatch):
    from rlalign.config import dump, locate_run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a dog\n")
    (tmp_path / "run.yaml").write_text(
        "name: mixed\n"
        "policy: {name: tiny}\n"
        "prompts: {name: mix, per_round: 2, per_unit: 1, sources: [\n"
        "  {share: 0.5, prompts: {name: file, path: p.txt}},\n"
        "  {share: 0.5, prompts: {name: shapes}}]}\n"
        "rewards: [{name: jpeg}]\n"
        "algorithm: {name: ddpo}\n"
    )
    run = locate_run(load_run("run.yaml"), begun=False)
    assert str(tmp_path / "p.txt") in dump(run)
    assert {
        record_of(p)["source"] for u in run.prompts.units(0, 1, run.plan) for p in u.prompts
    } == {
        "p",
        "shapes",
    }
