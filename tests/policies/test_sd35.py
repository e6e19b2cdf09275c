"""Stable Diffusion 3.5 under the policy sd3: a second attention in some blocks, normed queries and
keys, T5 of a length that is a setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlalign.networks.random_models import FAMILIES, empty_networks, write_pipeline
from rlalign.policies.base import JOINT_TARGETS
from rlalign.policies.sd3 import StableDiffusion3
from tests.policies.acceptance import Acceptance, Case

# two joint blocks of two streams of four layers; the last has no output layer of the words' stream
LAYERS = 8 + 7
SECOND_ATTENTION = 4
UNHEARD = 1
"""What the last block asks for the words' stream, whose answer is not used."""


def medium(folder: Path) -> Case:
    """The first block has a second attention; the pipeline's own number of T5's tokens."""
    write_pipeline(folder, FAMILIES["sd35"], seed=1)
    return Case(
        recipe=StableDiffusion3(path=str(folder)),
        adapted=LAYERS + SECOND_ATTENTION,
        unheard=UNHEARD,
        call=lambda guidance: {"guidance_scale": guidance},
    )


def large(folder: Path) -> Case:
    """128 tokens of T5, as Flow-GRPO trains with."""
    write_pipeline(folder, FAMILIES["sd35_large"], seed=1)

    def call(guidance: float) -> Mapping[str, Any]:
        return {"guidance_scale": guidance, "max_sequence_length": 128}

    recipe = StableDiffusion3(path=str(folder), t5_tokens=128)
    return Case(recipe=recipe, adapted=LAYERS, unheard=UNHEARD, call=call)


CASES: dict[str, Callable[[Path], Case]] = {"medium": medium, "large": large}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return CASES[request.param](tmp_path_factory.mktemp("pipeline"))


class TestAcceptance(Acceptance):
    """Each case is taken by diffusers as by rlalign."""


@pytest.mark.parametrize(("name", "layers"), [("sd35", 243), ("sd35_large", 303)])
def test_the_published_sizes_have_so_many_adapted_layers(name: str, layers: int) -> None:
    """Eight a block, seven in the last; and four in each of medium's thirteen blocks with a second
    attention. Counted without memory for weights."""
    blocks = empty_networks(FAMILIES[name], "published")["transformer"]
    ends = tuple(f".{target}" for target in JOINT_TARGETS)
    assert sum(part.endswith(ends) for part, _ in blocks.named_modules()) == layers


def test_the_length_of_t5_changes_the_picture(tmp_path: Path) -> None:
    """Nothing masks its padding: the length is part of the model, to be the same in training and in
    use."""
    write_pipeline(tmp_path, FAMILIES["sd35"], seed=1)
    drawn = []
    for tokens in (16, 128):
        policy = StableDiffusion3(path=str(tmp_path), t5_tokens=tokens).load("cpu")
        rows = policy.family.pipeline.tokenizer_max_length + tokens
        assert policy.encode(["two"]).caption["embeds_BLD"].shape == (1, rows, 40)
        drawn.append(policy.sample(["two"], steps=2, seed=3, output="latents"))
    assert (drawn[0] - drawn[1]).abs().max() > 1e-4
