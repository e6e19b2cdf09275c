"""Pictures that a policy draws: keyed, and drawn again from their rows; a run that learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlalign.core.clips import read_clip
from rlalign.core.prompts import record_of
from rlalign.core.records import Plan
from rlalign.core.registry import build
from rlalign.data.prompts.base import Prompts
from rlalign.engine.local import LiveRewards, LocalEngine
from rlalign.voting.sources.policy import EngineSource, Side, redraw

PLAN = Plan(steps=2)


def engine(rows: int = 4) -> LocalEngine:
    policy = build("policies", {"name": "tiny"}).load("cpu")  # type: ignore[attr-defined]
    return LocalEngine.with_lanes(policy, lambda: LiveRewards(()), workers=1, rows=rows)


def prompts(**changes: object) -> Prompts:
    settings = {"name": "shapes", "per_round": 3, "per_unit": 1, **changes}
    return build("prompts", settings)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def tiny() -> LocalEngine:
    return engine()


def source(tiny: LocalEngine, *titles: str, seed: int = 0) -> EngineSource:
    sides = [Side(title=title, engine=tiny) for title in titles]
    return EngineSource(sides=sides, prompts_of=prompts(), plan=PLAN, seed=seed, count=2)


def test_a_picture_is_drawn_again_from_its_row(tiny: LocalEngine) -> None:
    groups = source(tiny, "tiny").batch()
    assert [len(group) for group in groups] == [2, 2, 2]
    assert len({made.picture.uid for group in groups for made in group}) == 6
    another = engine(rows=16)
    for made in (groups[0][1], groups[2][0]):
        assert made.picture.plan["plan"]["steps"] == 2
        assert redraw(made.picture, another) == made.content


def test_a_prompt_with_a_record_is_drawn_again_too(tiny: LocalEngine, tmp_path: Path) -> None:
    """Its record is part of its noise's key, and no part of what people see."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a red circle", "n": 1}\n')
    listed = build("prompts", {"name": "file", "path": str(path), "per_round": 1, "per_unit": 1})
    side = Side(title="tiny", engine=tiny)
    drawn = EngineSource(sides=[side], prompts_of=listed, plan=PLAN, seed=0, count=2)  # type: ignore[arg-type]
    ((made, _),) = drawn.batch()
    assert record_of(made.caption) == {"n": 1}, "for a reward that filters"
    picture = made.picture
    assert type(picture.caption) is str
    assert record_of(picture.prompt) == {"n": 1}
    plan = json.loads(json.dumps(picture.plan))
    assert redraw(replace(picture, plan=plan), tiny) == made.content
    assert drawn.of_prompt("a red circle", 0)[0].content != made.content


def test_noise_is_keyed_by_seed_and_batch(tiny: LocalEngine) -> None:
    first = source(tiny, "tiny")
    batches = [first.batch(), first.batch()]
    again = source(tiny, "tiny")
    again.take_up(iter([batches[0][0][0].picture.plan]))
    assert [[m.content for m in g] for g in again.batch()] == [
        [m.content for m in g] for g in batches[1]
    ]
    assert source(tiny, "tiny", seed=1).batch()[0][0].content != batches[0][0][0].content


def test_two_sides_alternate_and_share_no_noise(tiny: LocalEngine) -> None:
    (group, *_) = source(tiny, "old", "new").batch()
    assert [made.picture.policy for made in group] == ["old", "new"]
    # the same policy on both sides, and other pictures
    assert group[0].content != group[1].content


def test_a_typed_prompt_has_other_pictures_each_time(tiny: LocalEngine) -> None:
    drawn = source(tiny, "tiny")
    first, second = drawn.of_prompt("a red circle", 0), drawn.of_prompt("a red circle", 1)
    assert len({made.content for made in (*first, *second)}) == 4
    assert first[0].content == drawn.of_prompt("a red circle", 0)[0].content
    assert read_clip(first[0].content).shape == (1, 3, 32, 32)
