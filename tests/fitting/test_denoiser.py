"""Pretraining: the loss against closed forms, resuming bit for bit, and a folder that plain
diffusers loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file

from rlalign.core.registry import UserError
from rlalign.data.shapes import CAPTION_WORDS
from rlalign.diffusion.noise import generator, normal
from rlalign.diffusion.paths import RectifiedFlow, VariancePreserving
from rlalign.fitting.denoiser import Pretrain, console_progress, denoising_loss, pretrain
from rlalign.fitting.denoiser.corpus import pictures
from rlalign.fitting.denoiser.flow import flow_components, flow_loss, levels
from rlalign.fitting.denoiser.pipeline import caption_tokenizer, components, tokenise
from rlalign.fitting.denoiser.stages import standardise

ROOT = Path(__file__).parents[2]
SMALL = {
    "seed": 3,
    "images": 24,
    "autoencoder": {"updates": 4, "batch": 4, "channels": (8, 8)},
    "denoiser": {
        "updates": 5,
        "batch": 4,
        "channels": (16, 16, 16),
        "text_width": 16,
        "text_layers": 1,
        "warmup": 2,
    },
    "checkpoint_every": 3,
}

FLOW = {
    "autoencoder": {"source": "tiny"},
    "denoiser": {
        "family": "transformer",
        "updates": 5,
        "batch": 4,
        "width": 16,
        "layers": 2,
        "text_width": 16,
        "warmup": 2,
    },
}


class Stopped(Exception):
    """What stands for a power cut."""


def quiet(stage: str, done: int, total: int, loss: float) -> None:
    """No progress."""


def run(
    out: Path, *, stop: tuple[str, int] | None = None, resume: bool = True, **changes: object
) -> Path:
    def progress(stage: str, done: int, total: int, loss: float) -> None:
        if (stage, done) == stop:
            raise Stopped

    return pretrain(
        Pretrain.model_validate({**SMALL, **changes, "out": out}), resume=resume, progress=progress
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {
        f"{file.parent.name}/{name}": value
        for file in files
        for name, value in load_file(file).items()
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The policy folder of an uninterrupted run."""
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.promise
@pytest.mark.parametrize(
    "stop",
    [("autoencoder", 2), ("autoencoder", 4), ("denoiser", 2), ("denoiser", 4), ("denoiser", 5)],
)
def test_a_resumed_run_ends_in_the_same_weights_bit_for_bit(whole, tmp_path, stop):
    with pytest.raises(Stopped):
        run(tmp_path, stop=stop)
    assert_same(weights(run(tmp_path)), weights(whole))


@pytest.mark.promise
def test_a_longer_run_passes_through_the_shorter_ones_weights(whole, tmp_path):
    denoiser = dict(SMALL["denoiser"])
    run(tmp_path, denoiser={**denoiser, "updates": 3})
    assert_same(weights(run(tmp_path)), weights(whole))


@pytest.fixture(scope="module")
def whole_flow(tmp_path_factory) -> Path:
    """The policy folder of an uninterrupted run of the transformer."""
    return run(tmp_path_factory.mktemp("flow"), **FLOW)


@pytest.mark.parametrize("stop", [4, *(pytest.param(n, marks=pytest.mark.promise) for n in (2, 5))])
def test_a_resumed_transformer_ends_in_the_same_weights_bit_for_bit(whole_flow, tmp_path, stop):
    with pytest.raises(Stopped):
        run(tmp_path, stop=("denoiser", stop), **FLOW)
    assert_same(weights(run(tmp_path, **FLOW)), weights(whole_flow))


def test_a_taken_autoencoder_stays_what_it_was(whole_flow):
    shipped = load_file(ASSET / "vae" / "diffusion_pytorch_model.safetensors")
    assert_same(load_file(whole_flow / "vae" / "diffusion_pytorch_model.safetensors"), shipped)


def test_plain_diffusers_loads_the_flow_folder_and_draws(whole_flow):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(
        whole_flow, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "max_sequence_length": 0, "output_type": "np"}
    assert pipeline(["a red circle", "two blue squares"], **settings).images.shape == (2, 32, 32, 3)
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.float32}
    changed = [load_file(f) for f in sorted(whole_flow.glob("text_encoder*/model.safetensors"))]
    assert len(changed) == 2 and any(
        not torch.equal(changed[0][n], changed[1][n]) for n in changed[0]
    )


