"""Stable Diffusion XL against diffusers' own pipeline, on small pipelines of random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlalign.core.registry import UserError
from rlalign.diffusion.condition import Words
from rlalign.networks.random_models import FAMILIES, empty_networks, write_pipeline
from rlalign.policies.sdxl import StableDiffusionXL, StableDiffusionXLFamily
from tests.policies.acceptance import Acceptance, Case

# in each of eight transformer blocks two attentions of four layers
LAYERS = 8 * 2 * 4


def call(guidance: float) -> Mapping[str, Any]:
    return {"guidance_scale": guidance}


def published(folder: Path) -> Case:
    """Euler's scheduler and zeros for the empty caption, as the published folder has them."""
    write_pipeline(folder, FAMILIES["sdxl"], seed=1)
    return Case(recipe=StableDiffusionXL(path=str(folder)), adapted=LAYERS, call=call)


CASES: dict[str, Callable[[Path], Case]] = {"published": published}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return CASES[request.param](tmp_path_factory.mktemp("pipeline"))


class TestAcceptance(Acceptance):
    """Each case is taken by diffusers as by rlalign."""


def edit(file: Path, **changes: object) -> None:
    """Changes settings of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def copy(case: Case, tmp_path: Path) -> Path:
    """A folder to change."""
    return Path(shutil.copytree(case.recipe.path, tmp_path / "copy"))


def rows(words: Words) -> torch.Tensor:
    """All numbers of each row of words."""
    return torch.cat([tensor.flatten(1) for tensor in words.tensors.values()], dim=1)


def test_it_has_two_empties(case: Case) -> None:
    """Guidance goes away from zeros; a dropped caption is the encoded "", as in Diffusion-DPO's
    published training."""
    policy = case.policy
    condition = policy.encode(["a red circle", "two"])
    assert condition.against is not None
    assert not rows(condition.against).any()
    dropped = rows(condition.dropped(torch.tensor([True, False])).caption)
    empty = rows(policy.encode([""]).caption)[0]
    assert torch.equal(dropped[0], empty)
    assert empty.abs().max() > 0.1
    assert torch.equal(dropped[1], rows(condition.caption)[1])
    uncond, caption = condition.both().tensors["pooled_BD"].chunk(2)
    assert not uncond.any() and caption.any()


@pytest.mark.parametrize("negative", ["", "a blue dog"])
def test_zeros_are_for_pipelines_that_say_so(copy: Path, negative: str) -> None:
    """Without force_zeros_for_empty_prompt guidance goes away from the encoded ""; a negative
    prompt takes the place of either."""
    edit(copy / "model_index.json", force_zeros_for_empty_prompt=bool(negative))
    policy = StableDiffusionXL(path=str(copy), negative_prompt=negative).load("cpu")
    away = policy.encode(["two"]).both().take(torch.tensor([0]))
    assert torch.equal(rows(away), rows(policy.encode([negative]).caption))


@pytest.mark.parametrize(
    ("kind", "to_one", "clean"),
    [
        ("EulerDiscreteScheduler", False, True),
        ("EulerDiscreteScheduler", True, True),
        ("DPMSolverMultistepScheduler", False, True),
        ("DDIMScheduler", False, False),
        ("DDIMScheduler", True, True),
    ],
)
def test_where_sampling_ends_is_the_schedulers(
    copy: Path, kind: str, to_one: bool, clean: bool
) -> None:
    """The published folder has Euler's scheduler beside set_alpha_to_one false, which it does not
    read: it ends at noise 0."""
    changes: dict[str, object] = {"_class_name": kind, "set_alpha_to_one": to_one}
    if kind == "DDIMScheduler":
        changes |= {"clip_sample": False, "interpolation_type": None}
    edit(copy / "scheduler" / "scheduler_config.json", **changes)
    index = json.loads((copy / "model_index.json").read_text())
    edit(copy / "model_index.json", scheduler=[index["scheduler"][0], kind])
    path = StableDiffusionXL(path=str(copy)).load("cpu").path
    last = path.levels(4)[-1]
    assert (path.sigma(last) == 0.0) == clean


def test_it_is_told_the_size_that_is_drawn(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Original size, corner of the cut, size that is drawn: a row for each sample, in float32."""
    policy = case.policy
    told: list[torch.Tensor] = []

    def hear(x: torch.Tensor, *rest: Any, **more: Any) -> tuple[torch.Tensor]:
        told.append(more["added_cond_kwargs"]["time_ids"])
        return (x,)

    monkeypatch.setattr(policy.network, "forward", hear)
    words = policy.encode(["a red circle", "two"]).caption
    policy.answer(torch.zeros(2, 4, 12, 8), torch.tensor([3, 4]), words)
    assert told[0].dtype == torch.float32
    assert told[0].tolist() == [[24.0, 16.0, 0.0, 0.0, 24.0, 16.0]] * 2


def test_the_published_sizes_have_560_adapted_layers() -> None:
    """70 transformer blocks of two attentions, counted without memory for weights."""
    unet = empty_networks(FAMILIES["sdxl"], "published")["unet"]
    ends = tuple(f".{target}" for target in StableDiffusionXLFamily.lora_targets)
    assert sum(name.endswith(ends) for name, _ in unet.named_modules()) == 560


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (
            "unet",
            {"addition_embed_type": None},
            "unet: addition_embed_type must be text_time, got None",
        ),
        (
            "unet",
            {"time_cond_proj_dim": 8},
            "unet: time_cond_proj_dim must be null, got 8: this network is also told the guidance",
        ),
        ("scheduler", {"use_karras_sigmas": True}, "use_karras_sigmas must be off"),
        ("scheduler", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type must be 'zero'"),
    ],
)
def test_what_would_be_misread_is_refused_by_name(
    copy: Path, part: str, changes: dict[str, object], message: str
) -> None:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    edit(copy / part / name, **changes)
    if changes.get("time_cond_proj_dim"):
        add_weights(copy / "unet", "time_embedding.cond_proj.weight", (8, 8))
    with pytest.raises(UserError, match=message):
        StableDiffusionXL(path=str(copy)).load("cpu")


def add_weights(part: Path, name: str, shape: tuple[int, ...]) -> None:
    """Adds a tensor of zeros to a part's file."""
    file = part / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), name: torch.zeros(shape)}, file, metadata={"format": "pt"})
