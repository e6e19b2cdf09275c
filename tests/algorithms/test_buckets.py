"""Offline Diffusion-DPO in aspect buckets: what SDXL is told of each picture, what a run is refused
for, and a run that goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.algorithms.diffusion_dpo import DiffusionDPO
from rlalign.alignment.assemble import preference_pairs
from rlalign.alignment.loop import train_local
from rlalign.config import Run, load_begun, parse_run
from rlalign.core.batches import PairBatch
from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import write_pairs
from rlalign.data.pairs.ranking import encode
from rlalign.data.pairs.reader import PairReader
from rlalign.diffusion.noise import generator
from rlalign.networks.random_models import find_family, write_pipeline
from tests.runs import final_tensors, metrics, quiet

SHAPES = ((20, 20), (20, 40), (37, 20), (20, 22), (24, 48), (20, 20), (40, 22), (60, 60))
"""(height, width) of both pictures of each pair, more or less."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SDXL, and a set of pairs of several shapes."""
    folder = tmp_path_factory.mktemp("buckets")
    write_pipeline(folder / "sdxl", find_family("sdxl"))
    rows = []
    for number, (height, width) in enumerate(SHAPES):
        rng = generator("pictures", number)
        sizes = {"jpg_0": (3, height, width), "jpg_1": (3, height + 1, width)}
        pictures = {n: encode(rng.integers(0, 256, s, dtype=np.uint8)) for n, s in sizes.items()}
        rows.append({"caption": "two circles", "label_0": 1.0, "label_1": 0.0, **pictures})
    write_pairs(folder / "pairs.parquet", rows)
    return folder


def run_of(folder: Path, *, size: int = 32, side: int = 32, rounds: int = 2, **policy: Any) -> Run:
    return parse_run(
        {
            "name": "buckets",
            "rounds": rounds,
            "policy": {"name": "sdxl", "path": str(folder / "sdxl"), "lora_rank": 2, **policy},
            "plan": {"steps": 2, "eta": 0.0, "height": side, "width": side},
            "prompts": {"name": "list", "prompts": ["a red circle"]},
            "rewards": [{"name": "jpeg"}],
            "preferences": {
                "path": str(folder / "pairs.parquet"),
                "pairs_per_round": 8,
                "pairs_per_pass": 2,
                "size": size,
                "resize": "buckets",
            },
            "algorithm": {"name": "diffusion_dpo", "draws": 1, "posterior": "sample"},
            "learner": {"lr": 1.0e-3, "shards": 2, "updates_per_round": 1},
            "evaluate": {"every": 0, "prompts": 1, "grid": 1},
            "checkpoint": {"every": 1},
        }
    )


def test_each_picture_is_told_as_diffusers_would_tell_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture's own size, where its part was cut, and the bucket's size: a row a picture, first
    those of the first side."""
    run = run_of(folder)
    policy = run.policy.load("cpu")
    pipeline: Any = policy.family.pipeline  # type: ignore[attr-defined]
    reader = PairReader(run.preferences, run.seed)  # type: ignore[arg-type]
    parts = preference_pairs(reader, 0, run.plan)
    told: list[torch.Tensor] = []
    network: Any = policy.network
    network.register_forward_pre_hook(
        lambda _, args, more: told.append(more["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    passes = PairBatch(pairs=tuple(parts), draws=1).passes(1)
    shapes = set()
    for part, one, pairs in zip(parts, passes, reader.passes(0), strict=True):
        told.clear()
        loss = DiffusionDPO(draws=1, caption_dropout=0.5).loss(one, policy)
        assert torch.isfinite(loss.value)
        target = tuple(part.first.shape[-2:])
        shapes.add(target)
        assert (part.plan.height, part.plan.width) == target
        wanted = []
        for crop in [p.crop_0 for p in pairs] + [p.crop_1 for p in pairs]:
            assert crop is not None
            dim = network.config.projection_class_embeddings_input_dim
            add = network.config.addition_time_embed_dim
            ids = pipeline._get_add_time_ids(
                (crop.height, crop.width),
                (crop.top, crop.left),
                target,
                dtype=torch.float32,
                text_encoder_projection_dim=dim - 6 * add,
            )
            wanted.append(ids)
        assert len(told) == 2, "the reference and the policy"
        assert all(torch.equal(ids, torch.cat(wanted)) for ids in told)
        assert all(ids.dtype == torch.float32 for ids in told)
    assert len(shapes) > 3


def test_the_loss_of_a_round_is_the_mean_over_its_pairs(folder: Path) -> None:
    """Passes of one, two or more pairs weigh as many."""
    run = run_of(folder)
    reader = PairReader(run.preferences, run.seed)  # type: ignore[arg-type]
    passes = list(PairBatch(pairs=tuple(preference_pairs(reader, 0, run.plan)), draws=1).passes(1))
    assert {len(one.pairs) for one in passes} == {1, 2}
    assert all(math.isclose(one.weight, len(one.pairs) / 8) for one in passes)


@pytest.mark.promise
def test_a_run_in_buckets_goes_on_to_the_last_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlalign.report.write_report", quiet)
    train_local(run_of(folder), tmp_path / "whole", resume=False, on_record=quiet)
    train_local(run_of(folder, rounds=1), tmp_path / "stopped", resume=False, on_record=quiet)
    run = load_begun(tmp_path / "stopped" / "config.yaml", ["rounds=2"])
    train_local(run, tmp_path / "stopped", resume=True, on_record=quiet)
    mine, its = (final_tensors(tmp_path / name) for name in ("whole", "stopped"))
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in mine)
    first, second = metrics(tmp_path / "whole")
    assert first["grad_norm"] > 0 and second["preference/logit"] > 0


@pytest.mark.parametrize(
    ("size", "side", "message"),
    [
        (
            64,
            32,
            r"preferences.size must be that of buckets of which the plan's size is one, got 64 with"
            r" a plan of 32 x 32 \(height x width\); set it to 32",
        ),
        (
            16,
            16,
            r"preferences.size: the bucket of 31 x 8 .* must be a size that the policy draws, got"
            r" 16: plan.height and plan.width must be multiples of",
        ),
    ],
)
def test_buckets_that_the_policy_does_not_draw_are_refused(
    folder: Path, tmp_path: Path, size: int, side: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_local(
            run_of(folder, size=size, side=side), tmp_path / "run", resume=False, on_record=quiet
        )
