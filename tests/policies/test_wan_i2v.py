"""Wan's image to video against diffusers' own pipelines, on small ones of random weights."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rlalign.alignment.models import find_model
from rlalign.cli import main
from rlalign.cli.check import room
from rlalign.config import dump
from rlalign.core.prompts import Prompt
from rlalign.core.registry import UserError
from rlalign.data.prompts.file import FilePrompts
from rlalign.diffusion.rollout import denoised
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.base import LATENTS
from rlalign.policies.wan import Wan
from rlalign.policies.wan_i2v import WanI2V
from tests.policies.acceptance import (
    PROMPTS,
    Acceptance,
    Case,
    asked,
    stochastic,
    with_prompts,
)
from tests.policies.family_runs import ALGORITHMS, PATHS, run_of, train_two_rounds
from tests.policies.test_wan import FRAMES, load_second, step_once
from tests.toy import collect, make_units

pytestmark = pytest.mark.promise  # the default tests have Wan from words

TEXT_TOKENS = 512
"""2.1's transformer looks for an image encoder's words before so many."""


def draw_picture(file: Path, seed: int = 0) -> Path:
    """A smooth picture of another size than the clip."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize((40, 30), Image.Resampling.BILINEAR).save(file)
    return file


def carrying(image: str) -> tuple[str, str]:
    return Prompt(PROMPTS[0], {"image": image}), Prompt(PROMPTS[1], {"image": image})


def wan21(folder: Path) -> Case:
    picture = draw_picture(folder / "first.png")
    write_pipeline(folder / "pipeline", FAMILIES["wan_i2v"])
    told = {"image": Image.open(picture).convert("RGB"), "max_sequence_length": TEXT_TOKENS}
    return Case(
        recipe=WanI2V(path=str(folder / "pipeline"), text_tokens=TEXT_TOKENS),
        adapted=20,
        call=lambda w: {"guidance_scale": w, **told},
        sizes=((16, 16), (32, 16)),
        frames=FRAMES,
        prepare=step_once,
        prompts=carrying(str(picture)),
    )


def wan22(folder: Path) -> Case:
    """Of four steps two are above the boundary of 0.9."""
    case = wan21(folder)
    place = folder / "second"
    write_pipeline(place, FAMILIES["wan22_i2v"])
    return replace(
        case,
        recipe=WanI2V(path=str(place), text_tokens=TEXT_TOKENS),
        adapted=32,
        timesteps=(900, 200),
        load_second=load_second,
    )


def wan22_5b(folder: Path) -> Case:
    """The picture is held in the first latent frame."""
    case = wan21(folder)
    place = folder / "held"
    write_pipeline(place, replace(FAMILIES["wan22_5b"], pipeline="WanImageToVideoPipeline"))
    recipe = WanI2V(path=str(place), text_tokens=TEXT_TOKENS)
    return replace(case, recipe=recipe, adapted=16, sizes=((32, 32), (64, 32)))


