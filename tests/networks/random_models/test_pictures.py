"""Every small model is a folder that plain diffusers opens and draws from; rlalign reads those of
its families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import rlalign
from rlalign.networks.pipelines.loading import quiet_libraries
from rlalign.networks.random_models import FAMILIES, count_family, count_folder, write_pipeline

PROMPTS = ("a red circle", "Two blue squares, 7 of them!")
# settings of a call that would resize pictures, or want packages to clean captions with
CALL: dict[str, dict[str, Any]] = {
    "ltx": {"num_frames": 9},
    "ltx_091": {"num_frames": 9},
    "cogvideox": {"num_frames": 9, "max_sequence_length": 24},
    "cogvideox_2b": {"num_frames": 9, "max_sequence_length": 24},
    "cogvideox_15": {"num_frames": 9, "max_sequence_length": 24},
    # the template is longer than a call reads of the small tokenizer's letters
    "hunyuan_video": {"num_frames": 5, "max_sequence_length": 352},
    "sana": {"use_resolution_binning": False},
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
    "wan": {"num_frames": 5},
    "wan22": {"num_frames": 5},
    "wan22_5b": {"num_frames": 5},
    "wan_i2v": {"num_frames": 5, "image": Image.new("RGB", (20, 24), (200, 60, 20))},
    "wan22_i2v": {"num_frames": 5, "image": Image.new("RGB", (20, 24), (200, 60, 20))},
}


def draw(pipeline: Any, name: str, prompt: str) -> torch.Tensor:
    """(F, 3, H, W) in [0, 1], or (3, H, W): what two steps make of seed 0."""
    pixels = FAMILIES[name].pixels
    found = pipeline(
        prompt=prompt,
        height=pixels,
        width=pixels,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **CALL.get(name, {}),
    )
    return torch.as_tensor(found.frames if FAMILIES[name].frames > 1 else found.images)[0]


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, Path, Any]:
    """(family, its folder, the pipeline that plain diffusers makes of it)."""
    from diffusers import DiffusionPipeline

    folder = tmp_path_factory.mktemp("random") / request.param
    write_pipeline(folder, FAMILIES[request.param], seed=1)
    with quiet_libraries():
        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return request.param, folder, pipeline


@pytest.mark.promise
def test_plain_diffusers_draws_what_is_asked_for(opened: tuple[str, Path, Any]) -> None:
    """A picture that is neither grey nor broken, and another one for another prompt."""
    name, _, pipeline = opened
    family = FAMILIES[name]
    assert type(pipeline).__name__ == family.pipeline
    first, second = (draw(pipeline, name, prompt) for prompt in PROMPTS)
    clip = (family.frames,) if family.frames > 1 else ()
    assert first.shape == (*clip, 3, family.pixels, family.pixels)
    assert first.isfinite().all()
    assert first.std() > 0.01
    assert (first - second).abs().max() > 1e-5


@pytest.mark.promise
def test_every_weight_comes_from_the_folder(opened: tuple[str, Path, Any]) -> None:
    """The networks of the pipeline have the weights of the files, name by name, in float32; and as
    many as are counted without reading any."""
    from safetensors.torch import load_file

    name, folder, pipeline = opened
    counts = count_family(FAMILIES[name], "tiny")
    assert count_folder(folder) == counts
    for part, count in counts.items():
        network = getattr(pipeline, part)
        (file,) = (folder / part).glob("*.safetensors")
        stored = load_file(file)
        weights = dict(network.named_parameters(remove_duplicate=False))
        assert sum(t.numel() for n, t in stored.items() if n in weights) == count
        for key, tensor in network.state_dict().items():
            assert key in stored or any(weights[key] is weights[n] for n in stored if n in weights)
            if key in stored:
                assert torch.equal(tensor, stored[key]), f"{part}.{key}"


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        ("stable_diffusion", "stable_diffusion"),
        ("stable_diffusion", "stable_diffusion_2"),
        ("sd3", "sd3"),
        ("sd3", "sd35"),
    ],
)
def test_rlalign_draws_diffusers_picture(policy: str, name: str, tmp_path: Path) -> None:
    """From the same noise, by a deterministic rule."""
    import diffusers

    folder = tmp_path / name
    write_pipeline(folder, FAMILIES[name], seed=2)
    with quiet_libraries():
        pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if policy == "stable_diffusion":
        ddim = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        pipeline.scheduler = ddim
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = pipeline(
        prompt=PROMPTS[0],
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=noise,
        output_type="latent",
    ).images
    ours = rlalign.load_policy(policy, path=str(folder)).sample(
        [PROMPTS[0]], steps=4, guidance=1.0, eta=0.0, latents=noise, output="latents"
    )
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
