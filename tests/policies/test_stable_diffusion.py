"""The Stable Diffusion policy against diffusers' own pipeline, on a pipeline of random weights
(seed 0)."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import UserError
from rlalign.diffusion.rollout import rollout
from rlalign.diffusion.steps import RULES, Move
from rlalign.policies.base import Policy
from rlalign.policies.stable_diffusion import StableDiffusion
from tests.toy import save_pipeline

PROMPTS = ("a red circle", "blue", "a green square")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline") / "small")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Policy, Any]]:
    """Settings of a pipeline -> the policy and plain diffusers, each loaded once."""

    @functools.cache
    def load(**settings: str) -> tuple[Policy, Any]:
        folder = save_pipeline(tmp_path_factory.mktemp("pipeline") / "of", **settings)
        return StableDiffusion(path=str(folder)).load("cpu"), diffusers_pipeline(folder)

    return load


@pytest.fixture
def policy(folder: Path) -> Policy:
    return StableDiffusion(path=str(folder)).load("cpu")


def unit_of(plan: Plan) -> Unit:
    return Unit(
        key=UnitKey("train", 1, 0),
        prompts=PROMPTS,
        prompt_ids=(0, 1, 2),
        sample_ids=(0, 0, 0),
        seed=0,
        plan=plan,
    )


def diffusers_pipeline(folder: Path) -> Any:
    """Plain diffusers, with the deterministic sampler of its own that eta = 0 has to equal."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance", [0.0, pytest.param(0.5, marks=pytest.mark.promise), 1.0, 3.0])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_rollout_equals_diffusers(
    both: Callable[..., tuple[Policy, Any]], guidance: float, scheduler: str, prediction: str
) -> None:
    """A call that is told prompts, steps, guidance and latents alone, ten DDIM steps: final latents
    and pictures within 1e-5 (uint8: one grey level)."""
    policy, pipeline = both(prediction=prediction, scheduler=scheduler)
    assert policy.prediction == prediction
    unit = unit_of(Plan(steps=10, eta=0.0, guidance=guidance))
    trajectory, media = rollout(policy, unit, 0)
    assert not trajectory.stochastic_K.any()
    settings = {"num_inference_steps": 10, "guidance_scale": guidance, "output_type": "np"}
    start, seen = torch.from_numpy(trajectory.latents_BK1[:, 0]), {}
    pictures = pipeline(
        list(PROMPTS),
        latents=start.clone(),
        callback_on_step_end=lambda _, k, t, state: seen.update(state) or state,
        **settings,
    ).images
    latents = seen["latents"]
    scale = latents.abs().max().item()
    assert np.abs(trajectory.latents_BK1[:, -1] - latents.numpy()).max() < 1e-5 * max(scale, 1.0)
    assert media.shape == (3, 1, 3, 16, 16)
    grey = pictures.transpose(0, 3, 1, 2) * 255.0
    assert np.abs(media[:, 0].astype(np.float64) - grey).max() < 0.5 + 1e-2


def test_a_negative_prompt_is_the_calls(folder: Path) -> None:
    """``negative_prompt`` against a pipeline call's: latents within 1e-5; caption
    dropout keeps to the empty caption."""
    policy = StableDiffusion(path=str(folder), negative_prompt="a blue dog").load("cpu")
    trajectory, _ = rollout(policy, unit_of(Plan(steps=5, eta=0.0, guidance=3.0)), 0)
    start = torch.from_numpy(trajectory.latents_BK1[:, 0].copy())
    told = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "latent"}
    pipeline = diffusers_pipeline(folder)
    negative, none = (
        pipeline(list(PROMPTS), latents=start.clone(), negative_prompt=text, **told).images
        for text in (["a blue dog"] * 3, None)
    )
    scale = max(float(negative.abs().max()), 1.0)
    final = torch.from_numpy(trajectory.latents_BK1[:, -1].copy())
    assert (final - negative).abs().max() < 1e-5 * scale
    assert (none - negative).abs().max() > 1e-3 * scale
    condition = policy.encode(PROMPTS)
    plain = StableDiffusion(path=str(folder)).load("cpu").encode(PROMPTS)
    assert torch.equal(condition.empty["embeds_BLD"], plain.empty["embeds_BLD"])