def test_the_flow_loss_is_what_the_pipelines_own_parts_give():
    """Update 3, half the captions dropped: noise - clean against the transformer on encode_prompt's
    tensors (1e-5).

    Each sample by diffusers' own attention, with 256 rows of zeros or with none.
    """
    from diffusers import StableDiffusion3Pipeline

    config = Pretrain.model_validate(
        {
            **SMALL,
            **FLOW,
            "denoiser": {
                **FLOW["denoiser"],
                "batch": 8,
                "caption_dropout": 0.5,
                "levels": "uniform",
            },
        }
    )
    parts, tokenizer = flow_components(config), caption_tokenizer()
    _, captions = pictures(config)
    latents_NCHW = torch.randn(len(captions), 4, 16, 16)
    words = tokenise(tokenizer, captions), tokenise(tokenizer, [""])
    network, standard = parts.module().eval(), parts.transformer.attn_processors
    found = flow_loss(network, latents_NCHW, *words, config)(3)
    parts.transformer.set_attn_processor(standard)

    rng = generator("pretrain", config.seed, "denoiser", 3, "rows")
    rows_B, level_B = rng.integers(len(captions), size=8), torch.from_numpy(rng.random(8))
    told = ["" if u < 0.5 else captions[row] for row, u in zip(rows_B, rng.random(8), strict=True)]
    has_rows_B = rng.random(8) < 0.5
    assert 0 < told.count("") < 8 and 0 < has_rows_B.sum() < 8
    pipeline = StableDiffusion3Pipeline(
        **vars(parts),
        vae=components(config).vae,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    clean, s = latents_NCHW[rows_B], level_B.float()[:, None, None, None]
    noise = normal(("pretrain", config.seed, "denoiser", 3, "noise"), clean.shape)
    errors = []
    for n in range(8):
        length = 256 if has_rows_B[n] else 0
        with torch.no_grad():
            embeds, _, pooled, _ = pipeline.encode_prompt(
                told[n], None, None, max_sequence_length=length
            )
            x = ((1 - s) * clean + s * noise)[n : n + 1]
            velocity = parts.transformer(
                x, embeds, pooled, 1000.0 * level_B[n : n + 1].float()
            ).sample
        errors.append((velocity[0] - (noise - clean)[n]).square().mean())
    torch.testing.assert_close(found, torch.stack(errors).mean(), rtol=1e-5, atol=1e-5)


def test_levels_are_uniform_or_logit_normal():
    """4000 draws, seed 0: mean and standard deviation within 5 standard errors of the named
    distribution's."""
    rng = np.random.default_rng(0)
    uniform = levels("uniform", 4000, rng)
    assert uniform.min() > 0.0 and uniform.max() < 1.0
    assert abs(uniform.mean() - 0.5) < 0.025 and abs(uniform.std() - 12**-0.5) < 0.015
    logits = torch.logit(levels("logit_normal", 4000, rng))
    assert abs(logits.mean()) < 0.08 and abs(logits.std() - 1.0) < 0.06


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"autoencoder": {"source": "nowhere"}},
            "autoencoder.source must name a file or folder that is there",
        ),
        (
            {"autoencoder": {"source": "tiny", "updates": 3}},
            "updates has no meaning where source takes a trained one",
        ),
        ({"denoiser": {"width": 32}}, "width is no setting of family unet"),
        (
            {"denoiser": {"family": "transformer", "channels": (16, 16, 16)}},
            "channels is no setting of family transf",
        ),
    ],
)
def test_settings_of_another_family_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **{**FLOW, **wrong})


def test_another_seed_gives_other_weights(whole, tmp_path):
    other, same = weights(run(tmp_path, seed=4)), weights(whole)
    assert any(not torch.equal(other[name], same[name]) for name in same)


@pytest.mark.promise
def test_other_settings_cannot_resume_but_can_start_anew(whole, tmp_path):
    run(tmp_path, seed=4)
    with pytest.raises(UserError, match=r"seed must stay 4 to resume from .*, got 3"):
        run(tmp_path)
    assert_same(weights(run(tmp_path, resume=False)), weights(whole))


def test_one_whole_checkpoint_is_left(whole):
    checkpoints = sorted(whole.parent.glob("checkpoints/*"))
    assert [folder.name for folder in checkpoints] == ["denoiser-00000005"]
    assert sorted(
        file.suffix for file in whole.parent.rglob("*") if file.is_file() and "check" in str(file)
    ) == [
        ".json",
        ".safetensors",
    ]


def test_plain_diffusers_loads_the_folder_and_draws(whole):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(whole)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        ["a red circle", "two blue squares"], num_inference_steps=2, eta=1.0, output_type="np"
    ).images
    assert pictures.shape == (2, 32, 32, 3)
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float32}
    assert (
        pipeline.scheduler.config.set_alpha_to_one is False
        and pipeline.scheduler.config.steps_offset == 1
    )
    assert pipeline.vae.config.scaling_factor == 1.0


def test_every_caption_word_is_one_token_and_other_words_fall_into_letters(whole):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(whole / "tokenizer")
    ids = [tokenizer(word).input_ids for word in CAPTION_WORDS]
    assert {len(i) for i in ids} == {3} and len({i[1] for i in ids}) == len(CAPTION_WORDS)
    both = tokenizer("two green crosses above a white triangle").input_ids[1:-1]
    assert both == [
        tokenizer(word).input_ids[1] for word in "two green crosses above a white triangle".split()
    ]
    zebra = tokenizer("zebra").input_ids[1:-1]
    assert 1 < len(zebra) <= 5 and tokenizer.unk_token_id not in zebra


