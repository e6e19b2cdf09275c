"""Pictures for people from real Ray actors: bitwise those of one process."""

from __future__ import annotations

import pytest

from rlalign.core.registry import UserError
from rlalign.voting.serve import open_source
from rlalign.voting.settings import parse_vote
from rlalign.voting.sources.policy import models_of, redraw

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
