"""PixArt against diffusers' own pipelines, on small ones of random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.cli.evaluate import find_model
from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.networks import lora
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.pixart import PixArt
from tests.policies.acceptance import Acceptance, Case, asked, open_plain, predicted
from tests.policies.family_runs import PATHS, run_of, train_two_rounds
from tests.runs import quiet

pytestmark = pytest.mark.promise  # the default tests have Qwen-Image, with a mask too

TEXT_TOKENS = 20
CALL = {
    "use_resolution_binning": False,
    "clean_caption": False,
    "max_sequence_length": TEXT_TOKENS,
}


def step_once(pipeline: Any) -> None:
    """The shipped solver at order one, where its step is DDIM's, on its own timesteps."""
    kind = type(pipeline.scheduler)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, solver_order=1)


def case_of(folder: Path) -> Case:
    return Case(
        recipe=PixArt(path=str(folder), text_tokens=TEXT_TOKENS),
        adapted=16,
        call=lambda w: {"guidance_scale": w, **CALL},
        prepare=step_once,
        loads_adapters=False,
    )


def sigma(folder: Path) -> Case:
    write_pipeline(folder, FAMILIES["pixart"])
    return case_of(folder)


def alpha(folder: Path) -> Case:
    """At 1024 pixels Alpha is told the picture's size."""
    family = FAMILIES["pixart"]
    transformer = family.networks["transformer"]
    told = transformer.vary(
        same={"use_additional_conditions": True},
        # a third of the width is for each number of the size
        tiny={"sample_size": 128, "num_attention_heads": 3, "cross_attention_dim": 24},
    )
    networks = {**family.networks, "transformer": told}
    write_pipeline(folder, replace(family, pipeline="PixArtAlphaPipeline", networks=networks))
    return case_of(folder)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return sigma(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def alpha_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return alpha(tmp_path_factory.mktemp("pipeline"))


class TestAcceptance(Acceptance):
    """Of Sigma."""


@pytest.mark.parametrize("size", [0, 1], ids=["first size", "second size"])
def test_alpha_draws_what_its_pipeline_draws(alpha_case: Case, size: int) -> None:
    """Told the size of each; in all else it is Sigma."""
    assert alpha_case.pipeline.transformer.use_additional_conditions
    Acceptance().test_it_draws_what_the_pipeline_draws(alpha_case, size, guided=True)


def test_the_width_of_the_words_is_the_calls(case: Case, alpha_case: Case) -> None:
    for one, wanted in ((case, 300), (alpha_case, 120)):
        assert one.varied(text_tokens=None).encode(["a"]).caption["embeds_BLD"].shape[1] == wanted


def test_the_learned_variance_is_left_out(case: Case) -> None:
    """The answer has the latents' channels, of the transformer's twice as many."""
    assert case.pipeline.transformer.config.out_channels == 8
    x, timestep_B, words = asked(case.policy, case)
    with torch.no_grad():
        assert case.policy.family.predict(x, timestep_B, words).shape == x.shape


def test_levels_are_the_shipped_solvers(case: Case) -> None:
    scheduler = case.pipeline.scheduler
    for steps in (1, 4, 20):
        scheduler.set_timesteps(steps)
        path = case.policy.path
        level = path.at(Plan(steps=steps)).levels(steps)
        assert path.timestep(level[:-1]).tolist() == scheduler.timesteps.tolist()
        ratio = scheduler.sigmas.to(torch.float64)  # of noise to signal
        found = path.sigma(level) / path.alpha(level)
        torch.testing.assert_close(found, ratio, rtol=1e-5, atol=1e-6)


def test_an_adapter_is_saved_merged(case: Case, tmp_path: Path) -> None:
    """As a pipeline folder, which says what the policy says; training goes on with the adapter."""
    policy = case.trained()
    policy.save(tmp_path)
    assert lora.is_attached(policy.network)
    assert not (tmp_path / lora.FILE).exists()
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == type(case.pipeline).__name__
    said = predicted(policy, policy.network, case)
    found = predicted(policy, open_plain(tmp_path).transformer, case)
    bound = 5e-6 * max(1.0, said.abs().max().item())
    torch.testing.assert_close(found, said, rtol=0, atol=bound)


def test_an_adapter_to_start_from_is_refused(case: Case) -> None:
    with pytest.raises(UserError, match=r"policy\.adapter must be empty for pixart"):
        case.varied(adapter="somewhere")


def test_a_run_writes_a_pipeline_and_is_taken_up_with_its_adapter(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlalign.report.write_report", quiet)
    policy = {"name": "pixart", "path": case.recipe.path, "text_tokens": TEXT_TOKENS}
    train_two_rounds(run_of(policy, PATHS["epsilon"], {"name": "ddpo"}), tmp_path)
    again = find_model(str(tmp_path)).load("cpu")
    assert lora.is_attached(again.network)
    said = predicted(again, again.network, case)
    found = predicted(again, open_plain(tmp_path / "policy").transformer, case)
    torch.testing.assert_close(found, said, rtol=0, atol=5e-6)
