"""FLUX.1 against diffusers' own pipeline, on small pipelines of random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.flux import Flux
from tests.policies.acceptance import Acceptance, Case

# a joint block has two streams of four layers, a single one has no output layer of its own
LAYERS = 2 * 4 + 3
TOKENS = 32


def call(guidance: float) -> Mapping[str, Any]:
    negative = {"negative_prompt": ["", ""]} if guidance > 1 else {}
    return {"true_cfg_scale": guidance, "max_sequence_length": TOKENS, **negative}


def dev(folder: Path) -> Case:
    write_pipeline(folder, FAMILIES["flux"], seed=1)
    recipe = Flux(path=str(folder), text_tokens=TOKENS)
    return Case(recipe=recipe, adapted=LAYERS, call=call, packed=True)


def schnell(folder: Path) -> Case:
    write_pipeline(folder, FAMILIES["flux_schnell"], seed=1)
    recipe = Flux(path=str(folder), text_tokens=TOKENS)
    return Case(recipe=recipe, adapted=LAYERS, call=call, packed=True)


CASES: dict[str, Callable[[Path], Case]] = {"dev": dev, "schnell": schnell}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return CASES[request.param](tmp_path_factory.mktemp("pipeline"))


class TestAcceptance(Acceptance):
    """Each case is taken by diffusers as by rlalign."""
