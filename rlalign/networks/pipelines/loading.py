"""A diffusers pipeline from a folder or a hub id, a dtype for each part, or one message: what is
wrong."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from logging import CRITICAL
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from rlalign.core.registry import UserError
from rlalign.networks import lora
from rlalign.networks.pipelines.absent import read_empty

INDEX = "model_index.json"
WEIGHTS = re.compile(r"(?:model|diffusion_pytorch_model)(?P<words>[.-].+)?\.safetensors")
"""Names of weights, as the libraries write them: whole or in shards, plain or of a variant."""
LONGEST = 300
"""Characters of a library's own message that are passed on."""
SHARD = re.compile(r"-\d+-of-\d+")
PREFERRED_VARIANTS = ("fp32", "fp16", "bf16")
"""Where a part has several variants and no plain weights; others follow in alphabetical order."""
LIBRARIES = ("diffusers", "transformers")
"""Where the classes of a pipeline's networks come from; code of a folder's own is never run."""
Held = Callable[[str], bool]
"""Whether a process needs the weights of a part. Of others it has the config alone."""


def hold_all(part: str) -> bool:
    """A process that needs every part."""
    return True


def load_pipeline(
    path: str,
    classes: Sequence[str] = ("StableDiffusionPipeline",),
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
    holds: Held = hold_all,
    **settings: Any,
) -> Any:
    """The pipeline under ``path``, of the class that its index names, one of ``classes``.

    ``dtypes`` says which parts are read in another type than float32; networks that ``holds`` is
    false for are on the meta device; ``settings`` go to diffusers. Weights are safetensors: plain
    ones or, where a part has none, a variant's (fp16). Raises UserError with the way out.
    """
    import diffusers

    folder = find_folder(path)
    rule = f"policy.path: cannot load {path!r}"
    name, index = read_index(folder, path, classes)
    with quiet_libraries():
        # networks are loaded here, with checks that diffusers does not make
        absent = {name: None for name, kind in index.items() if kind == [None, None]}
        given = {**absent, **settings}
        networks = {
            part: load_network(folder / part, kind, rule, dtypes.get(part, torch.float32))
            if holds(part)
            else load_config(folder / part, kind, rule)
            for part, kind in index.items()
            if part not in given and is_network(kind)
        }

        # diffusers loads the other parts
        try:
            return getattr(diffusers, name).from_pretrained(
                str(folder), local_files_only=True, **networks, **given
            )
        except Exception as error:
            others = {part: kind for part, kind in index.items() if part not in networks | given}
            _refuse_broken(folder, others, rule)
            raise broken(rule, error) from error


def _refuse_broken(folder: Path, parts: Mapping[str, list[Any]], rule: str) -> None:
    """Raises UserError naming the first of these parts that does not load alone."""
    for part, kind in parts.items():
        try:
            class_of(kind).from_pretrained(str(folder / part), local_files_only=True)
        except Exception as error:
            raise broken(rule, error, part) from error


def find_folder(path: str) -> Path:
    """The pipeline folder that a setting names: on disk, or in the hub's cache after a download."""
    folder = Path(path)
    if (folder / INDEX).is_file():
        return folder
    place = folder.absolute()
    rule = f"policy.path must be a diffusers pipeline folder or a hub id, got {path!r}"
    if one_file(path):
        raise UserError(f"{rule}: weights in one file, which this policy does not read")
    lora.refuse_as_model(path, "policy.path")
    if folder.exists():
        raise UserError(f"{rule}: {place} has no {INDEX}{_run_folder_hint(folder)}")
    if folder.is_absolute() or path.startswith((".", "~")):
        raise UserError(f"{rule}: there is no folder {place}")
    with quiet_libraries():
        return _download(path, f"{rule}: there is no folder {place}, and as a hub id")


