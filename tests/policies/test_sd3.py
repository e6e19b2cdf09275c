"""The Stable Diffusion 3 policy against diffusers' own pipeline, on a pipeline of random weights (seed 0)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.diffusion.rollout import replay_log_prob, rollout
from rlalign.policies.sd3 import StableDiffusion3, StableDiffusion3Policy
from rlalign.records import Plan, Unit, UnitKey
from rlalign.registry import UserError

PROMPTS = ("a red circle", "blue", "a green square")
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


def save_pipeline(folder: Path, *, shift: float = 3.0, **scheduler: Any) -> Path:
    """A pipeline of some 50 000 random weights without T5: 16 x 16 pixels from 8 x 8 latents, with a shift of the latents."""
    import diffusers
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16)
    text = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        projection_dim=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
            scaling_factor=1.5,
            shift_factor=0.1,
        )
        encoders = [transformers.CLIPTextModelWithProjection(text) for _ in range(2)]
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **scheduler),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        **NO_T5,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline") / "small")


@pytest.fixture
def policy(folder: Path) -> StableDiffusion3Policy:
    return StableDiffusion3(path=str(folder), t5_tokens=4).load("cpu")


def unit_of(plan: Plan) -> Unit:
    return Unit(
        key=UnitKey("train", 1, 0), prompts=PROMPTS, prompt_ids=(0, 1, 2), sample_ids=(0, 0, 0), seed=0, plan=plan
    )


def diffusers_pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **NO_T5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_rollout_equals_diffusers(policy: StableDiffusion3Policy, folder: Path, guidance: float) -> None:
    """The ODE rule, eight steps from the same latents: final latents within 1e-5, pictures within one grey level."""
    trajectory, media = rollout(policy, unit_of(Plan(steps=8, rule="flow_ode", eta=0.0, guidance=guidance)), 0)
    pipeline = diffusers_pipeline(folder)
    settings = {"num_inference_steps": 8, "guidance_scale": guidance, "max_sequence_length": 4}
    start = torch.from_numpy(trajectory.latents_BK1[:, 0])
    latents = pipeline(list(PROMPTS), latents=start.clone(), output_type="latent", **settings).images
    scale = latents.abs().max().item()
    assert np.abs(trajectory.latents_BK1[:, -1] - latents.numpy()).max() < 1e-5 * max(scale, 1.0)
    pictures = pipeline(list(PROMPTS), latents=start.clone(), output_type="np", **settings).images
    assert np.abs(media[:, 0].astype(np.float64) - pictures.transpose(0, 3, 1, 2) * 255.0).max() < 0.5 + 1e-2


def test_captions_are_read_as_the_pipeline_reads_them(policy: StableDiffusion3Policy, folder: Path) -> None:
    embeds, empty, pooled, empty_pooled = diffusers_pipeline(folder).encode_prompt(
        list(PROMPTS), None, None, max_sequence_length=4
    )
    condition = policy.encode(PROMPTS)
    for mine, theirs in (
        (condition.embeds_BLD, embeds),
        (condition.uncond_BLD, empty),
        (condition.pooled_BD, pooled),
        (condition.uncond_pooled_BD, empty_pooled),
    ):
        assert mine is not None
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-5)
    alone = policy.encode(PROMPTS[1:2])
    assert torch.equal(alone.embeds_BLD[0], condition.embeds_BLD[1])


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("window", [0, 2])
def test_a_stored_sde_step_replays_to_the_same_bits(folder: Path, lora_rank: int, window: int) -> None:
    """Flow-GRPO's SDE: every stochastic step's log-prob is finite and equal to the stored one."""
    policy = StableDiffusion3(path=str(folder), lora_rank=lora_rank).load("cpu")
    unit = unit_of(Plan(steps=6, rule="flow_sde", eta=0.7, guidance=2.0, window=window))
    trajectory, _ = rollout(policy, unit, 0)
    steps = np.flatnonzero(trajectory.stochastic_K).tolist()
    assert len(steps) == (window or 6)
    latents = torch.from_numpy(trajectory.latents_BK1)
    for k in steps:
        with torch.no_grad():
            log_prob, _ = replay_log_prob(policy, unit, latents, [k], policy.encode(PROMPTS))
        assert torch.isfinite(log_prob).all()
        assert np.array_equal(log_prob[:, 0].numpy(), trajectory.log_prob_BK[:, k])


def test_pictures_come_back_from_latents(policy: StableDiffusion3Policy) -> None:
    """With the checkpoint's scaling factor and shift: encode_media is the inverse affine map of decode's."""
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        wanted = policy.vae.decode(latents / 1.5 + 0.1).sample
        media = policy.decode(latents)
        assert torch.equal(media[:, 0], (wanted / 2 + 0.5).clamp(0, 1))
        mean = policy.vae.encode(media[:, 0] * 2 - 1).latent_dist.mean
        assert torch.allclose(policy.encode_media(media), (mean - 0.1) * 1.5)


def test_latent_shape_follows_the_plan(policy: StableDiffusion3Policy) -> None:
    assert policy.latent_shape(Plan()) == (4, 8, 8)
    with pytest.raises(UserError, match="plan.height and plan.width must be multiples of 4, got 18 x 16"):
        policy.latent_shape(Plan(height=18))


def test_a_lora_file_loads_in_plain_diffusers(folder: Path, tmp_path: Path) -> None:
    """The adapter alone is saved; diffusers' transformer with it predicts what the policy predicts (1e-5)."""
    policy = StableDiffusion3(path=str(folder), lora_rank=2, t5_tokens=4).load("cpu")
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy.save(tmp_path / "lora")
    assert [p.name for p in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipeline = diffusers_pipeline(folder)
    pipeline.load_lora_weights(tmp_path / "lora")
    condition, x = policy.encode(PROMPTS), torch.randn(3, 4, 8, 8)
    timestep_B = torch.full((3,), 500.0)
    merged = policy.merged()
    with torch.no_grad():
        mine = policy.predict(x, timestep_B, condition.embeds_BLD, condition.pooled_BD)
        theirs = pipeline.transformer(x, condition.embeds_BLD, condition.pooled_BD, timestep_B).sample
        plain = merged.predict(x, timestep_B, condition.embeds_BLD, condition.pooled_BD)
        with policy.as_reference():
            base = policy.predict(x, timestep_B, condition.embeds_BLD, condition.pooled_BD)
    assert torch.allclose(mine, theirs, atol=1e-5)
    assert torch.allclose(mine, plain, atol=1e-5)
    assert (mine - base).abs().max() > 1e-3
    merged.save(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    assert StableDiffusion3(path=str(tmp_path / "whole")).load("cpu").latent_shape(Plan()) == (4, 8, 8)


def test_a_scheduler_that_shifts_by_resolution_is_refused(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "dynamic", use_dynamic_shifting=True)
    with pytest.raises(UserError, match="use_dynamic_shifting"):
        StableDiffusion3(path=str(folder)).load("cpu")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without model_index.json"):
        StableDiffusion3(path=str(tmp_path / "nowhere")).load("cpu")
