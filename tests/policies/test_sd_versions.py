"""Stable Diffusion 1.5 and 2.1 under the acceptance test: noise and v-prediction, and no signal at
the last timestep."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.stable_diffusion import StableDiffusion
from tests.policies.acceptance import Acceptance, Case

pytestmark = pytest.mark.promise  # the default tests have one small UNet

# in each of four transformer blocks two attentions of four layers
LAYERS = 4 * 2 * 4


def call(guidance: float) -> Mapping[str, Any]:
    return {"guidance_scale": guidance}


def take_ddim(pipeline: Any) -> None:
    """The deterministic sampler of one step, in place of a solver of several."""
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)


def version_1(folder: Path) -> Case:
    """PNDM's scheduler, as the published folder has it."""
    write_pipeline(folder, FAMILIES["stable_diffusion"], seed=1)
    recipe = StableDiffusion(path=str(folder))
    return Case(recipe=recipe, adapted=LAYERS, call=call, prepare=take_ddim)


def version_2(folder: Path) -> Case:
    """v-prediction at zero terminal SNR with trailing spacing (Lin 2023, arXiv:2305.08891)."""
    write_pipeline(folder, FAMILIES["stable_diffusion_2"], seed=1)
    file = folder / "scheduler" / "scheduler_config.json"
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return Case(recipe=StableDiffusion(path=str(folder)), adapted=LAYERS, call=call)


CASES: dict[str, Callable[[Path], Case]] = {"1.5": version_1, "2.1": version_2}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return CASES[request.param](tmp_path_factory.mktemp("pipeline"))


class TestAcceptance(Acceptance):
    """Each case is taken by diffusers as by rlalign."""
