"""Pairs of clips: written by a round, by a simulated judge, read back frame by frame by both
readers, and learned from as clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from rlalign.algorithms.diffusion_dpo import DiffusionDPO
from rlalign.alignment.assemble import preference_pairs
from rlalign.core.batches import PairBatch
from rlalign.core.clips import encode_clip
from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import write_pairs
from rlalign.data.pairs.ranking import encode, pairs_of
from rlalign.data.pairs.reader import PairReader, PreferenceSettings, first_pair
from rlalign.data.pairs.rows import Pair, decode, to_pair
from rlalign.fitting.reward.losses import scores
from rlalign.fitting.reward.settings import FitReward
from rlalign.fitting.reward.simulate import simulate_pairs
from rlalign.networks.towers import build_towers
from rlalign.runtime.pairs import _decode, _item, _row
from tests.made_clips import FRAMES, PLAN, made_clips, scored_clips
from tests.policies.clips import Clips


def settings(path: Path, **changes: Any) -> PreferenceSettings:
    values = {"path": str(path), "pairs_per_round": 4, "pairs_per_pass": 4, "bad_share": 0.0}
    return PreferenceSettings.model_validate(values | changes)


def row(first: bytes, second: bytes) -> dict[str, Any]:
    sides = {"jpg_0": first, "jpg_1": second}
    return {"caption": "a ball", "label_0": 1.0, "label_1": 0.0, **sides}


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """All pairs of a round's twelve clips, three of each prompt."""
    media = made_clips(12)
    rows = pairs_of([scored_clips(media, per_prompt=3)], "all", "jpeg")
    assert write_pairs(tmp_path / "pairs.parquet", rows) == 12
    return tmp_path / "pairs.parquet", media


def test_a_rounds_clips_come_back_frame_by_frame(written: tuple[Path, np.ndarray]) -> None:
    """Lossless, though JPEG was asked for; the frozen ones too."""
    file, media = written
    table = pq.read_table(file)
    assert set(table["frames"].to_pylist()) == {FRAMES}
    assert set(table["rate"].to_pylist()) == {8.0}
    uids = [[uid.split("/")[-2:] for uid in table[f"image_{i}_uid"].to_pylist()] for i in (0, 1)]
    pairs = list(PairReader(settings(file), 0, frames=FRAMES).all())
    assert len(pairs) == 12
    for pair, *names in zip(pairs, *uids, strict=True):
        for found, (prompt, sample) in zip((pair.media_0, pair.media_1), names, strict=True):
            assert np.array_equal(found, media[3 * int(prompt) + int(sample)])


def test_tasks_on_a_cluster_read_the_same_clips(written: tuple[Path, np.ndarray]) -> None:
    reader = PairReader(settings(written[0]), 0, frames=FRAMES)
    items = [_item(one.group, one.numbers) for one in reader._groups]
    batch = {name: [item[name] for item in items] for name in items[0]}
    found = [
        _row(dict(zip(columns, values, strict=True)))
        for columns in _decode(batch, size=8, resize="squash", frames=FRAMES)
        for values in zip(*columns.values(), strict=True)
    ]
    for other, row in zip(found, reader._groups[0].rows(), strict=True):
        one = to_pair(row, 8, "squash", FRAMES)
        assert isinstance(other, Pair)
        assert one.media_0.shape == (FRAMES, 3, 8, 8)
        assert np.array_equal(one.media_0, other.media_0)
        assert np.array_equal(one.media_1, other.media_1)


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_each_frame_is_resized_as_a_picture_is(resize: Any) -> None:
    media = made_clips(1)[0]
    content, _ = encode_clip(media)
    frames = [decode(encode(frame), 8, resize)[0] for frame in media]
    assert np.array_equal(decode(content, 8, resize), np.stack(frames))


def test_both_clips_of_a_pair_get_one_bucket() -> None:
    first, second = (encode_clip(media)[0] for media in made_clips(2))
    pair = to_pair({**row(first, second), "row": "p:0"}, 32, "buckets", FRAMES)
    assert pair.media_0.shape == pair.media_1.shape
    assert pair.media_0.shape[0] == FRAMES
    assert pair.crop_0 == pair.crop_1
    alone = to_pair({**row(*[encode(made_clips(1)[0, 4])] * 2), "row": "p:0"}, 32, "buckets")
    assert np.array_equal(pair.media_0[4], alone.media_0[0])


