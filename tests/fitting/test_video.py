"""Pretraining of the video model: the loss against the pipeline's own parts, resuming bit for bit,
and a folder that plain diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from rlalign.core.registry import UserError
from rlalign.data import motion
from rlalign.diffusion.noise import generator, normal
from rlalign.fitting.denoiser import Pretrain, pretrain
from rlalign.fitting.denoiser.corpus import clips
from rlalign.fitting.denoiser.video import (
    LATENT_CHANNELS,
    clip_autoencoder,
    clip_autoencoder_loss,
    clip_tokenizer,
    clip_tokens,
    decode_unclamped,
    standardised_clips,
    video_components,
    video_loss,
)
from rlalign.rewards.motion import components, share

SMALL: dict[str, Any] = {
    "seed": 3,
    "task": "motion",
    "images": 6,
    "autoencoder": {"updates": 2, "still_updates": 1, "batch": 2, "channels": (4, 8)},
    "denoiser": {
        "family": "transformer",
        "updates": 3,
        "batch": 2,
        "width": 24,
        "layers": 1,
        "text_width": 16,
        "text_layers": 1,
        "warmup": 2,
    },
    "checkpoint_every": 1,
}


LATENT_NUMBERS = ("latents_mean", "latents_std")


class Stopped(Exception):
    """What stands for a power cut."""


def run(out: Path, *, stop: tuple[str, int] | None = None, **changes: object) -> Path:
    def progress(stage: str, done: int, total: int, loss: float) -> None:
        if (stage, done) == stop:
            raise Stopped

    return pretrain(Pretrain.model_validate({**SMALL, **changes, "out": out}), progress=progress)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {
        f"{file.parent.name}/{name}": value
        for file in files
        for name, value in load_file(file).items()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The policy folder of an uninterrupted run."""
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.promise
@pytest.mark.parametrize("stop", [("autoencoder", 1), ("denoiser", 1), ("denoiser", 2)])
def test_a_resumed_run_ends_in_the_same_weights_bit_for_bit(whole, tmp_path, stop):
    with pytest.raises(Stopped):
        run(tmp_path, stop=stop)
    one, other = weights(run(tmp_path)), weights(whole)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_plain_diffusers_loads_the_folder_and_draws(whole):
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    pipeline = WanPipeline.from_pretrained(whole)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.vae, AutoencoderKLWan)
    assert isinstance(pipeline.transformer, WanTransformer3DModel)
    assert isinstance(pipeline.text_encoder, UMT5EncoderModel)
    found = pipeline(
        ["a red circle moves right, fast", "a blue square moves up, then left"],
        height=32,
        width=32,
        num_frames=motion.FRAMES,
        num_inference_steps=2,
        guidance_scale=2.0,
        max_sequence_length=16,
        output_type="np",
    ).frames
    assert found.shape == (2, motion.FRAMES, 32, 32, 3) and np.isfinite(found).all()
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.float32}


def test_another_runs_autoencoder_is_taken_as_it_is(whole, tmp_path):
    other = run(tmp_path, autoencoder={"source": str(whole)})
    taken = {name: w for name, w in weights(other).items() if name.startswith("vae/")}
    mine = weights(whole)
    assert taken and all(torch.equal(w, mine[name]) for name, w in taken.items())
    one, same = (json.loads((f / "vae" / "config.json").read_text()) for f in (whole, other))
    assert [one[k] for k in LATENT_NUMBERS] == [same[k] for k in LATENT_NUMBERS]
    with pytest.raises(UserError, match="autoencoder.source must be tiny or a pipeline folder"):
        run(tmp_path / "none", autoencoder={"source": str(tmp_path)})


def test_the_loss_is_what_the_pipelines_own_parts_give(whole):
    """Update 3, half the captions dropped: noise - clean against the plain transformer on
    encode_prompt's rows, 512 or 16 (1e-5)."""
    from diffusers import WanPipeline

    denoiser = {**SMALL["denoiser"], "batch": 8, "caption_dropout": 0.5, "levels": "uniform"}
    config = Pretrain.model_validate({**SMALL, "denoiser": denoiser})
    parts, tokenizer = video_components(config), clip_tokenizer()
    captions = list(motion.captions("train", ["turn"])[:6])
    latents = torch.randn(6, LATENT_CHANNELS, 5, 8, 8)
    words = clip_tokens(tokenizer, captions), clip_tokens(tokenizer, [""])
    standard = parts.transformer.blocks[0].attn2.processor
    found = video_loss(parts.module().eval(), latents, *words, config)(3)
    parts.transformer.blocks[0].attn2.set_processor(standard)

    rng = generator("pretrain", config.seed, "denoiser", 3, "rows")
    rows_B, level_B = rng.integers(6, size=8), torch.from_numpy(rng.random(8))
    told = ["" if u < 0.5 else captions[row] for row, u in zip(rows_B, rng.random(8), strict=True)]
    many_B = rng.random(8) < 0.5
    assert 0 < told.count("") < 8 and 0 < many_B.sum() < 8
    pipeline = WanPipeline.from_pretrained(
        whole, text_encoder=parts.text_encoder, transformer=parts.transformer
    )
    clean, s = latents[rows_B], level_B.float()[:, None, None, None, None]
    noise = normal(("pretrain", config.seed, "denoiser", 3, "noise"), clean.shape)
    errors = []
    for n in range(8):
        with torch.no_grad():
            embeds, _ = pipeline.encode_prompt(
                told[n],
                do_classifier_free_guidance=False,
                max_sequence_length=512 if many_B[n] else 16,
            )
            x = ((1 - s) * clean + s * noise)[n : n + 1]
            timestep = 1000.0 * level_B[n : n + 1].float()
            velocity = parts.transformer(x, timestep, embeds, return_dict=False)[0]
        errors.append((velocity[0] - (noise - clean)[n]).square().mean())
    torch.testing.assert_close(found, torch.stack(errors).mean(), rtol=1e-5, atol=1e-5)


