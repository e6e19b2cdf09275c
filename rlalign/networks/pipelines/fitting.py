"""Whether a pipeline's parts are what a policy asks of them: conditions, channels and sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.networks.pipelines.loading import one_line
from rlalign.networks.precision import Precision, autocast, unrepeatable

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")
"""Autoencoders that decode as diffusers' pipelines ask, without noise of their own."""
UNTOLD: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "addition_embed_type": (
        (None, "text"),
        "more than the prompt's tokens, as Stable Diffusion XL's is",
    ),
    "class_embed_type": ((None,), "a class label"),
    "num_class_embeds": ((None,), "a class label"),
    "time_cond_proj_dim": ((None,), "the guidance scale, as a consistency model's is"),
    "encoder_hid_dim_type": ((None, "text_proj"), "a picture"),
}
"""Setting of a UNet -> values with which it is told latents, timestep and tokens alone; what else
other values make it be told."""

OTHER_SIZES = "other things than a pooled vector and sizes"
LONGEST_T5 = 512
"""Tokens that FLUX's pipeline asks of T5 at most."""


def check_unet(pipeline: Any, path: str) -> None:
    """Refuses a Stable Diffusion pipeline without a part, or whose UNet is told more than a
    prompt."""
    _check_present(pipeline, path, ("unet", "vae", "text_encoder", "tokenizer", "scheduler"))
    _check_told(pipeline, path, UNTOLD)
    _check_channels(pipeline, path, "unet")
    _check_tokens(pipeline, path, ("",), pipeline.tokenizer.model_max_length)


def check_unet_xl(pipeline: Any, path: str) -> None:
    """Refuses a Stable Diffusion XL pipeline without a part, or whose UNet is told other things
    than two encoders' words, a pooled vector and sizes."""
    text = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    _check_present(pipeline, path, ("unet", "vae", *text, "scheduler"))
    _check_class(pipeline, path, "text_encoder_2", ("CLIPTextModelWithProjection",))
    _check_told(pipeline, path, {**UNTOLD, "addition_embed_type": (("text_time",), OTHER_SIZES)})
    _check_channels(pipeline, path, "unet")
    for number in ("", "_2"):
        length = getattr(pipeline, f"tokenizer{number}").model_max_length
        _check_tokens(pipeline, path, (number,), length)


def check_packed(pipeline: Any, path: str) -> None:
    """Refuses a FLUX pipeline without a part, or whose transformer takes other tokens than latents
    of 2 x 2."""
    text = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    _check_present(pipeline, path, ("transformer", "vae", *text, "scheduler"))
    _check_class(pipeline, path, "transformer", ("FluxTransformer2DModel",))
    _check_channels(pipeline, path, "transformer", latents=4)
    _check_tokens(pipeline, path, ("",), pipeline.tokenizer.model_max_length)
    # T5 has positions of its own making, and the length is a setting
    _check_tokens(pipeline, path, ("_2",), LONGEST_T5)


def check_transformer(pipeline: Any, path: str) -> None:
    """Refuses a Stable Diffusion 3 pipeline that lacks a part, or has parts of another kind."""
    text = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    _check_present(pipeline, path, ("transformer", "vae", *text, "scheduler"))
    if pipeline.text_encoder_3 is not None:
        _check_present(pipeline, path, ("tokenizer_3",))
    _check_class(pipeline, path, "transformer", ("SD3Transformer2DModel",))
    _check_channels(pipeline, path, "transformer")
    if not isinstance(pipeline.vae.config.get("shift_factor"), int | float):
        shift = pipeline.vae.config.get("shift_factor")
        raise _misfit(path, "vae", f"shift_factor must be a number (0.0 is none), got {shift!r}")
    _check_tokens(pipeline, path, ("", "_2"), pipeline.tokenizer_max_length)


