"""FLUX.1 against diffusers' own pipeline, on small pipelines of random weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.networks.random_models import FAMILIES, empty_networks, write_pipeline
from rlalign.policies.flux import Flux, FluxFamily
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in ("flux", "flux_schnell")}
    for name, folder in made.items():
        write_pipeline(folder, FAMILIES[name], seed=1)
    return made


def test_the_guidance_that_dev_is_told_is_a_setting(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes the answer, costs no pass more, and is no plan.guidance; schnell is told none."""
    told: list[torch.Tensor | None] = []
    found = []
    for name, guidance in (("flux", 3.5), ("flux", 1.0), ("flux_schnell", 3.5)):
        recipe = Flux(path=str(folders[name]), embedded_guidance=guidance, text_tokens=TOKENS)
        policy = recipe.load("cpu")
        forward = policy.network.forward

        def hear(*, forward: Any = forward, **more: Any) -> Any:
            told.append(more["guidance"])
            return forward(**more)

        monkeypatch.setattr(policy.network, "forward", hear)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        condition = policy.encode(["a red circle", "two"])
        with torch.no_grad():
            found.append(policy.denoise(x, torch.tensor(0.5), condition, 1.0)[0])
        assert policy.meter.calls == 2
    assert [t if t is None else t.tolist() for t in told] == [[3.5, 3.5], [1.0, 1.0], None]
    assert (found[0] - found[1]).abs().max() > 1e-4


def test_a_guidance_must_be_told_to_dev(folders: dict[str, Path]) -> None:
    with pytest.raises(
        UserError, match=r"policy\.embedded_guidance must be a number for .*flux.*, got null; 3\.5"
    ):
        Flux(path=str(folders["flux"]), embedded_guidance=None).load("cpu")
    assert Flux(path=str(folders["flux_schnell"]), embedded_guidance=None).load("cpu")


def test_lengths_and_sizes_are_the_pipelines_own(folders: dict[str, Path]) -> None:
    """T5's tokens are 512 for dev and 256 for schnell, unless they are set; a plan without a size
    is drawn as a call without one."""
    families = {name: Flux(path=str(f)).load("cpu").family for name, f in folders.items()}
    assert {name: family.text_tokens for name, family in families.items()} == {
        "flux": 512,
        "flux_schnell": 256,
    }
    assert families["flux_schnell"].encode(["two"]).caption["embeds_BLD"].shape == (1, 256, 32)
    for family in families.values():
        side = family.pipeline.default_sample_size * family.pipeline.vae_scale_factor
        assert family.drawn_size(Plan()) == (side, side)
        assert family.latent_shape(Plan(height=24, width=16)) == (4, 12, 8)


@pytest.mark.parametrize(("side", "mu"), [(512, 0.63), (1024, 1.15)])
def test_devs_levels_follow_the_size_and_schnells_do_not(
    folders: dict[str, Path], side: int, mu: float
) -> None:
    """The published numbers: K even levels, moved by exp(mu), where mu is on a line through 256 and
    4096 tokens."""
    # the small autoencoder halves sides, where the published one takes an eighth
    plan = Plan(steps=4, height=side // 4, width=side // 4)
    even = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    for name, shift in (("flux", math.exp(mu)), ("flux_schnell", 1.0)):
        path = Flux(path=str(folders[name]), text_tokens=TOKENS).load("cpu").path
        wanted = shift * even / (shift * even + 1.0 - even)
        torch.testing.assert_close(path.at(plan).levels(4), wanted, rtol=0, atol=1e-9)


def test_places_are_exact_in_any_precision(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 has no 257: places and the guidance are told in float32."""
    recipe = Flux(path=str(folders["flux"]), precision="bfloat16", lora_rank=2, text_tokens=TOKENS)
    policy = recipe.load("cpu")
    told: dict[str, torch.Tensor] = {}

    def hear(**more: Any) -> tuple[torch.Tensor]:
        told.update(more)
        return (more["hidden_states"],)

    monkeypatch.setattr(policy.network, "forward", hear)
    words = policy.encode(["two"]).caption
    x = torch.randn(1, 4, 2, 2 * 300)
    assert torch.equal(policy.answer(x, torch.tensor([321.5]), words), x)
    names = ("img_ids", "txt_ids", "guidance", "timestep")
    assert {told[name].dtype for name in names} == {torch.float32}
    assert told["img_ids"].tolist() == [[0.0, 0.0, float(column)] for column in range(300)]
    assert told["txt_ids"].shape == (TOKENS, 3) and not told["txt_ids"].any()
    assert told["timestep"].item() == pytest.approx(0.3215, abs=1e-7)


def test_the_published_sizes_have_266_adapted_layers() -> None:
    """Eight in each of 19 joint blocks, three in each of 38 single ones; counted without memory for
    weights."""
    transformer = empty_networks(FAMILIES["flux"], "published")["transformer"]
    ends = tuple(f".{target}" for target in FluxFamily.lora_targets)
    assert sum(name.endswith(ends) for name, _ in transformer.named_modules()) == 266


def test_another_width_of_tokens_is_refused(tmp_path: Path) -> None:
    """As transformers have that are told a picture beside the latents (Fill, Canny)."""
    family = FAMILIES["flux"]
    wide = family.networks["transformer"].vary(tiny={"in_channels": 32, "out_channels": 16})
    write_pipeline(tmp_path, replace(family, networks={**family.networks, "transformer": wide}))
    with pytest.raises(
        UserError,
        match="transformer: in_channels must be 16, the latent channels of its vae in 4 latents,"
        " got 32",
    ):
        Flux(path=str(tmp_path)).load("cpu")