def one_file(path: str) -> Path | None:
    """The whole checkpoint in one ``.safetensors`` file that a path names; None for anything else,
    an adapter's file too. Raises UserError where it cannot be read."""
    file = Path(path)
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    names = tensor_names(file, f"policy.path: cannot read {path!r}")
    return None if any("lora" in name.lower() for name in names) else file


def tensor_names(file: Path, rule: str) -> list[str]:
    """The names of the tensors in a safetensors file; ``rule`` begins the message of a
    UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise broken(rule, error) from error


def _run_folder_hint(folder: Path) -> str:
    inner = folder / "policy"
    return f"; its policy is in {inner}" if (inner / INDEX).is_file() else ""


def _download(path: str, rule: str) -> Path:
    """The folder in the hub's cache that holds a pipeline's files."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import errors, hf_hub_download

    # the index says whether the repository exists and is a pipeline
    try:
        hf_hub_download(path, INDEX)
    except errors.HFValidationError as error:
        raise UserError(
            f"{rule} it is malformed (those have the form owner/name); correct the path"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{rule} it is unknown to the hub, or private; correct the path, or log in"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{rule} it is not in the cache, and the hub could not be reached; correct the path, or"
            " go online"
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{rule} it has no {INDEX}; name another") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{rule} it cannot be loaded ({one_line(error)}); correct the path"
        ) from error

    # repositories may have weights of one variant alone
    failed: Exception | None = None
    for variant in (None, *PREFERRED_VARIANTS):
        try:
            return Path(DiffusionPipeline.download(path, use_safetensors=True, variant=variant))
        except (OSError, ValueError) as error:
            failed = failed or error
    assert failed is not None
    raise UserError(
        f"{rule} it cannot be loaded ({one_line(failed)}); correct the path"
    ) from failed


def read_index(folder: Path, path: str, classes: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The class of a pipeline folder, one of ``classes``, and its parts: name -> [library,
    class]."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise broken(f"policy.path: cannot load {path!r}", error, INDEX) from error

    # the class decides whether this policy can read it
    name = index.get("_class_name") if isinstance(index, Mapping) else None
    if name not in classes:
        raise UserError(
            f"policy.path: cannot read {path!r}: _class_name in {INDEX} must be"
            f" {' or '.join(classes)}, got {name!r}; name a folder of that class, or another policy"
        )

    # names that begin with _ are facts of the pipeline
    parts = {
        part: kind
        for part, kind in index.items()
        if not part.startswith("_") and isinstance(kind, list)
    }
    return str(name), parts


def variant_of(names: Sequence[str]) -> str | None:
    """The variant to load of a part with these files; None where there are plain weights, or
    none."""
    found = {_read_variant(match) for match in map(WEIGHTS.fullmatch, names) if match}
    variants = sorted(v for v in found if v is not None)
    if None in found or not variants:
        return None
    return next((v for v in PREFERRED_VARIANTS if v in variants), variants[0])


def _read_variant(match: re.Match[str]) -> str | None:
    """The variant that a file's name tells; None for plain weights."""
    # model.fp16-00001-of-00002.safetensors, formerly model-00001-of-00002.fp16.safetensors
    return SHARD.sub("", match["words"] or "").removeprefix(".") or None


def weight_files(folder: Path) -> list[Path]:
    """The files of a part's weights that are loaded: plain ones, or those of a variant."""
    names = sorted(file.name for file in folder.iterdir())
    wanted = variant_of(names)
    matches = {name: WEIGHTS.fullmatch(name) for name in names}
    return [folder / n for n, match in matches.items() if match and _read_variant(match) == wanted]


def is_network(kind: list[Any]) -> bool:
    """Whether a part has weights of its own: what is neither a tokenizer nor a scheduler nor a
    preprocessor."""
    return (
        len(kind) == 2
        and kind[0] in LIBRARIES
        and isinstance(class_of(kind), type)
        and (issubclass(class_of(kind), torch.nn.Module))
    )


def class_of(kind: list[Any]) -> Any:
    """The class of [library, class]; None where the library has none of this name."""
    import diffusers
    import transformers

    library = {"diffusers": diffusers, "transformers": transformers}[kind[0]]
    return getattr(library, str(kind[1]), None)


def load_network(
    folder: Path, kind: list[Any], rule: str, dtype: torch.dtype = torch.float32
) -> Any:
    """One network of a pipeline in a dtype, in which every weight comes from the folder; buffers
    (tables of positions, of rotations) stay float32.

    ``rule`` begins the message of a UserError: the setting, and what cannot be done.
    """
    _refuse_no_folder(folder, rule)
    # transformers would make one of its class's usual size, perhaps too large for the machine
    if not (folder / "config.json").is_file():
        raise UserError(f"{rule}: {folder.name}: it has no config.json; name a complete folder")

    # the weights as they are stored
    try:
        variant = variant_of([file.name for file in folder.iterdir()])
        network, info = class_of(kind).from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            variant=variant,
            local_files_only=True,
            output_loading_info=True,
            **_sizes_as_info(kind),
        )
        if dtype != torch.float32:
            _restore_buffers(network, [f for f in folder.iterdir() if f.suffix == ".safetensors"])
    except Exception as error:
        raise broken(rule, error, folder.name) from error

    # the libraries fill what is not in the file, or has another size there, with random numbers
    invented = sorted(str(name) for name in info["missing_keys"])
    invented += sorted(str(key[0]) for key in info["mismatched_keys"])
    if invented:
        raise UserError(
            f"{rule}: {folder.name}: its weights lack"
            f" {invented[0]}{f' and {len(invented) - 1} more' if invented[1:] else ''}, as its"
            " config.json asks for it; is the folder complete and undamaged?"
        )
    return network


