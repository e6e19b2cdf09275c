"""``rlalign export``: a model as a folder that plain diffusers loads, or as a file for ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlalign.alignment.models import Model, find_model
from rlalign.cli.common import refuse_url
from rlalign.cli.evaluate import MODEL_HELP
from rlalign.core.files import replacing
from rlalign.core.registry import Recipe, UserError

if TYPE_CHECKING:
    from rlalign.networks.exports import Rounding
    from rlalign.policies.base import Policy

FORMATS = ("diffusers", "comfyui")
SUFFIX = ".safetensors"
NOTE = "rlalign"
"""The key of a run's settings in a file's metadata."""


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help=MODEL_HELP, show_default=False)],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Where to write; with --format comfyui a new .safetensors file.",
            show_default=False,
        ),
    ],
    merged: Annotated[
        bool, typer.Option("--merged", help="Merge a LoRA and write the whole pipeline.")
    ] = False,
    format: Annotated[
        str,
        typer.Option(
            metavar="FORMAT", help="diffusers, or comfyui: a LoRA in one file of kohya's keys."
        ),
    ] = "diffusers",
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Of the weights: float32, float16 or bfloat16.")
    ] = "float32",
) -> None:
    """Write a folder that plain diffusers loads.

    A pipeline folder where all weights were trained, else the file of a LoRA (with --merged the
    pipeline too). A run's settings are in the metadata of its files.
    """
    _refuse_mistakes(target, merged, format, dtype)
    model = find_model(run)
    policy = model.load("cpu", parts=frozenset({"denoiser"}))
    note = note_of(model)
    if format == "comfyui":
        rounding = _write_file(policy, target, dtype, note)
        call = f"ComfyUI opens it, and pipeline.load_lora_weights({str(target)!r})"
    else:
        save = policy.save_merged if merged else policy.save
        rounding = _write_folder(save, target, dtype, note)
        call = _loader(target, model.recipe)
    if rounding.difference:
        print(
            f"{dtype}: numbers moved by at most {rounding.difference:.2g}, most in {rounding.name}"
        )
    print(f"{target}: {call} loads it")


def _refuse_mistakes(target: Path, merged: bool, format: str, dtype: str) -> None:
    """Raises UserError for options that do not go together, and for a place that is taken."""
    from rlalign.learning.folders import refuse_what_is_there
    from rlalign.networks.exports import DTYPES

    refuse_url(target, "DIR")
    if format not in FORMATS:
        raise UserError(f"--format must be {' or '.join(FORMATS)}, got {format!r}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if format == "diffusers":
        refuse_what_is_there(target, "name another folder")
        if target.suffix == SUFFIX:
            raise UserError(
                f"DIR must be a folder, got {str(target)!r}; a LoRA in one file is written by"
                " --format comfyui"
            )
    elif merged:
        raise UserError("--merged and --format comfyui exclude each other: a pipeline, or a LoRA")
    elif target.suffix != SUFFIX:
        raise UserError(
            f"with --format comfyui DIR must be a file that ends in {SUFFIX}, got {str(target)!r}"
        )
    elif target.exists():
        raise UserError(f"{target} is there already; name another file")


def _write_file(policy: Policy, file: Path, dtype: str, note: Mapping[str, str]) -> Rounding:
    """A LoRA in one file, whole or not at all."""
    from rlalign.learning.checkpoint import disk_errors
    from rlalign.networks.exports import rewrite

    with disk_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as unfinished:
            policy.save_comfyui(unfinished)
            return rewrite(unfinished, dtype, note)


def _write_folder(
    save: Callable[[Path], None], folder: Path, dtype: str, note: Mapping[str, str]
) -> Rounding:
    """A pipeline or a LoRA in a folder, whole or not at all."""
    from rlalign.learning.checkpoint import disk_errors
    from rlalign.learning.folders import all_or_nothing
    from rlalign.networks.exports import rewrite_folder

    with disk_errors(folder), all_or_nothing(folder) as unfinished:
        save(unfinished)
        return rewrite_folder(unfinished, dtype, note)


def note_of(model: Model) -> dict[str, str]:
    """What the metadata of exported files say of the run they come from, as JSON: its name, the
    round, every setting as its config.yaml has it, and rlalign's version; nothing for a model that
    is no run's. The same run gives the same text."""
    from rlalign import __version__
    from rlalign.config import load_begun, resolved
    from rlalign.learning.checkpoint import newest_round

    if model.run_folder is None:
        return {}
    run = load_begun(model.run_folder / "config.yaml")
    content = {
        "version": __version__,
        "name": run.name,
        "round": newest_round(model.run_folder),
        "run": resolved(run),
    }
    return {NOTE: json.dumps(content, sort_keys=True)}


def _loader(folder: Path, recipe: Recipe) -> str:
    """What loads an exported folder: a call of diffusers, to which parts that a pipeline lacks must
    be named, or a line of a run file where the model is none of diffusers'."""
    from rlalign.networks.lora import FILE

    # a pipeline of two denoisers has a file for the adapter of each
    if any(folder.glob(f"{FILE.partition('.')[0]}*")):
        return f"pipeline.load_lora_weights({str(folder)!r})"
    if not (folder / "model_index.json").is_file():
        return f"'policy: {{name: {recipe.name}, path: {folder}}}' in a run file"
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    lacks = [n for n, kind in index.items() if kind == [None, None] and n.endswith("_3")]
    absent = "".join(f", {name}=None" for name in lacks)
    return f"DiffusionPipeline.from_pretrained({str(folder)!r}{absent})"
