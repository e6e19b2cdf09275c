"""Evaluation against explicit sums and closed forms."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlalign.core.records import Plan, Scored
from rlalign.diffusion.noise import unit_noise
from rlalign.diffusion.rollout import replay
from rlalign.diffusion.steps import is_stochastic
from rlalign.learning import evaluate
from tests.toy import PLAN, ToyPolicy, collect, make_units

PROMPTS = [(i, f"prompt {i}") for i in range(7)]


def scored_with(
    score_N: list[float], *, per_unit: int = 3, title: str = "toy", other: float | None = None
) -> list[Scored]:
    """Units over as many prompts as scores, with noise for pictures and, if asked, a second reward
    of one value."""
    units = evaluate.evaluation_units(
        [(i, f"prompt {i}") for i in range(len(score_N))], PLAN, 0, per_unit
    )
    rest = np.array(score_N, dtype=np.float32)
    out = []
    for unit in units:
        size = len(unit.prompts)
        mine, rest = rest[:size], rest[size:]
        raw = {title: mine} | (
            {} if other is None else {"other": np.full(size, other, dtype=np.float32)}
        )
        media = np.random.default_rng(unit.key.index).integers(
            0, 256, (size, 1, 3, 16, 16), dtype=np.uint8
        )
        out.append(
            Scored(unit=unit, policy_version=0, raw=raw, total_B=2.0 * mine, media_BFCHW=media)
        )
    return out


@pytest.mark.parametrize(("count", "frames", "side"), [(2, 1, 8), (5, 1, 32), (4, 3, 20)])
def test_pixel_diversity_is_the_mean_over_pairs(count, frames, side):
    media = np.random.default_rng(1).integers(
        0, 256, (count, frames, 3, side, side), dtype=np.uint8
    )
    pictures = torch.from_numpy(media.astype(np.float64) / 255.0).flatten(0, 1)
    small = (
        torch.nn.functional.adaptive_avg_pool2d(pictures, 8).numpy().reshape(count, frames, 3, 8, 8)
    )
    pairs = [float(((a - b) ** 2).mean()) for a, b in itertools.combinations(small, 2)]
    assert evaluate.pixel_diversity(media) == pytest.approx(
        math.sqrt(sum(pairs) / len(pairs)), abs=1e-12
    )


def test_pixel_diversity_of_equal_pictures_is_zero():
    one = np.random.default_rng(2).integers(0, 256, (1, 1, 3, 32, 32), dtype=np.uint8)
    assert evaluate.pixel_diversity(np.repeat(one, 6, axis=0)) < 1e-12
    assert evaluate.pixel_diversity(one) == 0.0
    clip = np.random.default_rng(3).integers(0, 256, (1, 5, 3, 32, 32), dtype=np.uint8)
    assert evaluate.pixel_diversity(np.repeat(clip, 4, axis=0)) < 1e-12, (
        "frames of a clip are no samples"
    )
    assert evaluate.pixel_diversity(clip) == 0.0


def test_win_rate_counts_ties_and_missing_scores_half():
    nan = float("nan")
    mine, theirs = (
        np.array([2.0, 1.0, 0.0, nan, 1.0, nan]),
        np.array([1.0, 1.0, 1.0, 0.0, nan, nan]),
    )
    assert evaluate.win_rate(mine, theirs) == pytest.approx((1 + 0.5 + 0 + 0.5 + 0.5 + 0.5) / 6)
    assert evaluate.win_rate(mine, theirs) + evaluate.win_rate(theirs, mine) == pytest.approx(1.0)


def test_summarise_leaves_missing_scores_out():
    nan = float("nan")
    out = evaluate.summarise(scored_with([1.0, nan, 3.0, 5.0], other=0.25), ["toy"], ["other"])
    assert out["reward/toy/mean"] == 3.0 and out["reward/total/mean"] == 6.0
    assert out["reward/toy/std"] == pytest.approx(np.std([1.0, 3.0, 5.0]))
    assert out["held_out/other/mean"] == 0.25 and out["held_out/other/std"] == 0.0
    assert out["diversity/pixel_rms"] > 0
    lost = evaluate.summarise(scored_with([nan, nan]), ["toy"], [])
    assert math.isnan(lost["reward/toy/mean"])


def test_means_by_a_field_of_the_records_leave_missing_scores_out():
    from dataclasses import replace

    from rlalign.core.prompts import Prompt

    nan = float("nan")
    tags = [{"tag": "b"}, {"tag": "a"}, {"tag": "b"}, {}, {"tag": ["x", 1]}]
    found = []
    for one in scored_with([1.0, nan, 3.0, 5.0, 7.0], other=0.5):
        prompts = tuple(Prompt(p, tags[int(p.split()[1])]) for p in one.unit.prompts)
        found.append(replace(one, unit=replace(one.unit, prompts=prompts)))
    plain = evaluate.summarise(found, ["toy"], ["other"])
    out = evaluate.summarise(found, ["toy"], ["other"], by="tag")
    more = {k: v for k, v in out.items() if k not in plain}
    assert {k: v for k, v in out.items() if k in plain} == plain
    toy = {k.split("/", 2)[2]: v for k, v in more.items() if k.startswith("reward/toy/")}
    assert math.isnan(toy.pop("tag=a"))
    assert toy == {
        'tag=["x", 1]': 7.0,
        "tag=b": 2.0,
        "tag=none": 5.0,
        "mean_by_tag": pytest.approx((2 + 5 + 7) / 3),
    }
    assert more["held_out/other/tag=b"] == 0.5


def test_compare_pairs_the_same_prompts():
    base, aligned = (
        scored_with([0.0, 1.0, 2.0, 3.0], other=1.0),
        scored_with([1.0, 1.0, 1.0, 5.0], other=0.5),
    )
    out = evaluate.compare(base, aligned, ["toy"], ["other"])
    assert out["prompts"] == 4 and out["plan"] == PLAN.model_dump()
    assert out["win_rate"] == {"total": 0.625, "toy": 0.625, "other": 0.0}
    assert out["gain"].keys() == out["base"].keys() == out["aligned"].keys()
    assert (
        out["gain"]["reward/toy/mean"] == pytest.approx(0.5)
        and out["gain"]["held_out/other/mean"] == -0.5
    )
    assert [s["prompt"] for s in out["samples"]] == [f"prompt {i}" for i in range(4)]
    assert out["samples"][3] == {
        "prompt": "prompt 3",
        "base": {"total": 6.0, "toy": 3.0, "other": 1.0},
        "aligned": {"total": 10.0, "toy": 5.0, "other": 0.5},
    }


@pytest.mark.parametrize("per_unit", [1, 2, 3, 7, 100])
def test_noise_does_not_depend_on_how_prompts_are_split(per_unit):
    def noise(size: int) -> tuple[list[str], torch.Tensor]:
        units = evaluate.evaluation_units(PROMPTS, PLAN, 5, size)
        return [p for u in units for p in u.prompts], torch.cat(
            [unit_noise(u, 2, (2, 3)) for u in units]
        )

    words, rows = noise(per_unit)
    assert words == [text for _, text in PROMPTS]
    assert torch.equal(rows, noise(4)[1])
    assert len({tuple(r.flatten().tolist()) for r in rows}) == len(PROMPTS)


def test_equal_prompts_have_noise_of_their_own():
    (unit,) = evaluate.evaluation_units([(3, "a"), (3, "a")], PLAN, 0, 2)
    first, second = unit_noise(unit, 0, (4,))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_kl_is_zero_at_the_start_and_the_closed_form_after(lora_rank):
    policy = ToyPolicy(lora_rank=lora_rank, lora_alpha=lora_rank)
    assert evaluate.kl_to_reference(policy, collect(policy, make_units(2))) == 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    scored = collect(policy, make_units(2))
    values = []
    with torch.no_grad():
        for one in scored:
            assert one.trajectory is not None
            latents = torch.from_numpy(one.trajectory.latents_BK1)
            condition = policy.encode(one.unit.prompts)
            for k in np.flatnonzero(one.trajectory.stochastic_K):
                mine = replay(policy, one.unit, latents[:, [int(k)]], [int(k)], condition).gaussian
                with policy.as_reference():
                    theirs = replay(
                        policy, one.unit, latents[:, [int(k)]], [int(k)], condition
                    ).gaussian
                gap = (mine.mean.double() - theirs.mean.double()) ** 2
                values.append((gap / (2.0 * mine.std.double() ** 2)).flatten(1).mean(1))
    expected = float(torch.cat(values).mean())
    # float32 inside, near 0 of log(s/s) + (s^2 + gap) / (2 s^2) - 1/2: an absolute margin of a few
    # ulps of 1/2
    assert expected > 1e-5
    assert evaluate.kl_to_reference(policy, scored) == pytest.approx(expected, rel=1e-4, abs=2e-7)


def test_kl_without_a_stochastic_step_is_zero():
    policy, plan = ToyPolicy(), Plan(steps=3, eta=0.0)
    assert not is_stochastic(policy.path, policy.path.levels(3), rule="ddim", eta=0.0).any()
    assert evaluate.kl_to_reference(policy, collect(policy, make_units(1, plan=plan))) == 0.0


def test_samples_are_a_grid_in_unit_order(tmp_path):
    from rlalign.core.pictures import read_grid

    scored = scored_with([0.5, 1.0, 1.5, 2.0, 2.5])
    path = evaluate.write_samples(tmp_path, 10, scored, 4)
    assert path == tmp_path / "samples" / "round-00010.png"
    cells = read_grid(path)
    assert [(c.caption, c.score) for c in cells] == [(f"prompt {i}", 1.0 + i) for i in range(4)]
    np.testing.assert_array_equal(
        np.asarray(cells[3].picture), evaluate.media_of(scored)[3, 0].transpose(1, 2, 0)
    )


def test_json_has_no_nan(tmp_path):
    content = {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": (2, "x")}}
    evaluate.write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.0, None],
        "c": {"d": [2, "x"]},
    }
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_media_must_be_kept():
    with pytest.raises(AssertionError, match="keeps its media"):
        evaluate.media_of([replace(scored_with([1.0])[0], media_BFCHW=None)])