def load_config(folder: Path, kind: list[Any], rule: str) -> Any:
    """The same network without weights, which need not be there."""
    _refuse_no_folder(folder, rule)
    try:
        return read_empty(class_of(kind), folder)
    except Exception as error:
        raise broken(rule, error, folder.name) from error


def _refuse_no_folder(folder: Path, rule: str) -> None:
    if not folder.is_dir():
        raise UserError(
            f"{rule}: it has no folder {folder.name}, which its {INDEX} names; name a complete one"
        )


def _restore_buffers(network: Any, files: Sequence[Path]) -> None:
    """Puts float32 buffers back into a network of diffusers, which reads them in the dtype of its
    weights: as its class makes them, or as the first of the files has them that does."""
    from safetensors import safe_open

    exact = dict(empty_copy(network).named_buffers())
    stored = exact.keys() & network.state_dict().keys()
    for file in sorted(files):
        with safe_open(file, "pt") as opened:
            found = stored & set(opened.keys())
            exact |= {name: opened.get_tensor(name).float() for name in found}
            stored -= found
    for name, buffer in exact.items():
        module, _, leaf = name.rpartition(".")
        network.get_submodule(module)._buffers[leaf] = buffer


def empty_copy(network: Any) -> Any:
    """A network of diffusers by the same config whose weights take no memory (they are on the meta
    device); its buffers are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return type(network).from_config(network.config)


def _sizes_as_info(kind: list[Any]) -> dict[str, bool]:
    """What makes transformers tell of weights of other sizes rather than print a table of them;
    diffusers names one."""
    return {"ignore_mismatched_sizes": True} if kind[0] == "transformers" else {}


def broken(rule: str, error: Exception, part: str = "") -> UserError:
    """What is said of a library's error in reading a folder or a file."""
    place = f"{part}: " if part else ""
    return UserError(f"{rule}: {place}{one_line(error)}; is the folder complete and undamaged?")


def one_line(error: Exception) -> str:
    """What an error says, as one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars, which would tear the run's own, and no messages of their own: what matters
    is refused."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    libraries = (diffusers_logging, transformers_logging, hub_logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        for library, level in zip(libraries, before, strict=True):
            library.set_verbosity(level)
