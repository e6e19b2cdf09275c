"""Sample grids: geometry, that they are written whole, and that they can be read back."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rlalign.core.clips import spread
from rlalign.core.pictures import (
    LARGE_CELL,
    MARGIN,
    MOST_FRAMES,
    SMALL_CELL,
    clip_files,
    read_grid,
    remove_grid,
    shrink,
    write_grid,
)


def pictures(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 1, 3, height, width), dtype=np.uint8)


def test_the_sheet_holds_rows_and_columns(tmp_path):
    path = tmp_path / "grid.png"
    write_grid(path, pictures(10), ["a"] * 10, [0.0] * 10, columns=4)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width == 4 * (SMALL_CELL + MARGIN) + MARGIN
        assert sheet.height > 3 * SMALL_CELL
    with_title = tmp_path / "titled.png"
    write_grid(with_title, pictures(10), ["a"] * 10, [0.0] * 10, columns=4, title="Round 3")
    with Image.open(path) as plain, Image.open(with_title) as titled:
        assert titled.height > plain.height


def test_one_picture_is_one_cell(tmp_path):
    write_grid(tmp_path / "one.png", pictures(1), ["one"], [1.0])
    with Image.open(tmp_path / "one.png") as sheet:
        assert sheet.width == SMALL_CELL + 2 * MARGIN


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (24, 32), (100, 60), (160, 160)])
def test_small_pictures_come_back_to_the_pixel(tmp_path, size):
    media = pictures(5, *size)
    captions = ["a red circle", "ein grüner Würfel → 3", "three", "four", ""]
    scores = [0.5, float("nan"), -1.25, 0.1, 7.0]
    write_grid(tmp_path / "grid.png", media, captions, scores, columns=2)
    cells = read_grid(tmp_path / "grid.png")
    assert [c.caption for c in cells] == captions
    assert [c.score for c in cells] == [0.5, None, -1.25, 0.1, 7.0]
    for cell, pixels in zip(cells, media, strict=True):
        np.testing.assert_array_equal(cell.media_FCHW, pixels)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((512, 512), (LARGE_CELL, LARGE_CELL)), ((512, 1024), (LARGE_CELL, LARGE_CELL // 2))],
)
def test_large_pictures_are_shrunk_to_the_cell(tmp_path, size, shown):
    media = np.full((2, 1, 3, *size), 77, dtype=np.uint8)
    write_grid(tmp_path / "grid.png", media, ["a", "b"], [0.0, 1.0])
    cells = read_grid(tmp_path / "grid.png")
    assert [c.picture.size for c in cells] == [shown] * 2
    assert np.asarray(cells[0].picture).min() == np.asarray(cells[0].picture).max() == 77


def test_a_grid_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "grid.png"
    write_grid(path, pictures(2), ["a", "b"], [0.0, 1.0])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="zip"):
        write_grid(path, pictures(2), ["a", "b"], [0.0])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
    write_grid(path, pictures(2), ["a", "b"], [0.0, 1.0])
    assert path.read_bytes() == before  # equal input, equal bytes


def test_scores_that_are_all_missing_are_drawn(tmp_path):
    write_grid(tmp_path / "grid.png", pictures(2), ["a", "b"], [float("nan")] * 2)
    assert [c.score for c in read_grid(tmp_path / "grid.png")] == [None, None]


def test_another_png_has_no_cells(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    assert read_grid(tmp_path / "other.png") == []


# clips


def clips_of(count: int, frames: int, height: int, width: int) -> np.ndarray:
    media = np.random.default_rng(1).integers(
        0, 256, (count, frames, 3, height, width), dtype=np.uint8
    )
    media[1::2] = media[1::2, :1]  # every second one stands still
    return media


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (30, 41), (160, 120)])
@pytest.mark.parametrize("frames", [2, 9])
def test_clips_come_back_frame_by_frame(tmp_path, frames, size):
    media = clips_of(4, frames, *size)
    path = tmp_path / "grid.png"
    write_grid(path, media, ["a", "b", "c", "d"], [0.0, 1.0, float("nan"), 2.0], rate=12.0)
    for cell, clip in zip(read_grid(path), media, strict=True):
        np.testing.assert_array_equal(cell.media_FCHW, clip)
        assert (cell.is_clip, cell.rate) == (True, 12.0)
    assert [file.name for file in clip_files(path)] == [f"{i:03d}.webp" for i in range(4)]
    # fewer clips in their place
    write_grid(path, media[:2], ["a", "b"], [0.0, 1.0])
    assert len(clip_files(path)) == len(read_grid(path)) == 2
    remove_grid(path)
    assert list(tmp_path.iterdir()) == []


def test_a_cell_shows_a_strip_of_frames(tmp_path):
    """Those of a clip whose file is gone, in the clip's time."""
    media = clips_of(3, 9, 16, 24)
    path = tmp_path / "grid.png"
    write_grid(path, media, ["a", "b", "c"], [0.0, 1.0, 2.0], columns=8)
    for file in clip_files(path):
        file.unlink()
    for cell, clip in zip(read_grid(path), media, strict=True):
        np.testing.assert_array_equal(cell.media_FCHW, clip[[0, 2, 3, 5, 6, 8]])
        assert cell.rate == pytest.approx(8.0 * 6 / 9)
    with Image.open(path) as sheet:
        assert sheet.width <= 8 * (SMALL_CELL + MARGIN) + MARGIN


def test_long_and_large_clips_are_kept_smaller(tmp_path):
    """At most ``MOST_FRAMES`` frames of the same clip in the same time, sides of a large cell."""
    media = np.repeat(np.arange(0, 250, 5, dtype=np.uint8), 3 * 300 * 200)
    media = media.reshape(1, 50, 3, 300, 200)
    write_grid(tmp_path / "grid.png", media, ["a"], [0.0], rate=10.0)
    (cell,) = read_grid(tmp_path / "grid.png")
    shades = media[0, spread(50, MOST_FRAMES), 0, 0, 0]
    assert cell.media_FCHW.shape == (MOST_FRAMES, 3, LARGE_CELL, 171)
    assert np.abs(cell.media_FCHW[:, 0, 99, 99].astype(int) - shades).max() <= 2
    assert MOST_FRAMES / cell.rate == pytest.approx(5.0)
    # what is compared with it later has the same frames
    assert shrink(media).shape[1:] == cell.media_FCHW.shape