def test_latents_are_standardised_per_channel_without_changing_pictures():
    """Folding (z - mean) / std into the convolutions leaves the reconstruction as it was, to
    rounding."""
    config = Pretrain.model_validate(SMALL)
    vae = components(config).vae.eval().requires_grad_(False)
    pictures_NCHW, _ = pictures(config)
    pixels = pictures_NCHW.float() / 127.5 - 1.0
    before = vae.encode(pixels).latent_dist
    pictures_before = vae.decode(before.mean).sample
    scale = before.mean.std(dim=(0, 2, 3), keepdim=True)
    latents_NCHW = standardise(vae, pictures_NCHW)
    assert latents_NCHW.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (latents_NCHW.std(dim=(0, 2, 3)) - 1.0).abs().max() < 1e-4
    after = vae.encode(pixels).latent_dist
    torch.testing.assert_close(vae.decode(after.mean).sample, pictures_before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.std, before.std / scale, atol=1e-4, rtol=1e-4)


def test_loss_of_perfect_and_of_silent_denoisers():
    """Epsilon: knowing the noise costs 0, predicting 0 costs its mean square. Flow: the same with
    noise - clean."""
    clean, noise = torch.randn(2, 4096, 4, generator=torch.Generator().manual_seed(0))
    paths = (
        (VariancePreserving.scaled_linear(), torch.tensor([0, 1, 500, 999] * 1024)),
        (RectifiedFlow(), torch.rand(4096)),
    )
    for (path, level), kind, aim in zip(
        paths, ("epsilon", "flow"), (noise, noise - clean), strict=True
    ):
        assert denoising_loss(lambda x, t, aim=aim: aim, clean, noise, level, path, kind) == 0.0
        silent = denoising_loss(lambda x, t: torch.zeros_like(x), clean, noise, level, path, kind)
        torch.testing.assert_close(silent, aim.square().mean())


def test_loss_shows_the_denoiser_the_noised_sample():
    path = VariancePreserving.scaled_linear()
    clean, noise, level = torch.full((2, 3), 2.0), torch.full((2, 3), -1.0), torch.tensor([0, 999])
    seen = {}

    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.update(x=x, timestep=timestep)
        return x

    denoising_loss(predict, clean, noise, level, path, "epsilon")
    expected = 2.0 * path.alphas_cumprod[level].sqrt() - (1.0 - path.alphas_cumprod[level]).sqrt()
    torch.testing.assert_close(seen["x"], expected.float()[:, None].expand(2, 3))
    assert seen["timestep"].tolist() == [0, 999]


def test_settings_refuse_what_is_unknown_or_out_of_range():
    for wrong in (
        {"image": 3},
        {"images": 0},
        {"denoiser": {"updates": 0}},
        {"autoencoder": {"lr": float("nan")}},
    ):
        with pytest.raises(ValidationError):
            Pretrain.model_validate(wrong)


def test_the_shipped_config_loads():
    settings = yaml.safe_load((ROOT / "configs" / "pretrain_tiny.yaml").read_text(encoding="utf-8"))
    assert Pretrain.model_validate(settings).out == Path("runs/pretrain_tiny")


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    with console_progress() as report:
        for done in range(1, 201):
            report("denoiser", done, 200, 0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 100 and lines[-1] == "denoiser 200/200 loss 0.5000"


ASSET = ROOT / "rlalign" / "assets" / "tiny"


def test_the_shipped_model_is_small_and_standardised():
    """Latents of drawn pictures have mean 0 and standard deviation 1 per channel: 200 pictures,
    margins of 0.1."""
    from diffusers import AutoencoderKL

    files = [file for file in ASSET.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    assert sum(file.stat().st_size for file in files) < 9.5e6
    vae = AutoencoderKL.from_pretrained(ASSET / "vae")
    pictures_NCHW, _ = pictures(Pretrain(images=200, faded=0.35))
    with torch.no_grad():
        latents_NCHW = vae.encode(pictures_NCHW.float() / 127.5 - 1.0).latent_dist.mean
    assert latents_NCHW.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (latents_NCHW.std(dim=(0, 2, 3)) - 1.0).abs().max() < 0.1


@pytest.mark.slow
def test_the_shipped_model_draws_shapes_and_leaves_something_to_learn():
    """Shapes reward of 128 held-out captions, 10 DDIM steps, eta 1, no guidance: about 0.4 with a
    standard error of 0.03."""
    import numpy as np
    from diffusers import DiffusionPipeline

    from rlalign.data.shapes import random_scene
    from rlalign.rewards.shapes import Shapes

    rng = np.random.default_rng(1)
    captions = [random_scene(rng, "held_out").caption for _ in range(128)]
    pipeline = DiffusionPipeline.from_pretrained(ASSET)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 10, "eta": 1.0, "guidance_scale": 1.0, "output_type": "pt"}
    media_BCHW = pipeline(captions, generator=torch.Generator().manual_seed(1), **settings).images
    score = float(Shapes().load("cpu")(media_BCHW[:, None], captions).mean())
    assert 0.3 < score < 0.5