def check_settings(
    pipeline: Any, path: str, part: str, allowed: Mapping[str, Sequence[Any]]
) -> None:
    """Refuses a part of whose settings one has a value that ``allowed`` does not list for it."""
    for name, values in allowed.items():
        value = getattr(pipeline, part).config.get(name)
        if value not in values:
            raise _misfit(path, part, f"{name} must be {_words(values)}, got {value!r}")


def check_parts(pipeline: Any, path: str, needs: Mapping[str, Sequence[str]]) -> None:
    """Refuses a pipeline that lacks a part of ``needs`` (part -> the classes that it may be of;
    none is any), or has one of another class."""
    _check_present(pipeline, path, (*needs, "scheduler"))
    for part, classes in needs.items():
        if classes:
            _check_class(pipeline, path, part, classes)


def check_patches(pipeline: Any, path: str, part: str) -> None:
    """Refuses a transformer of clips whose tokens are not squares of one latent frame."""
    found = getattr(pipeline, part).config.get("patch_size")
    shape = tuple(found) if isinstance(found, list | tuple) else ()
    if len(shape) != 3 or shape[0] != 1 or shape[1] != shape[2]:
        raise _misfit(path, part, f"patch_size must be [1, n, n], got {found!r}")


def try_out(family: Any, path: str, plan: Plan, precision: Precision) -> None:
    """Refuses a pipeline whose parts do not fit, by one small pass: the family's trial prompt, zero
    latents of the size of ``plan``.

    ``family`` is one that is settled on its device (the libraries of a GPU keep what the first
    product finds); an autoencoder that it does without is not tried. Raises UserError.
    """
    # one latent of zeros, which each part must be able to read or to give
    latents = torch.zeros(1, *family.latent_shape(plan), device=family.device)
    with torch.no_grad():
        # the words are remembered: they are read as a rollout reads them, not in the denoiser's
        # precision
        condition = _tried(
            path, "the text encoders", lambda: family.encode([family.trial_prompt], plan)
        )
        answers: list[tuple[str, Any, Sequence[int]]] = []
        for timestep in family.trial_timesteps:
            told_B = torch.tensor([timestep], device=family.device)
            with autocast(family.device, precision):
                output = _tried(
                    path,
                    family.part,
                    lambda told_B=told_B: family.predict(latents, told_B, condition.caption),
                )
            answers.append((family.part, output, latents.shape))
        if family.has("vae"):
            media = _tried(path, "vae", lambda: family.decode(latents))
            answers.append(("vae", media, (1, plan.frames, 3, plan.height, plan.width)))

    # shapes first, then the numbers
    sides = " x ".join(str(side) for side in latents.shape[2:])
    for part, found, shape in answers:
        if tuple(found.shape) != tuple(shape):
            raise _misfit(
                path,
                part,
                f"must give {tuple(shape)} for latents of {sides}, got {tuple(found.shape)}",
            )
        if not bool(torch.isfinite(found).all()):
            raise _misfit(
                path, part, "gives numbers that are not finite (NaN), whatever it is asked"
            )


def default_size(sample_size: Any, path: str) -> tuple[int, int] | None:
    """(height, width) in latents of a network's ``sample_size``: a number, or [height, width].

    None where it is left out. Raises UserError for anything else.
    """
    if sample_size is None:
        return None
    sides = [sample_size, sample_size] if isinstance(sample_size, int) else sample_size
    if (
        not isinstance(sides, list | tuple)
        or len(sides) != 2
        or not all(isinstance(s, int) and s > 0 for s in sides)
    ):
        raise UserError(
            f"policy.path: cannot read {path!r}: sample_size must be a number > 0 or [height,"
            f" width], got {sample_size!r}; change it in a copy of the folder, or set plan.height"
            " and plan.width"
        )
    return int(sides[0]), int(sides[1])


def _check_present(pipeline: Any, path: str, names: Sequence[str]) -> None:
    for name in names:
        if getattr(pipeline, name, None) is None:
            raise UserError(
                f"policy.path: cannot load {path!r}: it has no {name}, which"
                f" {type(pipeline).__name__} needs; name a complete folder"
            )
        if name.startswith("tokenizer"):
            _check_vocabulary(pipeline, path, name)


