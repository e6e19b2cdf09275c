"""The policy of a run that learns, before there is one; whole loops are in tests/end_to_end."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlalign.voting.pictures import Pending
from rlalign.voting.serve import open_source
from rlalign.voting.settings import parse_vote


def test_a_run_that_has_not_begun_is_named_to_those_who_wait(tmp_path: Path) -> None:
    vote = parse_vote({"name": "r", "source": {"run": str(tmp_path / "mine")}})
    source = open_source(vote)
    source.take_up(iter([]))
    with pytest.raises(Pending, match="the run mine has not begun; rlalign train begins it") as why:
        source.batch()
    assert why.value.code == "broken", "nobody is told that a model learns"
    assert source.prompts() == [] and not source.renewed
    source.close()
