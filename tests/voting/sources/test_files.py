"""Pictures that are there: a run's samples, Parquet, folders; batches that end."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlalign.core.clips import encode_clip, read_clip
from rlalign.core.pictures import write_grid
from rlalign.core.prompts import Prompt, dump_record, record_of
from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import write_pairs
from rlalign.voting.pictures import Exhausted
from rlalign.voting.sources.files import FileSource, as_shown, find_pictures, find_samples
from tests.votes import png


def all_batches(source: FileSource) -> list:
    """The groups of every batch that is left."""
    groups: list = []
    with contextlib.suppress(Exhausted):
        while True:
            groups += source.batch()
    return groups


def values(groups: list) -> list[list[int]]:
    """The numbers that the pictures of groups say."""
    return [[int(read_clip(made.content)[0, 0, 0, 0]) for made in group] for group in groups]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three captions, said in the three ways that there are."""
    (tmp_path / "a dog").mkdir()
    for number in range(4):
        (tmp_path / "a dog" / f"{number}.png").write_bytes(png(number))
        (tmp_path / f"cat{number}.png").write_bytes(png(10 + number))
        (tmp_path / f"cat{number}.txt").write_text("a  cat\n", encoding="utf-8")
        (tmp_path / f"owl{number}.png").write_bytes(png(20 + number))
    lines = [json.dumps({"file_name": f"owl{n}.png", "text": "an owl"}) for n in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_captions_come_from_folders_texts_and_metadata(folder: Path) -> None:
    found = find_pictures(str(folder))
    assert {caption: len(some) for caption, some in found.items()} == {
        "a cat": 4,
        "a dog": 4,
        "an owl": 4,
    }
    said = {caption: sorted(values([[_made(f)] for f in some])) for caption, some in found.items()}
    assert said["an owl"] == [[20], [21], [22], [23]]


def _made(found: object) -> object:
    from rlalign.voting.pictures import PictureFile

    return PictureFile.of(found.read(), caption="")  # type: ignore[attr-defined]


def test_batches_show_every_picture_once_and_end(folder: Path) -> None:
    source = FileSource([find_pictures(str(folder))], seed=0, count=2)
    groups = all_batches(source)
    for group in groups:
        assert len({made.caption for made in group}) == 1
    seen = sorted(value for group in values(groups) for value in group)
    assert seen == [*range(4), *range(10, 14), *range(20, 24)]

    # the same seed gives the same groups; another process goes on after the newest
    again = FileSource([find_pictures(str(folder))], seed=0, count=2)
    assert values(again.batch()) == values(groups)
    again.take_up(iter([groups[-1][0].picture.plan]))
    assert all_batches(again) == []
    assert values(FileSource([find_pictures(str(folder))], seed=1, count=2).batch()) != values(
        groups
    )


def test_two_sides_are_compared_caption_by_caption(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "a dog").mkdir(parents=True)
    (other / "a dog" / "0.png").write_bytes(png(200))
    sides = [{"a dog": find_pictures(str(folder))["a dog"]}, find_pictures(str(other))]
    (group,) = FileSource(sides, seed=0, count=2).batch()
    assert [made.picture.policy for made in group] == [folder.name, "other"]
    assert values([group])[0][1] == 200


def test_a_set_of_pairs_is_read_without_its_labels(tmp_path: Path) -> None:
    rows = [
        {"caption": f"c{n % 2}", "jpg_0": png(n), "jpg_1": png(100 + n), "label_0": 1.0}
        | {"label_1": 0.0, "model_0": "old", "model_1": "new"}
        for n in range(4)
    ]
    write_pairs(tmp_path / "pairs.parquet", rows)
    found = find_pictures(str(tmp_path / "pairs.parquet"))
    assert {caption: [one.policy for one in some] for caption, some in found.items()} == {
        "c0": ["old", "new"] * 2,
        "c1": ["old", "new"] * 2,
    }
    assert values([[_made(one) for one in found["c1"]]]) == [[1, 101, 3, 103]]


def test_the_grids_of_a_run_are_its_pictures(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for number in (0, 5):
        media = np.full((2, 1, 3, 32, 32), 10 * number, dtype=np.uint8)
        file = tmp_path / "samples" / f"round-{number:05d}.png"
        write_grid(file, media, ["left", "right"], [0.5, 0.5])
    found = find_samples(tmp_path)
    assert [one.policy for one in found["left"]] == [
        f"{tmp_path.name}/round-00000",
        f"{tmp_path.name}/round-00005",
    ]
    assert values([[_made(one) for one in found["right"]]]) == [[0, 50]]
    with pytest.raises(UserError, match=r"which has no samples/round-\*\.png"):
        find_samples(tmp_path / "samples")


def test_records_stay_with_their_captions(tmp_path: Path) -> None:
    """Of a run's grids, a table and a folder; pictures of one text with other records are not
    compared, and a text that is typed takes the first."""
    records = [{"text": "A"}, {"text": "A"}, {"text": "B"}, {"text": "B"}, {}, {}]
    contents = [png(number) for number in range(6)]
    media = np.stack([read_clip(content) for content in contents])
    captions = [Prompt("a sign", record) if record else "a dog" for record in records]
    write_grid(tmp_path / "samples.png", media, captions, [0.0] * 6)
    rows = [
        {"caption": str(captions[at]), "jpg_0": contents[at], "jpg_1": contents[at + 1]}
        | {"label_0": 1.0, "label_1": 0.0, "record": dump_record(captions[at])}
        for at in (0, 2, 4)
    ]
    write_pairs(tmp_path / "pairs.parquet", rows)
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = []
    for number, (content, record) in enumerate(zip(contents, records, strict=True)):
        (folder / f"{number}.png").write_bytes(content)
        said = {"file_name": f"{number}.png", "text": str(captions[number]), "record": record}
        lines.append(json.dumps(said))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for found in (
        find_samples(tmp_path),
        find_pictures(str(tmp_path / "pairs.parquet")),
        find_pictures(str(folder)),
    ):
        source = FileSource([found], seed=0, count=2)
        prompts = source.prompts()
        assert [(str(p), dict(record_of(p))) for p in prompts] == [
            ("a sign", {"text": "A"}),
            ("a sign", {"text": "B"}),
            ("a dog", {}),
        ]
        for group in source.batch():
            (pair,) = {tuple(sorted(values([group])[0]))}
            record = records[pair[0]]
            assert pair in {(0, 1), (2, 3), (4, 5)}
            assert all(dict(record_of(made.caption)) == record for made in group)
            assert all(made.picture.prompt == made.caption for made in group)
            assert all(dict(record_of(made.picture.prompt)) == record for made in group)
        assert sorted(values([source.of_prompt(prompts[1], 0)])[0]) == [2, 3]
        assert sorted(values([source.of_prompt("a sign", 0)])[0]) == [0, 1]
    # a side without records is compared by the texts
    bare = {"a sign": [replace(one, caption="a sign") for one in found["a dog"]]}
    group = FileSource([found, bare], seed=0, count=2).batch()[0]
    assert {str(made.caption) for made in group} == {"a sign"}


def test_what_a_browser_does_not_show_is_a_png() -> None:
    picture = Image.new("RGB", (4, 4), (9, 8, 7))
    buffer = io.BytesIO()
    picture.save(buffer, format="TIFF")
    shown = as_shown(buffer.getvalue(), "x.tiff", caption="c")
    assert shown.picture.media_type == "image/png"
    assert read_clip(shown.content)[0, :, 0, 0].tolist() == [9, 8, 7]
    assert as_shown(png(3), "x.png", caption="c").content == png(3)
    with pytest.raises(UserError, match=r"x\.png must be a picture, or a clip as animated WebP"):
        as_shown(b"no picture", "x.png", caption="c")


@pytest.mark.parametrize("format", ["webp", "gif", "png"])
def test_a_clip_is_shown_as_it_is(tmp_path: Path, format: str) -> None:
    (tmp_path / "ball").mkdir()
    for first in (0, 100):
        frames = [Image.new("L", (8, 8), first + 30 * number) for number in range(3)]
        file = tmp_path / "ball" / f"{first}.{format}"
        frames[0].save(file, save_all=True, append_images=frames[1:], duration=100)
    (group,) = FileSource([find_pictures(str(tmp_path))], seed=0, count=2).batch()
    for made in group:
        assert (made.picture.frames, made.picture.media_type) == (3, f"image/{format}")
        assert made.picture.rate == 10.0
        assert read_clip(made.content).shape == (3, 3, 8, 8)


def test_a_still_clip_is_as_long_as_it_was() -> None:
    media = np.full((5, 3, 8, 8), 70, np.uint8)
    made = as_shown(encode_clip(media)[0], "still.webp", caption="c")
    assert (made.picture.frames, made.picture.media_type) == (5, "image/webp")
    assert np.array_equal(read_clip(made.content), media)


def test_a_clip_that_no_browser_plays_is_refused() -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(3)]
    frames[0].save(buffer, format="TIFF", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="3 frames in a format that no browser plays"):
        as_shown(buffer.getvalue(), "x.tiff", caption="c")


def test_a_caption_needs_two_pictures(folder: Path) -> None:
    one = {"a dog": find_pictures(str(folder))["a dog"][:1]}
    with pytest.raises(UserError, match="a caption must have 2 pictures or more in the source"):
        FileSource([one], seed=0, count=2)


def test_it_needs_no_torch() -> None:
    program = "import sys, rlalign.voting.sources.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