def _check_vocabulary(pipeline: Any, path: str, name: str) -> None:
    """A tokenizer with words in it: transformers makes an empty one where its files are missing,
    and every prompt would read the same."""
    part = getattr(pipeline, name)
    # of a processor of texts and pictures, the one for texts
    tokenizer = getattr(part, "tokenizer", part)
    words = len(tokenizer) - len(tokenizer.get_added_vocab())
    # a T5 without files keeps its mark of a space
    if words < 2:
        raise UserError(
            f"policy.path: cannot load {path!r}: its {name} is incomplete: it has no words; is the"
            " folder complete and undamaged?"
        )


def _check_class(pipeline: Any, path: str, part: str, classes: Sequence[str]) -> None:
    found = type(getattr(pipeline, part)).__name__
    if found not in classes:
        raise _misfit(path, part, f"must be {_words(classes)}, got {found}")


def _check_told(
    pipeline: Any, path: str, allowed: Mapping[str, tuple[tuple[Any, ...], str]]
) -> None:
    """A UNet that is told no more than ``allowed`` says: setting -> its values, and what else other
    values make it be told."""
    _check_class(pipeline, path, "unet", ("UNet2DConditionModel",))
    for name, (values, what) in allowed.items():
        value = pipeline.unet.config.get(name)
        if value not in values:
            raise _misfit(
                path,
                "unet",
                f"{name} must be {_words(values)}, got {value!r}: this network is also told {what}",
            )


def _check_channels(pipeline: Any, path: str, part: str, *, latents: int = 1) -> None:
    """The denoiser gives what it takes, and takes what the autoencoder gives, of so many
    ``latents`` in a token."""
    _check_class(pipeline, path, "vae", AUTOENCODERS)
    config = getattr(pipeline, part).config
    latent = pipeline.vae.config.latent_channels * latents
    source = "the latent channels of its vae" + (f" in {latents} latents" if latents > 1 else "")
    inpainting = ": an inpainting model is also told a mask and a picture"
    for name in ("in_channels", "out_channels"):
        # a transformer of tokens gives what it takes, where its config is silent
        found = config["in_channels"] if latents > 1 and config[name] is None else config[name]
        if found != latent:
            raise _misfit(
                path,
                part,
                f"{name} must be {latent}, {source}, got {found}"
                f"{inpainting if found == 2 * latent + 1 else ''}",
            )


def _check_tokens(pipeline: Any, path: str, numbers: Sequence[str], length: Any) -> None:
    """Prompts no longer than the encoders read."""
    for number in numbers:
        tokenizer = getattr(pipeline, f"tokenizer{number}")
        encoder = getattr(pipeline, f"text_encoder{number}")

        # the number of words must suit the text encoder
        marks = tokenizer.num_special_tokens_to_add()
        longest = encoder.config.to_dict().get("max_position_embeddings")
        if (
            not isinstance(length, int)
            or length < marks
            or (longest is not None and length > longest)
        ):
            raise _misfit(
                path,
                "tokenizer",
                f"model_max_length must be a number from {marks} to {longest}, what"
                f" text_encoder{number} reads, got {length!r}",
            )


def _tried(path: str, part: str, ask: Callable[[], Any]) -> Any:
    """What a part answers; whatever the libraries raise on a pipeline's settings is a UserError."""
    try:
        return ask()
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and (message := unrepeatable(error)):
            raise UserError(message) from error
        raise _misfit(path, part, f"cannot be asked ({one_line(error)})") from error


def _words(values: Sequence[Any]) -> str:
    return " or ".join("null" if value is None else str(value) for value in values)


def _misfit(path: str, part: str, rule: str) -> UserError:
    return UserError(
        f"policy.path: cannot read {path!r}: {part}: {rule}; name another folder, or mend {part} in"
        " a copy of it"
    )
