"""Stable Diffusion 3.5 under the policy sd3: a second attention in some blocks, normed queries and
keys, T5 of a length that is a setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.sd3 import StableDiffusion3
from tests.policies.acceptance import Acceptance, Case

# two joint blocks of two streams of four layers; the last has no output layer of the words' stream
LAYERS = 8 + 7
SECOND_ATTENTION = 4


def medium(folder: Path) -> Case:
    """The first block has a second attention; the pipeline's own number of T5's tokens."""
    write_pipeline(folder, FAMILIES["sd35"], seed=1)
    return Case(
        recipe=StableDiffusion3(path=str(folder)),
        adapted=LAYERS + SECOND_ATTENTION,
        call=lambda guidance: {"guidance_scale": guidance},
    )


def large(folder: Path) -> Case:
    """128 tokens of T5, as Flow-GRPO trains with."""
    write_pipeline(folder, FAMILIES["sd35_large"], seed=1)

    def call(guidance: float) -> Mapping[str, Any]:
        return {"guidance_scale": guidance, "max_sequence_length": 128}

    recipe = StableDiffusion3(path=str(folder), t5_tokens=128)
    return Case(recipe=recipe, adapted=LAYERS, call=call)


CASES: dict[str, Callable[[Path], Case]] = {"medium": medium, "large": large}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return CASES[request.param](tmp_path_factory.mktemp("pipeline"))


class TestAcceptance(Acceptance):
    """Each case is taken by diffusers as by rlalign."""