CASES: dict[str, Callable[[Path], Case]] = {
    "wan_i2v": wan21,
    "wan22_i2v": wan22,
    "wan22_5b": wan22_5b,
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return CASES[request.param](tmp_path_factory.mktemp("pipeline"))


class TestAcceptance(Acceptance):
    """Each case is taken by diffusers as by rlalign."""


def test_each_prompt_has_its_own_picture(case: Case, tmp_path: Path) -> None:
    """Bit for bit as alone; the same picture as a data URI is the same, and the empty caption and
    what guidance goes away from have it too."""
    first, other = (draw_picture(tmp_path / f"{seed}.png", seed) for seed in (1, 2))
    data = f"data:image/png;base64,{base64.b64encode(first.read_bytes()).decode()}"
    prompts = [Prompt("a", {"image": image}) for image in (str(first), str(other), data)]
    plan = case.plan(case.sizes[0])
    policy = case.varied(negative_prompt="grey")
    found = policy.encode(prompts, plan)
    seen = [name for name in found.caption.tensors if name.startswith("picture")]
    assert len(seen) == (2 if case.policy.family.sees_words_of_pictures else 1)  # type: ignore[attr-defined]
    assert found.against is not None
    for name in seen:
        alone = case.policy.encode(prompts[1:2], plan).caption[name][0]
        rows = found.caption[name]
        assert torch.equal(rows[1], alone)
        assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
        assert torch.equal(found.empty[name], rows) and torch.equal(found.against[name], rows)


def test_a_learner_reads_pictures_and_decodes_nothing(case: Case) -> None:
    """Its autoencoder is loaded for the prompts."""
    family: Any = case.recipe.build_parts("cpu", LATENTS)
    assert {"transformer", "vae", "text_encoder"} <= set(family.parts())
    plan = case.plan(case.sizes[0])
    mine = family.encode(case.prompts, plan).caption
    for name, tensor in case.policy.encode(case.prompts, plan).caption.tensors.items():
        assert torch.equal(mine[name], tensor)


def test_a_folder_alone_is_read_under_its_name(case: Case) -> None:
    assert type(find_model(case.recipe.path).recipe) is WanI2V


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return wan21(tmp_path_factory.mktemp("old"))


def test_a_prompt_without_a_picture_is_refused(old: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"in the field 'image' of its record .*None with 'two'"):
        old.policy.encode([old.prompts[0], "two"], old.plan((16, 16)))
    torn = tmp_path / "torn.png"
    torn.write_bytes(draw_picture(tmp_path / "whole.png").read_bytes()[:60])
    for image in (str(torn), str(tmp_path / "none.png"), "data:image/png;base64,%%", os.curdir):
        with pytest.raises(UserError, match=r"prompts: image '.*' cannot be read as a picture"):
            old.policy.encode([Prompt("a", {"image": image})], old.plan((16, 16)))


def test_settings_that_do_not_fit_are_refused(old: Case) -> None:
    with pytest.raises(UserError, match=r"policy\.text_tokens must be 512 for .*, got 24"):
        old.varied(text_tokens=24)
    with pytest.raises(UserError, match=r"policy\.embeddings must be empty for wan_i2v"):
        old.varied(embeddings="actor")


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return wan22_5b(tmp_path_factory.mktemp("held"))


def test_the_held_frame_ends_on_the_picture_and_no_weight_moves_it(held: Case) -> None:
    """Its latent in the chain has as much noise as the others', its last one is the picture's; its
    prediction, its Gaussian and its gradient are the same under any weights, guided too, and the
    frames after it are not."""
    plan = stochastic(held.policy, held).model_copy(update={"guidance": 3.0})
    units = [with_prompts(make_units(1, per_unit=2, plan=plan)[0], held.prompts)]
    trajectory = collect(held.policy, units)[0].trajectory
    latents_BK1 = torch.from_numpy(trajectory.latents_BK1)
    picture = held.policy.encode(held.prompts, plan).caption["picture_BCFHW"]
    assert ((latents_BK1[:, :2, :, :1] - picture[:, None]).abs().flatten(2).mean(2) > 0.3).all()
    told = plan.model_dump(include={"steps", "guidance", "eta", "height", "width", "frames"})
    last = held.policy.sample(held.prompts, output="latents", **told)
    torch.testing.assert_close(last[:, :, :1], picture, rtol=0, atol=2e-6)

    # of two policies
    other = held.trained()
    levels = held.policy.path.at(plan).levels(plan.steps)
    x = latents_BK1[:, 1]
    found = [
        denoised(one, x, levels[1], levels[2], one.encode(held.prompts, plan), plan, 0.7).gaussian
        for one in (held.policy, other)
    ]
    mine, theirs = (one.mean for one in found)
    assert torch.equal(mine[:, :, :1], theirs[:, :, :1])
    assert (mine[:, :, 1:] - theirs[:, :, 1:]).abs().max() > 1e-3
    other.network.zero_grad()
    theirs[:, :, 0].square().sum().backward(retain_graph=True)
    assert not any(p.grad is not None and p.grad.any() for p in other.trainable().values())
    theirs[:, :, 1:].square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in other.trainable().values())


