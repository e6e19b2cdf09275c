"""Pictures for people from real Ray actors: bitwise those of one process."""

from __future__ import annotations

import pytest

from rlalign.ballots.records import Stock
from rlalign.core.registry import UserError
from rlalign.voting.drawn import models_of, redraw
from rlalign.voting.serve import open_source
from rlalign.voting.settings import parse_vote

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


def test_files_are_no_work_for_a_cluster() -> None:
    from rlalign.runtime import serve_vote_on_ray

    vote = parse_vote({"name": "q", "source": {"pictures": "set"}})
    with pytest.raises(UserError, match=r"--address is for source\.policy.* got source\.pictures"):
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
