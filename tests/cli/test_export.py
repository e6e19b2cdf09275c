"""``rlalign export`` of a LoRA run on a small random pipeline: ComfyUI's file, dtypes, the note in
the metadata, and merged pipelines of a bfloat16 run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

import rlalign
from rlalign.alignment.api import load_policy
from rlalign.alignment.loop import train_local
from rlalign.cli import main
from rlalign.config import Run, dump, identity_of, parse_run, resolved
from rlalign.core.registry import build
from rlalign.learning import checkpoint
from rlalign.networks import lora
from rlalign.policies.base import Policy
from tests.runs import points_run
from tests.toy import save_pipeline

ROUND = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("base") / "small")


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, Policy]:
    """A run folder, its settings and its policy, in float32."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, *make_run(folder, base)


def make_run(folder: Path, base: Path, **settings: Any) -> tuple[Run, Policy]:
    """A run folder with the checkpoint of a LoRA (rank 4, alpha 8) as training might make it."""
    policy = {"name": "stable_diffusion", "path": str(base), "lora_rank": 4, "lora_alpha": 8.0}
    run = parse_run(
        {
            "name": "aligned",
            "policy": {**policy, **settings},
            "prompts": {"name": "list", "prompts": ["a red circle"] * 8},
            "rewards": [{"name": "jpeg"}],
            "algorithm": {"name": "ddpo"},
        }
    )
    live = run.policy.load("cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in live.trainable().values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(run))
    tensors = {f"policy/{name}": tensor for name, tensor in live.weights().items()}
    state = checkpoint.Checkpoint(round=ROUND, tensors=tensors, facts={})
    checkpoint.save(folder, state, run_identity=identity_of(run), keep=1)
    return run, live


def call(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def test_one_file_for_comfyui_has_the_runs_policy_and_settings(
    base: Path,
    made: tuple[Path, Run, Policy],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By plain diffusers, difference 0; the same run gives the same bytes."""
    folder, run, policy = made
    file = tmp_path / "new" / "lora.safetensors"
    assert call(folder, file, "--format", "comfyui") == 0
    printed = capsys.readouterr().out
    assert (
        printed == f"{file}: ComfyUI opens it, and pipeline.load_lora_weights('{file}') loads it\n"
    )
    pipeline = DiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=lora.ADAPTER)
    mine, theirs = lora.layers(policy.network), lora.layers(pipeline.unet)
    assert mine.keys() == theirs.keys()
    for name, layer in mine.items():
        assert torch.equal(layer.up, theirs[name].up) and torch.equal(layer.down, theirs[name].down)
        assert layer.scale == theirs[name].scale == 2.0

    # where it comes from
    with safe_open(file, "pt") as opened:
        note = json.loads(opened.metadata()["rlalign"])
    assert note == {
        "version": rlalign.__version__,
        "name": "aligned",
        "round": ROUND,
        "run": resolved(run),
    }
    again = tmp_path / "again.safetensors"
    assert call(folder, again, "--format", "comfyui") == 0
    assert again.read_bytes() == file.read_bytes()
    assert [path.name for path in file.parent.iterdir()] == ["lora.safetensors"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_adapter_in_another_dtype(
    base: Path,
    made: tuple[Path, Run, Policy],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
) -> None:
    """Each number rounded once, in both formats; the largest difference is said in one line."""
    folder, _, policy = made
    exported = tmp_path / "folder" / lora.FILE
    told = ["--dtype", dtype]
    assert call(folder, tmp_path / "folder", *told) == 0
    lines = capsys.readouterr().out.splitlines()
    assert call(folder, tmp_path / "a.safetensors", *told, "--format", "comfyui") == 0
    assert len(capsys.readouterr().out.splitlines()) == len(lines) == 2
    plain = load_file(exported)
    file = load_file(tmp_path / "a.safetensors")
    largest = 0.0
    for name, layer in lora.layers(policy.network).items():
        flat = "lora_unet_" + name.replace(".", "_")
        for side, matrix in (("down", layer.down), ("up", layer.up)):
            rounded = matrix.to(getattr(torch, dtype))
            assert torch.equal(file[f"{flat}.lora_{side}.weight"], rounded)
            assert torch.equal(plain[f"unet.{name}.lora.{side}.weight"], rounded)
            largest = max(largest, (rounded.float() - matrix).abs().max().item())
        assert file[f"{flat}.alpha"].item() == 8.0
    assert lines[0].startswith(f"{dtype}: numbers moved by at most {largest:.2g}, most in unet.")

    # what diffusers needs to know stays beside what we say
    with safe_open(exported, "pt") as opened:
        assert {"rlalign", "lora_adapter_metadata", "format"} <= opened.metadata().keys()
    pipeline = DiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "folder", adapter_name=lora.ADAPTER)
    assert {layer.scale for layer in lora.layers(pipeline.unet).values()} == {2.0}


def test_a_merged_bfloat16_run_keeps_the_checkpoints_own_weights(
    base: Path, tmp_path: Path
) -> None:
    """Bit for bit where no adapter is; elsewhere the sum of weight and adapter."""
    _, policy = make_run(tmp_path / "run", base, precision="bfloat16")
    assert call(tmp_path / "run", tmp_path / "whole", "--merged") == 0
    name = "diffusion_pytorch_model.safetensors"
    before = load_file(base / "unet" / name)
    after = load_file(tmp_path / "whole" / "unet" / name)
    adapted = {f"{n}.weight": layer for n, layer in lora.layers(policy.network).items()}
    assert after.keys() == before.keys() > adapted.keys() > set()
    for key, weight in before.items():
        layer = adapted.get(key)
        expected = weight if layer is None else weight + layer.up @ layer.down * layer.scale
        assert torch.equal(after[key], expected)
    with safe_open(tmp_path / "whole" / "unet" / name, "pt") as opened:
        assert json.loads(opened.metadata()["rlalign"])["round"] == ROUND


def test_a_merged_pipeline_in_float16_is_one_of_plain_diffusers(
    made: tuple[Path, Run, Policy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every part, each weight rounded once."""
    folder, _, _ = made
    assert call(folder, tmp_path / "exact", "--merged") == 0
    assert call(folder, tmp_path / "half", "--merged", "--dtype", "float16") == 0
    assert capsys.readouterr().out.count("float16: numbers moved by at most") == 1
    settings = {"torch_dtype": torch.float16, "safety_checker": None, "local_files_only": True}
    half = DiffusionPipeline.from_pretrained(tmp_path / "half", **settings)
    exact = DiffusionPipeline.from_pretrained(tmp_path / "exact", **settings)
    for part in ("unet", "vae", "text_encoder"):
        rounded = getattr(exact, part).state_dict()
        for key, tensor in getattr(half, part).state_dict().items():
            assert torch.equal(tensor, rounded[key])
        for file in (tmp_path / "half" / part).glob("*.safetensors"):
            assert {t.dtype for t in load_file(file).values() if t.is_floating_point()} == {
                torch.float16
            }


def test_a_mistake_is_one_message_and_writes_nothing(
    base: Path,
    made: tuple[Path, Run, Policy],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _, _ = made
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"")
    file = tmp_path / "a.safetensors"
    comfyui = ("--format", "comfyui")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("run", file), "DIR must be a folder, got"),
        (("run", "b", *comfyui), "DIR must be a file that ends in .safetensors, got"),
        (("run", taken, *comfyui), "is there already; name another file"),
        (("run", file, *comfyui, "--merged"), "--merged and --format comfyui exclude each other"),
        (("run", file, "--format", "a1111"), "--format must be diffusers or comfyui, got 'a1111'"),
        (("run", "b", "--dtype", "half"), "must be one of float32, float16, bfloat16, got 'half'"),
        (("points", file, *comfyui), "share no keys, as PointsFamily; export a folder"),
        ((base, file, *comfyui), "must be left out for a model without a LoRA"),
    ]
    for (model, *rest), expected in cases:
        model = folder if model == "run" else model
        rest = [tmp_path / "b" if one == "b" else one for one in rest]
        assert call(model, *rest) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        assert expected in printed.err
    assert {path.name for path in tmp_path.iterdir()} == {"taken.safetensors"}


def test_a_model_that_is_none_of_diffusers_is_read_by_the_line_that_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = points_run("rounds=1", "policy.lora_rank=2", "evaluate.every=0")
    train_local(run, tmp_path / "run", resume=False, on_record=lambda _: None)
    assert call(tmp_path / "run", tmp_path / "made") == 0
    said = capsys.readouterr().out.strip().splitlines()[-1]
    found = re.fullmatch(r"(.*): '(policy: .*)' in a run file loads it", said)
    assert found is not None, said
    policy = yaml.safe_load(found[2])["policy"]
    assert policy == {"name": "points", "path": str(tmp_path / "made")}
    again = build("policies", policy, "policy").load("cpu")
    trained = load_policy(tmp_path / "run")
    x, condition = torch.ones(3, 2, 1, 1), trained.encode(["left"] * 3)
    level = trained.path.levels(10)[4]
    with torch.no_grad():
        here, there = (p.denoise(x, level, condition, 1.0)[1] for p in (trained, again))
    torch.testing.assert_close(here, there)