def test_clips_of_other_lengths_are_refused_by_row(tmp_path: Path) -> None:
    clip, other, picture = (encode_clip(made_clips(1, frames=n)[0])[0] for n in (9, 5, 1))
    cases = [
        (clip, other, FRAMES, "jpg_0 has 9 frames and jpg_1 5 frames"),
        (clip, picture, 0, "jpg_0 has 9 frames and jpg_1 1 frame"),
        (other, other, FRAMES, r"its clips must have plan\.frames \(9\), got 5 frames"),
        (picture, picture, FRAMES, r"its clips must have plan\.frames \(9\), got 1 frame"),
        (clip, clip, 1, r"its clips must have plan\.frames \(1\), got 9 frames"),
    ]
    for number, (first, second, frames, message) in enumerate(cases):
        file = tmp_path / f"{number}.parquet"
        write_pairs(file, [row(first, second)])
        with pytest.raises(UserError, match=rf"{number}\.parquet:0: {message}"):
            first_pair(settings(file), frames)
        with pytest.raises(UserError, match=message):
            list(PairReader(settings(file), 0, frames=frames).all())


def test_a_stray_clip_in_a_set_of_pictures_is_a_bad_row(tmp_path: Path) -> None:
    clip, picture = (encode_clip(made_clips(1, frames=n)[0])[0] for n in (9, 1))
    write_pairs(tmp_path / "p.parquet", [row(picture, picture)] * 3 + [row(clip, clip)])
    reader = PairReader(settings(tmp_path / "p.parquet", bad_share=0.25), 0, frames=1)
    assert len(list(reader.all())) == 3
    assert list(reader.bad.found) == [f"{tmp_path / 'p.parquet'}:3"]


def test_a_gif_of_ones_own_is_a_clip(tmp_path: Path) -> None:
    shades = [Image.new("L", (16, 16), 20 * number) for number in range(FRAMES)]
    file = tmp_path / "ball.gif"
    shades[0].save(file, save_all=True, append_images=shades[1:], duration=100)
    write_pairs(tmp_path / "p.parquet", [row(file.read_bytes(), file.read_bytes())])
    (pair,) = PairReader(settings(tmp_path / "p.parquet"), 0, frames=FRAMES).all()
    assert pair.media_0[:, 0, 0, 0].tolist() == [20 * number for number in range(FRAMES)]


def test_diffusion_dpo_learns_from_whole_clips(written: tuple[Path, np.ndarray]) -> None:
    """The video encoder reads all frames, and the loss has a gradient."""
    policy = Clips().load("cpu")
    reader = PairReader(settings(written[0]), 0, frames=FRAMES)
    parts = preference_pairs(reader, 0, PLAN)
    assert parts[0].first.shape == (4, FRAMES, 3, 16, 24)
    one = next(iter(PairBatch(pairs=tuple(parts), draws=1).passes(1, (1, 0))))
    loss = DiffusionDPO(posterior="mean").loss(one, policy).value
    loss.backward()
    gradients = [p.grad for p in policy.trainable().values()]
    assert all(grad is not None and float(grad.abs().sum()) > 0 for grad in gradients)
    latents = policy.encode_media(parts[0].first.float() / 255.0)
    assert latents.shape[2] == (FRAMES - 1) // 2 + 1
    assert torch.equal(parts[0].latents(lambda media, side: latents)[0], latents)


def test_a_fitted_reward_sees_every_frame(written: tuple[Path, np.ndarray]) -> None:
    towers = build_towers("tiny").eval()
    pairs = list(PairReader(settings(written[0]), 0).all())[:3]
    with torch.no_grad():
        first_B, second_B, _ = scores(towers, pairs, "cpu")
        for side_B, name in ((first_B, "media_0"), (second_B, "media_1")):
            media = torch.from_numpy(np.stack([getattr(pair, name) for pair in pairs])) / 255.0
            captions = [pair.caption for pair in pairs]
            each = [towers(media[:, number : number + 1], captions) for number in range(FRAMES)]
            torch.testing.assert_close(side_B, torch.stack(each).mean(0), rtol=1e-4, atol=1e-4)


def test_a_simulated_judge_compares_whole_clips(tmp_path: Path) -> None:
    plan = {"steps": 2, "rule": "flow_sde", "height": 16, "width": 24, "frames": 5}
    simulate = {
        "utility": [{"name": "jpeg"}],
        "policy": {"name": "tests.policies.clips:Clips"},
        "prompts": {"name": "list", "prompts": ["a ball", "a cube"], "per_unit": 1},
        "plan": plan,
        "pairs": 2,
        "samples_per_prompt": 2,
    }
    config = FitReward.model_validate({"simulate": simulate})
    simulate_pairs(config, tmp_path / "p.parquet", lambda *said: None)
    table = pq.read_table(tmp_path / "p.parquet")
    assert table["frames"].to_pylist() == [5, 5]
    for pair in PairReader(settings(tmp_path / "p.parquet"), 0, frames=5).all():
        assert pair.media_0.shape == (5, 3, 16, 24)
    with pytest.raises(ValidationError, match=r"drawn must be 0 with plan\.frames > 1"):
        FitReward.model_validate({"simulate": {**simulate, "drawn": 0.5}})