def with_scheduler(folder: Path, **settings: Any) -> Path:
    """The folder with other settings of its scheduler."""
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("to_one", [True, False])
def test_the_grid_is_that_of_the_folder(tmp_path: Path, spacing: str, to_one: bool) -> None:
    """Where the steps lie and where they end, of a call that is not told either: latents within
    1e-5, eight steps."""
    steps = 8
    folder = with_scheduler(
        save_pipeline(tmp_path / "p"), timestep_spacing=spacing, set_alpha_to_one=to_one
    )
    policy = StableDiffusion(path=str(folder)).load("cpu")
    trajectory, _ = rollout(policy, unit_of(Plan(steps=steps, eta=0.0, guidance=2.0)), 0)
    pipeline = diffusers_pipeline(folder)
    pipeline.scheduler.set_timesteps(steps)
    assert policy.path.levels(steps)[:-1].tolist() == pipeline.scheduler.timesteps.tolist()
    assert policy.path.levels(steps)[-1] == (-1 if to_one else 0)
    if (
        spacing != "linspace"
    ):  # there diffusers' DDIM steps to t - 125, wherever the next timestep is
        start = torch.from_numpy(trajectory.latents_BK1[:, 0])
        told = {"num_inference_steps": steps, "guidance_scale": 2.0, "output_type": "latent"}
        latents = pipeline(list(PROMPTS), latents=start, **told).images
        assert np.abs(trajectory.latents_BK1[:, -1] - latents.numpy()).max() < 1e-5 * max(
            float(latents.abs().max()), 1.0
        )


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_ddpm_rule_has_the_variance_of_the_folder(tmp_path: Path, variance_type: str) -> None:
    """Every step's std against diffusers' DDPMScheduler of the same folder (1e-6), its last one
    included."""
    from diffusers import DDPMScheduler

    file = save_pipeline(tmp_path / "p") / "scheduler" / "scheduler_config.json"
    DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        variance_type=variance_type,
    ).save_pretrained(file.parent)
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    (tmp_path / "p" / "model_index.json").write_text(
        json.dumps({**index, "scheduler": ["diffusers", "DDPMScheduler"]})
    )
    policy = StableDiffusion(path=str(tmp_path / "p")).load("cpu")
    theirs, levels = policy.family.pipeline.scheduler, policy.path.levels(5)
    assert isinstance(theirs, DDPMScheduler)
    theirs.set_timesteps(5)
    x = torch.zeros(1, 1)
    for k, t in enumerate(theirs.timesteps):
        std = RULES["ddpm"](Move(x, x, x, policy.path, levels[k], levels[k + 1], 1.0)).std
        torch.testing.assert_close(std, theirs._get_variance(t) ** 0.5, rtol=0, atol=1e-6)


def test_denoise_is_diffusers_guidance_and_formula(policy: Policy, folder: Path) -> None:
    """At three levels: (clean, noise) from diffusers' unet, its text encoder and DDIM's own clean
    sample (1e-5)."""
    pipeline = diffusers_pipeline(folder)
    embeds, negative = pipeline.encode_prompt(list(PROMPTS), "cpu", 1, True)
    x = torch.randn(3, 4, 8, 8)
    condition = policy.encode(PROMPTS)
    assert torch.allclose(condition.caption["embeds_BLD"], embeds, rtol=0, atol=1e-5)
    assert torch.allclose(condition.empty["embeds_BLD"], negative, rtol=0, atol=1e-5)
    for t in (981, 501, 1):
        with torch.no_grad():
            clean, noise = policy.denoise(x, torch.tensor(float(t)), condition, 3.0)
            both = pipeline.unet(
                torch.cat([x, x]), t, encoder_hidden_states=torch.cat([negative, embeds])
            ).sample
        uncond, cond = both.chunk(2)
        guided = uncond + 3.0 * (cond - uncond)
        pipeline.scheduler.set_timesteps(50)
        wanted = pipeline.scheduler.step(guided, t, x).pred_original_sample
        assert torch.allclose(noise, guided, rtol=0, atol=1e-5)
        assert torch.allclose(clean, wanted, rtol=1e-5, atol=1e-5)


