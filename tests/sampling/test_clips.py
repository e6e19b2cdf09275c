"""What ``rlalign sample`` writes of clips: whole files, strips, a page that plays them, and what
people would vote on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rlalign.ballots.records import Campaign, Item
from rlalign.ballots.store import Store
from rlalign.cli import main
from rlalign.core.clips import RATE, decode_clip, encode_clip, read_clip
from rlalign.core.pictures import GAP, clip_files, read_grid, write_grid
from rlalign.core.registry import build
from rlalign.data.pairs.columns import write_pairs
from rlalign.data.pairs.reader import PairReader, PreferenceSettings
from rlalign.diffusion.rollout import rollout
from rlalign.engine.local import LiveRewards, LocalEngine
from rlalign.learning.log import Log
from rlalign.sampling.compare import sample_local
from rlalign.sampling.output import remove_so_far, write_so_far
from rlalign.sampling.settings import parse_sample
from rlalign.sinks.base import Origin
from rlalign.voting.sources.files import as_shown, find_pictures, find_samples
from rlalign.voting.sources.policy import draw_rows, redraw
from tests.made_clips import made_clips
from tests.report.test_clips import films_of
from tests.runs import quiet
from tests.web.vote.made_desk import desk_of, served
from tests.web.vote.person import Person

SETTINGS = {
    "name": "clips",
    "policy": {"name": "tests.policies.clips:Clips"},
    "plan": {"steps": 2, "rule": "flow_sde", "height": 16, "width": 24, "frames": 5},
    "prompts": {"name": "list", "prompts": ["a ball falls", "a cube"]},
    "pictures": 2,
    "rewards": [{"name": "jpeg"}],
    "sampler": {"name": "plain"},
    "rows": 2,
}


def test_one_clip_has_the_same_frames_at_every_exit(tmp_path: Path) -> None:
    sample = parse_sample(SETTINGS)
    sample_local(sample, tmp_path, quiet)
    _, media = rollout(sample.model.load("cpu"), sample.unit, 0)
    assert media.shape == (2, 5, 3, 16, 24)
    assert len({frame.tobytes() for frame in media[0]}) > 1, "it moves"
    files = sorted((tmp_path / "pictures").iterdir())
    assert [file.name for file in files] == ["00000.webp", "00001.webp"]
    cells = read_grid(tmp_path / "samples.png")
    films = films_of((tmp_path / "report.html").read_text())
    shown = find_samples(tmp_path)
    for number, clip in enumerate(media):
        assert np.array_equal(read_clip(files[number]), clip)
        assert np.array_equal(cells[number].media_FCHW, clip)
        assert np.array_equal(films[number], clip)
        (voted,) = shown[str(sample.unit.prompts[number])]
        assert np.array_equal(read_clip(voted.read()), clip)
    # a page that draws for people as they come gives them the same, and can draw it again
    engine = LocalEngine.with_lanes(
        sample.model.load("cpu"), lambda: LiveRewards(()), workers=1, rows=2, threads=1
    )
    drawn = draw_rows(engine, sample.unit)
    for made, clip in zip(drawn, media, strict=True):
        assert np.array_equal(read_clip(made.content), clip)
        assert (made.picture.frames, made.picture.media_type) == (5, "image/webp")
        assert made.picture.rate == RATE
        assert redraw(made.picture, engine) == made.content
    # pairs of them, their votes' page, and TensorBoard
    assert_pairs_have_the_very_frames(tmp_path, sample.unit.prompts, media)
    assert_the_page_has_the_very_frames(tmp_path, media)
    assert_tensorboard_has_the_very_frames(tmp_path, sample.unit.prompts, media)
    # the folder is a source of clips by itself, with a caption for each
    for file, prompt in zip(files, sample.unit.prompts, strict=True):
        file.with_suffix(".txt").write_text(prompt)
    found = find_pictures(str(tmp_path / "pictures"))
    assert np.array_equal(read_clip(found["a cube"][0].read()), media[1])


def assert_pairs_have_the_very_frames(
    folder: Path, prompts: Sequence[str], media_BFCHW: np.ndarray
) -> None:
    """In Parquet, as the reader of a training set gives them."""
    contents = [encode_clip(clip)[0] for clip in media_BFCHW]
    row = {"caption": prompts[0], "jpg_0": contents[0], "jpg_1": contents[1]}
    write_pairs(folder / "pairs.parquet", [{**row, "label_0": 1.0, "label_1": 0.0}])
    settings = PreferenceSettings(path=str(folder / "pairs.parquet"), pairs_per_pass=1)
    (pair,) = PairReader(settings, 0, frames=5).all()
    assert np.array_equal([pair.media_0, pair.media_1], media_BFCHW)


def assert_the_page_has_the_very_frames(folder: Path, media_BFCHW: np.ndarray) -> None:
    """On the sheets that a browser plays."""
    with contextlib.closing(Store.open(folder / "votes.sqlite")) as store:
        store.create_campaign(Campaign(id="shapes", mode="pairs"))
        made = [as_shown(encode_clip(clip)[0], "", caption="a ball") for clip in media_BFCHW]
        for one in made:
            store.add_picture(one.picture, one.content)
        uids = tuple(one.picture.uid for one in made)
        store.add_items([Item(id="i", campaign="shapes", caption="a ball", uids=uids)])
        with served(desk_of(store, "pairs", {}), folder) as page:
            person = Person(page.url)
            for key in person.ballot()["pictures"]:
                answer = person.get(f"/film/{key}")
                assert answer.headers["x-rate"] == f"{RATE:g}"
                columns = int(answer.headers["x-columns"])
                found = np.stack(np.split(read_clip(answer.content)[0], columns, axis=2))
                assert any(np.array_equal(found, clip) for clip in media_BFCHW)


def assert_tensorboard_has_the_very_frames(
    folder: Path, prompts: Sequence[str], media_BFCHW: np.ndarray
) -> None:
    """Side by side, six times as large."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_grid(folder / "round-00001.png", media_BFCHW, prompts, [0.0, 0.0])
    log = Log(
        [build("sinks", {"name": "tensorboard"})],
        Origin(folder=folder, name="clips", settings={}, resume_at=-1),
    )
    log.show(1, folder / "round-00001.png")
    log.close(ended=True)
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    (event,) = board.Images("samples_clips")
    sheet = decode_clip(event.encoded_image_string).media_FCHW
    for number, clip in enumerate(media_BFCHW):
        x = GAP + number * (6 * 24 + GAP)
        assert np.array_equal(sheet[:, :, GAP : GAP + 96 : 6, x : x + 144 : 6], clip)


def test_clips_are_lossy_videos_too_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "clips.yaml"
    file.write_text(json.dumps({**SETTINGS, "compare": False}))
    out = tmp_path / "out"
    assert main(["sample", str(file), "--local", "--mp4", "--out", str(out)]) == 0
    names = [f"0000{n}.{kind}" for n in (0, 1) for kind in ("mp4", "webp")]
    assert sorted(one.name for one in (out / "pictures").iterdir()) == names
    pictures = ["sample", str(file), "--local", "--mp4", "--out", str(tmp_path / "none")]
    assert main([*pictures, "plan.frames=1"]) == 2
    assert "--mp4 is for clips, and plan.frames must be above 1" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_what_a_failed_sampling_leaves_of_clips_is_taken_away(tmp_path: Path) -> None:
    sample = parse_sample(SETTINGS)
    media = made_clips(2)
    said = write_so_far(sample, tmp_path, [("method", media)])
    assert said.endswith("so-far (method.png)")
    assert len(clip_files(tmp_path / "so-far" / "method.png")) == 2
    remove_so_far(tmp_path)
    assert list(tmp_path.iterdir()) == []
