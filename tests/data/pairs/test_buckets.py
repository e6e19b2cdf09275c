"""Aspect buckets: SDXL's table, the choice by aspect ratio, what is cut out, and the order of
pairs."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode, functional

from rlalign.data.pairs.buckets import buckets_of, choose_bucket, cut_out
from rlalign.data.pairs.columns import write_pairs
from rlalign.data.pairs.ranking import encode
from rlalign.data.pairs.reader import PairReader, PreferenceSettings
from rlalign.diffusion.noise import generator

WIDE = """
2048x512 1984x512 1920x512 1856x512 1792x576 1728x576 1664x576 1600x640 1536x640 1472x704 1408x704
1344x704 1344x768 1280x768 1216x832 1152x832 1152x896 1088x896 1088x960 1024x960
"""
"""SDXL's sizes (width x height) that are wider than high, widest first."""
SHAPES = ((40, 64), (64, 40), (30, 90), (44, 44), (33, 100), (64, 40), (90, 30), (40, 66))
"""(height, width) of the pictures of a set, and of the others of each pair below."""
OTHERS = ((40, 64), (60, 44), (30, 90), (47, 44), (40, 100), (64, 40), (90, 30), (20, 33))


def table() -> np.ndarray:
    """(41, 2) SDXL's heights and widths."""
    wide = [tuple(map(int, size.split("x"))) for size in WIDE.split()]
    return np.array([*wide, (1024, 1024), *((w, h) for h, w in wide)])


def test_the_buckets_are_sdxls_table() -> None:
    assert set(buckets_of(1024)) == {(h, w) for h, w in table().tolist()}
    ratios = [w / h for h, w in buckets_of(1024)]
    assert ratios == sorted(ratios)


@pytest.mark.parametrize("size", [32, 512, 768])
def test_other_areas_have_the_same_shapes(size: int) -> None:
    assert set(buckets_of(size)) == {(h, w) for h, w in (table() * size // 1024).tolist()}


def test_a_bucket_is_the_nearest_of_all_in_aspect_ratio() -> None:
    rng = generator("buckets")
    log_ratios = np.log2(table()[:, 1]) - np.log2(table()[:, 0])
    for _ in range(300):
        sizes = rng.integers(20, 3000, size=(2, 2))
        wanted = np.log2(sizes[:, 1] / sizes[:, 0]).mean()
        nearest = table()[np.abs(log_ratios - wanted).argmin()]
        first, second = ((int(h), int(w)) for h, w in sizes)
        assert choose_bucket([first, second], 1024) == tuple(nearest)
        assert choose_bucket([second, first], 1024) == tuple(nearest)


def test_known_pictures_find_known_buckets() -> None:
    for height, width, bucket in (
        (1080, 1920, (768, 1344)),
        (1920, 1080, (1344, 768)),
        (3000, 2000, (1216, 832)),
        (500, 500, (1024, 1024)),
        (100, 900, (512, 2048)),
    ):
        assert choose_bucket([(height, width)], 1024) == bucket


@pytest.mark.parametrize("shape", [*SHAPES, (31, 20), (200, 300), (16, 64), (48, 48)])
def test_a_picture_covers_its_bucket_and_says_where_it_was_cut(shape: tuple[int, int]) -> None:
    """By torchvision: one side is the bucket's and the other's proportion is kept, to a pixel."""
    height, width = shape
    pixels = generator("cut", height, width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    high, wide = bucket = choose_bucket([shape], 48)
    found, crop = cut_out(picture, bucket)
    assert (found.height, found.width) == bucket
    assert (crop.height, crop.width) == shape

    # the smallest picture of that proportion which covers the bucket, in whole pixels
    scale = max(Fraction(high, height), Fraction(wide, width))
    resized = [int(height * scale), int(width * scale)]
    transforms: Any = functional  # whose annotations know tensors alone
    whole = transforms.resize(picture, resized, InterpolationMode.BILINEAR)
    cut = transforms.crop(whole, crop.top, crop.left, high, wide)
    assert np.array_equal(np.asarray(cut), np.asarray(found))
    centred = transforms.center_crop(whole, [high, wide])
    assert np.array_equal(np.asarray(centred), np.asarray(found))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 pairs of eight shapes, in row groups of five."""
    rows = []
    for number in range(24):
        rng = generator("a set of shapes", number)
        sides = {}
        for name, shapes in (("jpg_0", SHAPES), ("jpg_1", OTHERS)):
            height, width = shapes[number % len(shapes)]
            sides[name] = encode(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
        label = float(number % 2)
        rows.append({"caption": f"{number}", "label_0": label, "label_1": 1.0 - label, **sides})
    write_pairs(tmp_path / "pairs.parquet", rows, rows_per_group=5)
    return tmp_path


def reader(folder: Path, **changes: Any) -> PairReader:
    given = {"pairs_per_round": 10, "pairs_per_pass": 3, "shuffle": 7, "size": 32}
    settings = {"path": str(folder), "resize": "buckets", **given, **changes}
    return PairReader(PreferenceSettings.model_validate(settings), seed=4)


def test_a_round_has_the_pairs_that_it_had_and_a_pass_has_one_bucket(folder: Path) -> None:
    """Of each bucket in the order of the round."""
    mine, plain = reader(folder), reader(folder, resize="squash")
    for number in range(4):
        round = mine.round(number)
        assert [p.row for p in round] == [p.row for p in plain.round(number)]
        passes = list(mine.passes(number))
        assert sorted(p.row for part in passes for p in part) == sorted(p.row for p in round)
        by_bucket: dict[tuple[int, ...], list[str]] = {}
        for part in passes:
            shapes = {picture.shape for p in part for picture in (p.media_0, p.media_1)}
            assert len(shapes) == 1 and 1 <= len(part) <= 3
            by_bucket.setdefault(shapes.pop(), []).extend(p.row for p in part)
        assert len(by_bucket) > 3
        for shape, rows in by_bucket.items():
            assert rows == [p.row for p in round if p.media_0.shape == shape]


def test_both_pictures_are_in_the_bucket_of_the_pair(folder: Path) -> None:
    for pair in reader(folder, bad_share=0.0).all():
        number = int(pair.caption) % len(SHAPES)
        shapes = (SHAPES[number], OTHERS[number])
        assert pair.media_0.shape == pair.media_1.shape
        assert pair.media_0.shape[2:] == choose_bucket(shapes, 32)
        assert pair.crop_0 is not None and pair.crop_1 is not None
        assert (pair.crop_0[:2], pair.crop_1[:2]) == shapes


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "size must be > 0 with resize buckets: the side of the square whose area"),
        (1000, "size must be a multiple of 16 with resize buckets, whose sides are multiples"),
    ],
)
def test_buckets_need_a_size_of_sixteenths(tmp_path: Path, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceSettings(path=str(tmp_path), resize="buckets", size=size)