def test_a_level_per_sample_equals_one_level_at_a_time(policy: Policy) -> None:
    """denoise takes (B,) levels: row by row the scalar's result, within 1e-5."""
    x, levels = torch.randn(3, 4, 8, 8), torch.tensor([901.0, 401.0, 1.0], dtype=torch.float64)
    condition = policy.encode(PROMPTS)
    with torch.no_grad():
        clean, noise = policy.denoise(x, levels, condition, 3.0)
        for row in range(3):
            clean_row, noise_row = policy.denoise(x, levels[row], condition, 3.0)
            assert torch.allclose(noise[row], noise_row[row], rtol=0, atol=1e-5)
            assert torch.allclose(clean[row], clean_row[row], rtol=1e-5, atol=1e-4)


def test_a_prompts_rows_do_not_depend_on_its_neighbours(folder: Path) -> None:
    """Bit for bit, in policies that have seen other prompts in other orders."""
    together = StableDiffusion(path=str(folder)).load("cpu").encode(PROMPTS)
    other = StableDiffusion(path=str(folder)).load("cpu")
    for row, prompt in reversed(list(enumerate(PROMPTS))):
        alone = other.encode([prompt])
        assert torch.equal(alone.caption["embeds_BLD"][0], together.caption["embeds_BLD"][row])
        assert torch.equal(alone.empty["embeds_BLD"][0], together.empty["embeds_BLD"][row])
    assert not torch.equal(together.caption["embeds_BLD"][0], together.caption["embeds_BLD"][1])


