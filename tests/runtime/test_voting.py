"""Pictures for people from real Ray actors: bitwise those of one process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlalign.alignment.loop import train_local
from rlalign.ballots.records import Stock
from rlalign.config import load_run
from rlalign.core.registry import UserError
from rlalign.voting.serve import open_source
from rlalign.voting.settings import parse_vote
from rlalign.voting.sources.policy import models_of, redraw
from tests.runs import CONFIGS, quiet

pytestmark = pytest.mark.ray

VOTE = parse_vote(
    {
        "name": "q",
        "mode": "ab",
        "source": {"policy": {"name": "tiny"}, "against": "tiny", "plan": {"steps": 2}, "rows": 2},
        "prompts": {"name": "shapes", "per_round": 3, "per_unit": 1},
        "runtime": {"rollout": {"workers": 1}},
    }
)

SMALL = (
    "rounds=1",
    "plan.steps=2",
    "prompts.per_round=2",
    "prompts.samples_per_prompt=2",
    "prompts.per_unit=1",
    "learner.lr=1.0e-2",
    "evaluate.every=0",
    "evaluate.prompts=2",
    "checkpoint.every=1",
)


@pytest.mark.promise
def test_a_cluster_draws_the_pictures_of_one_process(ray_cluster: None) -> None:
    from rlalign.runtime.voting import open_source_on_ray

    here = open_source(VOTE)
    there = open_source_on_ray(VOTE, models_of(VOTE))
    try:
        for _ in range(2):
            mine, its = here.batch(), there.batch()
            assert mine == its
        assert redraw(mine[0][1].picture, there.sides[1].engine) == mine[0][1].content
    finally:
        there.close()
        here.close()


@pytest.mark.slow
def test_a_cluster_draws_under_the_newest_checkpoint_of_a_run(
    ray_cluster: None, tmp_path: Path
) -> None:
    from rlalign.runtime.voting import open_run_on_ray

    run = load_run(CONFIGS / "quickstart.yaml", SMALL)
    train_local(run, tmp_path / "run", resume=False, on_record=quiet)
    (tmp_path / "run" / "status.json").unlink()  # as one that goes on
    vote = parse_vote(
        {
            "name": "r",
            "source": {"run": str(tmp_path / "run"), "rows": 2},
            "prompts": {"name": "shapes", "per_round": 2, "per_unit": 1},
            "runtime": {"rollout": {"workers": 2}},
        }
    )
    here, there = open_source(vote), open_run_on_ray(vote)
    try:
        mine = here.batch()
        assert there.batch() == mine
        assert mine[0][0].picture.policy == "run@1"

        # before the first checkpoint the base policy draws, and it draws otherwise
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        base = open_source(vote).batch()
        assert [one.content for one in base[0]] != [one.content for one in mine[0]]
    finally:
        there.close()
        here.close()


def test_files_are_no_work_for_a_cluster() -> None:
    from rlalign.runtime import serve_vote_on_ray

    vote = parse_vote({"name": "q", "source": {"pictures": "set"}})
    with pytest.raises(UserError, match=r"--address is for .* got source\.pictures"):
        serve_vote_on_ray(vote, print, on_ready=print, address="auto")


@pytest.mark.promise
def test_the_page_tells_rays_metrics_how_it_stands(ray_cluster: None) -> None:
    from rlalign.runtime.gauges import metric_names
    from rlalign.runtime.voting import RayMeter

    meter = RayMeter("q")
    counted: list[float] = []
    for votes in (7, 9, 8, 10):
        meter.note_stock(Stock(items={"live": 3, "shared": 1, "gold": 2}, votes=votes, open=2))
        counter = meter._gauges._made.get("rlalign_votes_total")
        counted.append(counter is not None)
    meter.note_drawing(0.5)
    meter.note_stock(Stock(items={}, votes=10, open=0))
    assert counted == [False, True, True, True], "votes of before are not counted"
    assert {f"ray_{name}" for name in meter._gauges._made} <= metric_names()
    assert set(meter._gauges._made) == {
        "rlalign_votes_total",
        "rlalign_pairs_ready",
        "rlalign_ballots_open",
        "rlalign_drawing_seconds",
    }