def test_an_autoencoder_sees_single_frames_first(monkeypatch):
    """Of two updates the first takes six frames in place of each of two clips, the second whole
    clips; every frame is one of the corpus."""
    config = Pretrain.model_validate(SMALL)
    vae = clip_autoencoder(config)
    clips_NCFHW, _ = clips(config)
    seen = []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda x: (seen.append(x), encode(x))[1])
    loss = clip_autoencoder_loss(vae, clips_NCFHW, config)
    assert loss(0).isfinite() and loss(1).isfinite()
    stills, whole = ((127.5 * (x + 1.0)).round().to(torch.uint8) for x in seen)
    assert stills.shape == (12, 3, 1, 32, 32) and whole.shape == (2, 3, 9, 32, 32)
    frames = clips_NCFHW.transpose(1, 2).flatten(0, 1)
    assert all((frames == still[:, 0]).flatten(1).all(dim=1).any() for still in stills)
    assert len({still.numpy().tobytes() for still in stills}) > 6
    assert all((clips_NCFHW == clip).flatten(1).all(dim=1).any() for clip in whole)


def test_latents_are_standardised_by_numbers_in_the_autoencoders_config():
    config = Pretrain.model_validate(SMALL)
    vae = clip_autoencoder(config).eval()
    clips_NCFHW, _ = clips(config)
    latents = standardised_clips(vae, clips_NCFHW, measure=True)
    assert latents.shape == (6, LATENT_CHANNELS, 5, 8, 8)
    zero, one = torch.zeros(LATENT_CHANNELS), torch.ones(LATENT_CHANNELS)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3, 4)), zero, rtol=0.0, atol=1e-4)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3, 4)), one, rtol=0.0, atol=1e-3)
    # what is left unclamped is otherwise what the autoencoder gives
    with torch.no_grad():
        plain = vae.decode(30.0 * latents[:2]).sample
        free = decode_unclamped(vae, 30.0 * latents[:2])
    assert torch.equal(free.clamp(-1.0, 1.0), plain)


def test_every_caption_is_words_of_the_tokenizer_and_fits():
    tokenizer = clip_tokenizer()
    captions = [text for split in motion.SPLITS for text in motion.captions(split)]
    tokens_NL = clip_tokens(tokenizer, captions)
    assert len({tuple(row) for row in tokens_NL.tolist()}) == len(captions)
    assert int((tokens_NL != tokenizer.pad_token_id).sum(dim=1).max()) == 14
    assert not (tokens_NL == tokenizer.unk_token_id).any()
    assert tokenizer.tokenize("a red dog, fast") == [
        *("\u2581a", "\u2581red", "\u2581", "d", "o", "g", ",", "\u2581fast"),
    ]


def test_the_asked_share_of_clips_moves_otherwise_than_its_caption_says():
    """40 clips at a half: the verifier finds a wrong motion in 8 to 32 of them (four standard
    errors), and right objects in all."""
    config = Pretrain.model_validate({**SMALL, "images": 40, "wrong_motion": 0.5})
    clips_NCFHW, captions = clips(config)
    found = [
        components(motion.parse_caption(caption), clip_CFHW.permute(1, 2, 3, 0).numpy())
        for caption, clip_CFHW in zip(captions, clips_NCFHW, strict=True)
    ]
    assert 8 < sum(share(one) < 0.95 for one in found) < 32
    assert min(one["object"] for one in found) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"misspelt": 0.1}, "misspelt has no meaning where the task is motion"),
        ({"task": "words", "wrong_motion": 0.1}, "wrong_motion has no meaning .* task is words"),
        ({"denoiser": {"family": "unet"}}, "denoiser.family must be transformer where the task is"),
        ({"denoiser": {"family": "transformer", "width": 32}}, "must be a multiple of 24"),
    ],
)
def test_settings_of_another_task_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        Pretrain.model_validate({**SMALL, **changes})