def test_remembered_prompts_are_bounded(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompt lists do not fill the memory, and forgetting changes no bit."""
    first = policy.encode(PROMPTS)
    kept = first.caption["embeds_BLD"][0].nbytes
    monkeypatch.setattr("rlalign.policies._words.REMEMBERED_BYTES", 2 * kept)
    policy.encode(["something else", "and more", "and yet more"])
    again = policy.encode(PROMPTS)
    assert torch.equal(first.caption["embeds_BLD"], again.caption["embeds_BLD"])
    assert len(policy.family.memory.rows) <= 2


def test_pictures_come_back_from_latents(policy: Policy) -> None:
    """decode is the VAE's decoder, encode_media the mean of its encoder, with the checkpoint's
    scaling factor."""
    latents, scale = torch.randn(2, 4, 8, 8), policy.family.vae.config.scaling_factor
    with torch.no_grad():
        media = policy.decode(latents)
        wanted = policy.family.vae.decode(latents / scale).sample
        assert media.shape == (2, 1, 3, 16, 16)
        assert media.min() >= 0
        assert media.max() <= 1
        assert torch.equal(media[:, 0], (wanted / 2 + 0.5).clamp(0, 1))
        mean = policy.family.vae.encode(media[:, 0] * 2 - 1).latent_dist.mean * scale
        assert torch.equal(policy.encode_media(media), mean)
        found = policy.family.vae.encode(media[:, 0] * 2 - 1).latent_dist
        assert torch.equal(policy.posterior(media)[0], mean)
        assert torch.equal(policy.posterior(media)[1], found.std * scale)


def test_latent_shape_follows_the_plan(policy: Policy) -> None:
    assert policy.latent_shape(Plan()) == (4, 8, 8)
    assert policy.latent_shape(Plan(height=32, width=24)) == (4, 16, 12)
    with pytest.raises(
        UserError, match="plan.height and plan.width must be multiples of 2, got 15 x 16"
    ):
        policy.latent_shape(Plan(height=15))


def test_only_the_denoiser_is_trained(policy: Policy) -> None:
    assert set(policy.trainable()) == {n for n, _ in policy.network.named_parameters()}
    frozen = [*policy.family.vae.parameters(), *policy.family.pipeline.text_encoder.parameters()]
    assert not any(p.requires_grad for p in frozen)
    modules = [policy.network, policy.family.vae, policy.family.pipeline.text_encoder]
    assert not any(m.training for m in modules)
    assert all(p.dtype == torch.float32 for p in policy.network.parameters())


def test_saved_folder_is_plain_diffusers(policy: Policy, tmp_path: Path) -> None:
    """All weights trained: a pipeline folder that diffusers loads with the same prediction, bit for
    bit, and no pickle."""
    from diffusers import DiffusionPipeline

    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    policy.save(tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".txt", ".jinja"}
    again = DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([901, 401, 1])
    words = policy.encode(PROMPTS).caption
    with torch.no_grad():
        assert torch.equal(
            again.unet(x, t, encoder_hidden_states=words["embeds_BLD"]).sample,
            policy.family.predict(x, t, words),
        )


def truncate(file: Path) -> None:
    blob = file.read_bytes()
    file.write_bytes(blob[: len(blob) // 2])


def grow_config(folder: Path) -> None:
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "block_out_channels": [8, 24]}))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no weights of the unet": lambda f: (
        f / "unet" / "diffusion_pytorch_model.safetensors"
    ).unlink(),
    "truncated unet": lambda f: truncate(f / "unet" / "diffusion_pytorch_model.safetensors"),
    "truncated vae": lambda f: truncate(f / "vae" / "diffusion_pytorch_model.safetensors"),
    "truncated text encoder": lambda f: truncate(f / "text_encoder" / "model.safetensors"),
    "unet of another size": grow_config,
    "broken unet config": lambda f: truncate(f / "unet" / "config.json"),
    "broken text config": lambda f: truncate(f / "text_encoder" / "config.json"),
    "broken scheduler": lambda f: truncate(f / "scheduler" / "scheduler_config.json"),
    "broken tokenizer": lambda f: truncate(f / "tokenizer" / "tokenizer.json"),
    "broken index": lambda f: truncate(f / "model_index.json"),
    "no index": lambda f: (f / "model_index.json").unlink(),
    "no vae": lambda f: shutil.rmtree(f / "vae"),
    "no text encoder": lambda f: shutil.rmtree(f / "text_encoder"),
    "no tokenizer": lambda f: shutil.rmtree(f / "tokenizer"),
    "no vocabulary": lambda f: (f / "tokenizer" / "tokenizer.json").unlink(),
    "no tokenizer config": lambda f: (f / "tokenizer" / "tokenizer_config.json").unlink(),
    "no scheduler": lambda f: shutil.rmtree(f / "scheduler"),
    "no unet": lambda f: shutil.rmtree(f / "unet"),
    "an index that is a list": lambda f: (f / "model_index.json").write_text("[]"),
    "another family": lambda f: (f / "model_index.json").write_text(
        '{"_class_name": "DDPMPipeline"}'
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_a_users_error(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(UserError, match=r"policy\.path.*copy"):
        StableDiffusion(path=str(copy)).load("cpu")


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "nowhere/model", "nowhere"])
def test_a_missing_checkpoint_is_a_users_error(path: str) -> None:
    with pytest.raises(UserError, match=r"policy\.path.*nowhere"):
        StableDiffusion(path=path).load("cpu")


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    """A folder with .bin weights alone is not opened."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"policy\.path"):
        StableDiffusion(path=str(copy)).load("cpu")
