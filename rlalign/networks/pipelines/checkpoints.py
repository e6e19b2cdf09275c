"""A checkpoint as users name it: a pipeline folder, a hub id, or weights in one ``.safetensors``
file whose settings lie in a folder beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from rlalign.core.registry import UserError
from rlalign.networks.pipelines.loading import (
    INDEX,
    Held,
    broken,
    class_of,
    find_folder,
    hold_all,
    is_network,
    load_config,
    load_network,
    load_pipeline,
    one_file,
    quiet_libraries,
    read_index,
    tensor_names,
)


def load_checkpoint(
    path: str,
    classes: Sequence[str],
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
    holds: Held = hold_all,
    **settings: Any,
) -> Any:
    """``load_pipeline``, or the pipeline of one file, in float32. Raises UserError with the way
    out."""
    file = one_file(path)
    if file is None:
        return load_pipeline(path, classes, dtypes, holds, **settings)
    return _load_one_file(file, classes, holds, settings)


def read_network(path: str, classes: Sequence[str], part: str) -> Any:
    """One network of a checkpoint, diffusers' own class, in float32: every weight as it is stored.
    Raises UserError with the way out."""
    file = one_file(path)
    folder = find_folder(path) if file is None else settings_folder(file)
    _, index = read_index(folder, path, classes)
    kind = index[part]
    with quiet_libraries():
        if file is None:
            return load_network(folder / part, kind, f"policy.path: cannot load {path!r}")
        return _convert(file, folder, part, class_of(kind)).float()


def settings_folder(file: Path) -> Path:
    """The folder with the settings and tokenizers of ``x.safetensors``: ``x/`` beside it. Raises
    UserError where it is not there."""
    folder = file.with_suffix("")
    if not (folder / INDEX).is_file():
        raise UserError(
            f"policy.path: cannot load {str(file)!r}: weights in one file lack the settings and"
            f" tokenizers of their parts, and there is no {folder / INDEX}; copy there {INDEX} and"
            " the .json and .txt files of each part's folder (unet/, tokenizer/ and so on) from a"
            " pipeline folder of the same family"
        )
    return folder


def _load_one_file(
    file: Path, classes: Sequence[str], holds: Held, settings: Mapping[str, Any]
) -> Any:
    """The pipeline of weights in one file, as diffusers converts them. A network that the file
    lacks is read from the folder of its settings."""
    import diffusers

    folder = settings_folder(file)
    rule = f"policy.path: cannot load {str(file)!r}"
    name, index = read_index(folder, str(folder), classes)
    absent = {part: None for part, kind in index.items() if kind == [None, None]}
    given = {**absent, **settings}
    networks = {p: kind for p, kind in index.items() if p not in given and is_network(kind)}
    held = dict.fromkeys(tensor_names(file, rule))
    with quiet_libraries():
        # some files hold the denoiser alone, or no text encoders
        parts: dict[str, Any] = {}
        for part, kind in networks.items():
            if not holds(part):
                parts[part] = load_config(folder / part, kind, rule)
            elif not _is_held(class_of(kind), held):
                parts[part] = load_network(folder / part, kind, rule)
            elif kind[0] == "diffusers":
                parts[part] = _convert(file, folder, part, class_of(kind))

        # diffusers converts the text encoders that the file has, and loads the other parts
        try:
            pipeline = getattr(diffusers, name).from_single_file(
                str(file), config=str(folder), local_files_only=True, **parts, **given
            )
        except Exception as error:
            raise broken(rule, error) from error

    # a weight of a text encoder that the file lacks is left empty; the others have its dtype
    for part in filter(holds, networks):
        network = getattr(pipeline, part)
        empty = [n for n, tensor in network.named_parameters() if tensor.is_meta]
        if empty:
            raise _lacking(file, folder, part, empty[0])
        network.float()
    pipeline.register_to_config(_name_or_path=str(folder))
    return pipeline


def _convert(file: Path, folder: Path, part: str, kind: Any) -> Any:
    """A network of diffusers from the tensors of a file."""
    try:
        return kind.from_single_file(
            str(file), config=str(folder), subfolder=part, local_files_only=True
        )
    except NotImplementedError as error:  # torch's, of a weight that stayed empty
        raise _lacking(file, folder, part, "a weight") from error
    except Exception as error:
        raise broken(f"policy.path: cannot load {str(file)!r}", error, part) from error


def _lacking(file: Path, folder: Path, part: str, what: str) -> UserError:
    return UserError(
        f"policy.path: cannot load {str(file)!r}: it lacks {what} of the {part}, which"
        f" {folder / part}/config.json asks for; are they of the same model, and is the file whole?"
    )


def _is_held(kind: type, names: Mapping[str, None]) -> bool:
    """Whether a file with these tensors has the weights of a class, as diffusers looks for
    them."""
    from diffusers.loaders import single_file_utils as utils

    if kind.__module__.startswith("transformers"):
        clip = utils.is_clip_model_in_single_file(kind, names)
        return utils.is_t5_in_single_file(names) if "T5" in kind.__name__ else clip
    if kind.__name__.startswith("Autoencoder"):
        return any(name.startswith(tuple(utils.LDM_VAE_KEYS)) for name in names)
    return True