def test_the_published_folder_of_the_5b_is_read_by_name(held: Case, tmp_path: Path) -> None:
    """Whose index says WanPipeline: alone it is text to video."""
    write_pipeline(tmp_path, FAMILIES["wan22_5b"])
    assert type(find_model(str(tmp_path)).recipe) is Wan
    named = WanI2V(path=str(tmp_path), text_tokens=TEXT_TOKENS).load("cpu")
    with torch.no_grad():
        found = named.family.predict(*asked(named, held))
        wanted = held.policy.family.predict(*asked(held.policy, held))
    assert torch.equal(found, wanted)
    named.save(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert (index["_class_name"], index["expand_timesteps"]) == ("WanPipeline", True)


def test_two_experts_with_a_held_frame_are_refused(tmp_path: Path) -> None:
    write_pipeline(tmp_path, FAMILIES["wan22_i2v"])
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"expand_timesteps": True}))
    with pytest.raises(UserError, match=r"boundary_ratio in model_index\.json must be null beside"):
        WanI2V(path=str(tmp_path)).load("cpu")


def test_a_transformer_of_texts_alone_is_refused(tmp_path: Path) -> None:
    family = FAMILIES["wan22"]
    write_pipeline(tmp_path, replace(family, pipeline="WanImageToVideoPipeline"))
    with pytest.raises(UserError, match=r"transformer: in_channels must be 10, .*, got 4"):
        WanI2V(path=str(tmp_path)).load("cpu")


def test_no_file_of_embeddings_is_suggested_or_written(
    old: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = old.recipe.model_dump(mode="json", exclude_defaults=True) | {"name": "wan_i2v"}
    run = run_of(policy, {**PATHS["flow"], "frames": FRAMES}, ALGORITHMS["grpo"])
    monkeypatch.setattr(room, "WORTH_LEAVING_OUT", 1)
    assert room.encoder_rows(run, old.policy) == {}
    with monkeypatch.context() as other:
        other.setattr(type(old.policy.family), "reads_embeddings", True)
        assert "rlalign encode" in room.encoder_rows(run, old.policy)["text encoders"]
    file = tmp_path / "run.yaml"
    file.write_text(dump(run))
    assert main(["encode", str(file), str(tmp_path / "words.safetensors")]) == 2
    assert "policy wan_i2v reads no file of embeddings" in capsys.readouterr().err


def test_the_picture_is_heard_at_every_step(old: Case) -> None:
    """Another picture is another answer."""
    x, timestep_B, words = asked(old.policy, old)
    grey = Image.new("RGB", (8, 8), (10, 200, 30))
    file = Path(str(old.prompts[0].record["image"])).with_name("green.png")  # type: ignore[attr-defined]
    grey.save(file)
    told = old.policy.encode(carrying(str(file)), old.plan(old.sizes[1])).caption
    with torch.no_grad():
        said = old.policy.family.predict(x, timestep_B, words)
        other = old.policy.family.predict(x, timestep_B, told)
    assert ((said - other).abs().flatten(1).amax(1) > 1e-3).all()


@pytest.mark.promise
def test_it_trains_on_a_table_of_captions_and_pictures(
    old: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlalign.report.write_report", lambda *_, **__: None)
    rows = [
        {"prompt": f"a {n}", "image": str(draw_picture(tmp_path / f"{n}.png", n))} for n in range(4)
    ]
    table = tmp_path / "prompts.jsonl"
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    policy = old.recipe.model_dump(mode="json", exclude_defaults=True) | {"name": "wan_i2v"}
    run = run_of(policy, {**PATHS["flow"], "frames": FRAMES}, ALGORITHMS["grpo"])
    dealt = run.prompts.model_dump(include={"per_round", "samples_per_prompt", "per_unit"})
    prompts = FilePrompts(path=str(table), **dealt)
    evaluate = run.evaluate.model_copy(update={"every": 0})
    train_two_rounds(
        run.model_copy(update={"prompts": prompts, "evaluate": evaluate}), tmp_path / "run"
    )
