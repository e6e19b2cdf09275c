"""What a family of models is made of: records that the tables are written in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Size = Literal["tiny", "published"]
Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network by its class and the arguments of its constructor, at both sizes."""

    kind: str
    """The name of a class of diffusers, or of transformers."""
    library: str = "diffusers"
    same: Settings = field(default_factory=dict)
    """Arguments of both sizes."""
    tiny: Settings = field(default_factory=dict)
    published: Settings = field(default_factory=dict)

    def settings(self, size: Size) -> dict[str, Any]:
        """The arguments of the constructor (of the config, where the class is transformers')."""
        return {**self.same, **(self.tiny if size == "tiny" else self.published)}

    def vary(self, *, kind: str = "", **more: Settings) -> Network:
        """The same network with other arguments: ``same``, ``tiny`` or ``published``."""
        return replace(
            self,
            kind=kind or self.kind,
            **{name: {**getattr(self, name), **settings} for name, settings in more.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer that reads letter by letter, and the most tokens of a prompt; or what prepares
    pictures for an image encoder, and the pixels of their side. The same at both sizes."""

    kind: Literal["clip", "t5", "qwen", "gemma", "llama", "clip_pictures"]
    length: int
    pads_with: str = ""
    """The token that fills a short prompt up, where it is not the kind's own."""


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """A scheduler of diffusers, the same at both sizes."""

    kind: str
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A published model: a pipeline of diffusers and its parts, by the names that it gives them."""

    title: str
    """The published checkpoint whose sizes these are."""
    pipeline: str
    networks: Mapping[str, Network]
    tokenizers: Mapping[str, Tokenizer]
    scheduler: Scheduler
    facts: Settings = field(default_factory=dict)
    """Other arguments of the pipeline's constructor."""
    pixels: int = 16
    """Of a side of what the small model draws."""
    frames: int = 1
    """Of what the small model draws; more than 1 for a model of clips."""
