"""A whole run on clips: what it writes can be read by its other parts, frame by frame, and a run
learns from the pairs of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rlalign.alignment.loop import train_local
from rlalign.config import parse_run
from rlalign.core.clips import decode_clip
from rlalign.core.pictures import GAP, read_grid
from rlalign.core.registry import UserError
from rlalign.data.pairs.reader import PairReader, PreferenceSettings
from tests.policies.test_one_file import PLAN
from tests.report.test_clips import films_of
from tests.runs import metrics, quiet

pytestmark = pytest.mark.promise

SETTINGS: dict[str, Any] = {
    "name": "clips",
    "rounds": 1,
    "policy": {"name": "tests.policies.clips:Clips"},
    "plan": PLAN.model_dump(),
    "prompts": {
        "name": "list",
        "prompts": ["a ball", "a cube", "a cone falls", "two balls"],
        "per_round": 4,
        "per_unit": 1,
        "samples_per_prompt": 2,
    },
    "rewards": [{"name": "jpeg"}],
    "algorithm": {"name": "grpo"},
    "learner": {"lr": 0.01},
    "evaluate": {"prompts": 3, "grid": 3},
    "log": [{"name": "tensorboard"}],
    "write_pairs": "all",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "run"
    train_local(parse_run(SETTINGS), folder, resume=False, on_record=quiet)
    return folder


def test_grid_page_and_tensorboard_show_the_same_frames(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before, after = (
        [cell.media_FCHW for cell in read_grid(trained / "samples" / f"round-0000{r}.png")]
        for r in (0, 1)
    )
    assert [clip.shape for clip in after] == [(5, 3, 16, 24)] * 3
    films = films_of((trained / "report.html").read_text())
    wanted = [clip for pair in zip(before, after, strict=True) for clip in pair]
    assert len(films) > len(wanted), "those that changed most follow"
    for found, clip in zip(films, wanted, strict=False):
        assert np.array_equal(found, clip)
    board = EventAccumulator(str(trained / "tensorboard"))
    board.Reload()
    events = board.Images("samples_clips")
    assert [event.step for event in events] == [0, 1]
    for event, clips in zip(events, (before, after), strict=True):
        sheet = decode_clip(event.encoded_image_string).media_FCHW
        for number, clip in enumerate(clips):
            x = GAP + number * (6 * 24 + GAP)
            tile = sheet[:, :, GAP : GAP + 6 * 16 : 6, x : x + 6 * 24 : 6]
            assert np.array_equal(tile, clip)


def test_another_run_learns_from_its_pairs(trained: Path, tmp_path: Path) -> None:
    file = trained / "preferences" / "round-00001.parquet"
    assert pq.read_table(file)["frames"].to_pylist() == [5] * 4
    given = {"path": str(file), "pairs_per_round": 4, "pairs_per_pass": 2}
    reader = PairReader(PreferenceSettings.model_validate({**given, "ties": "half"}), 0, frames=5)
    assert {pair.media_0.shape for pair in reader.all()} == {(5, 3, 16, 24)}
    dpo = {**SETTINGS, "algorithm": {"name": "diffusion_dpo", "draws": 1}, "preferences": given}
    dpo.pop("write_pairs")
    train_local(parse_run(dpo), tmp_path / "dpo", resume=False, on_record=quiet)
    (line,) = metrics(tmp_path / "dpo")
    assert line["grad_norm"] > 0
    # clips of another length say so before anything is trained
    other = {**dpo, "plan": PLAN.model_copy(update={"frames": 7}).model_dump()}
    message = r"round-00001\.parquet:\d+: its clips must have plan\.frames \(7\), got 5 frames"
    with pytest.raises(UserError, match=message):
        train_local(parse_run(other), tmp_path / "other", resume=False, on_record=quiet)
