"""What ``rlalign sample`` writes of clips: whole files, strips, a page that plays them, and what
people would vote on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rlalign.cli import main
from rlalign.core.clips import RATE, read_clip
from rlalign.core.pictures import clip_files, read_grid
from rlalign.diffusion.rollout import rollout
from rlalign.engine.local import LiveRewards, LocalEngine
from rlalign.sampling.compare import sample_local
from rlalign.sampling.output import remove_so_far, write_so_far
from rlalign.sampling.settings import parse_sample
from rlalign.voting.sources.files import find_pictures, find_samples
from rlalign.voting.sources.policy import draw_rows, redraw
from tests.made_clips import made_clips
from tests.report.test_clips import films_of
from tests.runs import quiet

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
    # the folder is a source of clips by itself, with a caption for each
    for file, prompt in zip(files, sample.unit.prompts, strict=True):
        file.with_suffix(".txt").write_text(prompt)
    found = find_pictures(str(tmp_path / "pictures"))
    assert np.array_equal(read_clip(found["a cube"][0].read()), media[1])


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
