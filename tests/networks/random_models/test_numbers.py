"""Published sizes by their parameters, without memory for any; seeds, shards, disks and names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rlalign.core.registry import UserError
from rlalign.networks.random_models import (
    FAMILIES,
    count_family,
    count_folder,
    disk_bytes,
    empty_networks,
    find_family,
    refuse_small_disk,
    write_pipeline,
)
from rlalign.networks.random_models.empty import build_empty
from rlalign.networks.random_models.weights import list_slots, write_weights

CLIP_L, CLIP_G, T5 = 0.123, 0.695, 4.762
# billions of parameters as the checkpoints have them, by the model cards and the counts of their
# files; the autoencoder of Stable Diffusion has 83.65 M with four channels, 83.82 M with sixteen
PUBLISHED = {
    "stable_diffusion": {"unet": 0.860, "vae": 0.084, "text_encoder": CLIP_L},
    "stable_diffusion_2": {"unet": 0.866, "vae": 0.084, "text_encoder": 0.340},
    "sdxl": {"unet": 2.567, "vae": 0.084, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    "sd3": {
        "transformer": 2.028,
        "vae": 0.084,
        "text_encoder": 0.124,
        "text_encoder_2": CLIP_G,
        "text_encoder_3": T5,
    },
    "sd35": {
        "transformer": 2.243,
        "vae": 0.084,
        "text_encoder": 0.124,
        "text_encoder_2": CLIP_G,
        "text_encoder_3": T5,
    },
    "sd35_large": {
        "transformer": 8.057,
        "vae": 0.084,
        "text_encoder": 0.124,
        "text_encoder_2": CLIP_G,
        "text_encoder_3": T5,
    },
    "flux": {"transformer": 11.901, "vae": 0.084, "text_encoder": CLIP_L, "text_encoder_2": T5},
    "flux_schnell": {
        "transformer": 11.891,
        "vae": 0.084,
        "text_encoder": CLIP_L,
        "text_encoder_2": T5,
    },
    "flux2": {"transformer": 32.223, "vae": 0.084, "text_encoder": 24.011},
    "flux2_klein": {"transformer": 3.876, "vae": 0.084, "text_encoder": 4.022},
    "flux2_klein_distilled": {"transformer": 3.876, "vae": 0.084, "text_encoder": 4.022},
    "qwen_image": {"transformer": 20.430, "vae": 0.127, "text_encoder": 8.292},
    "z_image": {"transformer": 6.155, "vae": 0.084, "text_encoder": 4.022},
    "ltx": {"transformer": 1.923, "vae": 0.419, "text_encoder": T5},
    "ltx_091": {"transformer": 1.923, "vae": 0.935, "text_encoder": T5},
    "cogvideox": {"transformer": 5.570, "vae": 0.216, "text_encoder": T5},
    "cogvideox_2b": {"transformer": 1.694, "vae": 0.216, "text_encoder": T5},
    "cogvideox_15": {"transformer": 5.571, "vae": 0.216, "text_encoder": T5},
    "hunyuan_video": {
        "transformer": 12.821,
        "vae": 0.246,
        "text_encoder": 7.505,
        "text_encoder_2": CLIP_L,
    },
    "sana": {"transformer": 1.604, "vae": 0.312, "text_encoder": 2.614},
    "pixart": {"transformer": 0.611, "vae": 0.084, "text_encoder": T5},
    "wan": {"transformer": 1.419, "vae": 0.127, "text_encoder": 5.681},
    "wan22": {"transformer": 14.288, "transformer_2": 14.288, "vae": 0.127, "text_encoder": 5.681},
    "wan_i2v": {
        "transformer": 16.395,
        "vae": 0.127,
        "text_encoder": 5.681,
        "image_encoder": 0.631,
    },
    "wan22_i2v": {
        "transformer": 14.289,
        "transformer_2": 14.289,
        "vae": 0.127,
        "text_encoder": 5.681,
    },
    "wan22_5b": {"transformer": 5.000, "vae": 0.705, "text_encoder": 5.681},
}

EXACTLY = {"stable_diffusion": 859_520_964, "sdxl": 2_567_463_684}
"""Parameters of denoisers whose number is known to the last."""


@pytest.mark.promise
@pytest.mark.parametrize("name", FAMILIES)
def test_a_published_size_has_the_published_parameters(name: str) -> None:
    counts = count_family(FAMILIES[name], "published")
    assert {part: round(count / 1e9, 3) for part, count in counts.items()} == PUBLISHED[name]
    assert EXACTLY.get(name, counts.get("unet")) == counts.get("unet")


def test_a_published_folder_without_weights_is_counted_by_its_configs(tmp_path: Path) -> None:
    family = FAMILIES["flux2_klein"]
    write_pipeline(tmp_path, family, "published", with_weights=False)
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert count_folder(tmp_path) == count_family(family, "published")
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    assert (config["dtype"], config["vocab_size"]) == ("bfloat16", 151936)


def test_an_autoencoders_statistics_are_neither_0_nor_1(tmp_path: Path) -> None:
    write_pipeline(tmp_path, FAMILIES["ltx"])
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    stored = load_file(file)
    assert stored["latents_mean"].abs().min() > 0
    assert (stored["latents_std"] - 1).abs().min() > 0


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    """In every file; another seed changes the weights and nothing else."""
    family = FAMILIES["sdxl"]
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_pipeline(tmp_path / folder, family, seed=seed)
    first, again, other = (files_of(tmp_path / folder) for folder in "abc")
    assert first == again
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {name for name in first if name.endswith(".safetensors")}
    assert len(changed) == 4


def test_two_parts_of_one_kind_differ(tmp_path: Path) -> None:
    write_pipeline(tmp_path, FAMILIES["sd3"])
    one, two = (
        load_file(tmp_path / part / "model.safetensors")["text_projection.weight"]
        for part in ("text_encoder", "text_encoder_2")
    )
    assert one.shape == two.shape
    assert not torch.equal(one, two)


def test_numbers_are_those_that_torch_begins_with(tmp_path: Path) -> None:
    """A matrix is uniform up to one over the root of its inputs, so is the bias beside it; a norm
    is the identity."""
    write_pipeline(tmp_path, FAMILIES["z_image"])
    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    stored = load_file(file)
    wide = stored["t_embedder.mlp.0.weight"]
    assert wide.shape == (1024, 256)
    assert 0.999 / 16 < wide.abs().max() <= 1 / 16
    assert wide.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.01)
    assert 0.99 / 16 < stored["t_embedder.mlp.0.bias"].abs().max() <= 1 / 16
    norms = [name for name in stored if "norm" in name and name.endswith("weight")]
    assert norms
    assert all((stored[name] == 1).all() for name in norms)


def test_shards_hold_the_same_weights(tmp_path: Path) -> None:
    """Bfloat16, in files of 10 kB or one tensor: what both libraries read as one network."""
    import diffusers
    import transformers

    family = FAMILIES["flux"]
    for part, kind in (
        ("transformer", diffusers.FluxTransformer2DModel),
        ("text_encoder_2", transformers.T5EncoderModel),
    ):
        write_pipeline(tmp_path / part, family)
        spec = family.networks[part]
        folder = tmp_path / part / part
        (whole,) = folder.glob("*.safetensors")
        wanted = {name: t.bfloat16() for name, t in load_file(whole).items()}
        stem = whole.stem
        whole.unlink()

        written: list[int] = []
        slots = list_slots(build_empty(spec, "tiny", buffers=True), torch.bfloat16)
        write_weights(
            folder, slots, stem=stem, key=(0, part), shard_bytes=10_000, tell=written.append
        )
        files = sorted(folder.glob("*.safetensors"))
        assert len(files) == len(written) > 1
        index = json.loads((folder / f"{stem}.safetensors.index.json").read_text())
        assert (
            index["metadata"]["total_size"]
            == sum(written)
            == 2 * sum(t.numel() for t in wanted.values())
        )
        network = kind.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
        found = network.state_dict()
        assert {index["weight_map"][name] for name in wanted} == {file.name for file in files}
        assert all(found[name].dtype == torch.bfloat16 for name in wanted)
        for file in files:
            with safe_open(file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - no mapping
                    assert torch.equal(found[name], shard.get_tensor(name))


def test_bytes_on_disk_are_those_said(tmp_path: Path) -> None:
    """But for the header of a file, which names its tensors."""
    family = FAMILIES["sd35"]
    write_pipeline(tmp_path, family)
    for part, size in disk_bytes(empty_networks(family, "tiny"), "tiny").items():
        (file,) = (tmp_path / part).glob("*.safetensors")
        with file.open("rb") as opened:
            header = 8 + int.from_bytes(opened.read(8), "little")
        assert file.stat().st_size - header == size


def test_a_disk_that_is_too_small_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=3_000_000_000))
    refuse_small_disk(tmp_path / "new", 2_900_000_000)
    with pytest.raises(UserError, match=r"take 33\.8 GB and the disk has 3\.0 GB left; name a"):
        refuse_small_disk(tmp_path / "new" / "one", 33_800_000_000)


def test_names_may_have_hyphens() -> None:
    assert find_family("qwen-image") is FAMILIES["qwen_image"]
    with pytest.raises(UserError, match="got 'fluks'; did you mean flux"):
        find_family("fluks")


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no model_index\.json; name another"):
        count_folder(tmp_path)
