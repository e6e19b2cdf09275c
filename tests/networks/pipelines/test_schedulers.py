"""Which schedulers and settings are read, which are refused by name, and what is said."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import UserError
from rlalign.diffusion.paths import RectifiedFlow, StepsShift, Tokens, VariancePreserving
from rlalign.diffusion.rollout import rollout
from rlalign.networks.pipelines.schedulers import (
    COGVIDEOX,
    SOLVERS,
    check_variance_preserving,
    read_flow,
    read_variance_preserving,
    say_steps,
)
from rlalign.policies.stable_diffusion import StableDiffusion
from tests.toy import save_pipeline

TOKENS = Tokens(side=16, height=1024, width=1024)
ON_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim(**settings: Any) -> Any:
    return diffusers.DDIMScheduler(
        **{**LATENT, "clip_sample": False, "steps_offset": 1, **settings}
    )


def edit(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"thresholding": True}, "thresholding must be off .* got True"),
        ({"clip_sample": True}, "clip_sample must be off .* got True"),
        (
            {"prediction_type": "flow_prediction"},
            "prediction_type must be epsilon or v_prediction or sample, got 'flow_pred",
        ),
        (
            {"timestep_spacing": "even"},
            "timestep_spacing must be leading or trailing or linspace, got 'even'",
        ),
        (
            {"rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr needs prediction_type v_prediction .* got epsilon",
        ),
        (
            {"trained_betas": [0.01] * 7},
            "num_train_timesteps must be 7, the number of its betas, got 1000",
        ),
        ({"trained_betas": [0.9] * 1000}, r"leave no signal from timestep \d+ of 1000 on"),
        ({"trained_betas": [0.0] * 1000}, "leave no noise at the first timesteps"),
        ({"trained_betas": [float("nan")] * 1000}, r"betas must be numbers in \[0, 1\]"),
        ({"beta_start": 2.0, "beta_schedule": "linear"}, r"betas must be numbers in \[0, 1\]"),
    ],
    ids=str,
)
def test_what_would_be_misread_or_cannot_be_sampled_is_refused_by_name(
    settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(
        UserError,
        match=rf"policy\.path: cannot read 'here': scheduler/scheduler_config\.json: .*{said}",
    ):
        check_variance_preserving(ddim(**settings), "here")


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous"},
            "timestep_type must be 'discrete', got 'continuous'",
        ),
        ("EulerDiscreteScheduler", {"sigma_max": 5.0}, "sigma_max"),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "use_lu_lambdas"),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "lambda_min_clipped"),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("HeunDiscreteScheduler", {"clip_sample": True}, "clip_sample"),
        ("LCMScheduler", {}, "LCMScheduler"),
        ("TCDScheduler", {}, "TCDScheduler"),
        ("IPNDMScheduler", {}, "IPNDMScheduler"),
        ("EDMEulerScheduler", {}, "EDMEulerScheduler"),
        ("DDIMInverseScheduler", {}, "DDIMInverseScheduler"),
        ("CogVideoXDDIMScheduler", {}, "CogVideoXDDIMScheduler"),
        ("FlowMatchEulerDiscreteScheduler", {}, "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_other_levels_and_other_schedulers_are_refused_by_name(
    kind: str, settings: dict[str, Any], name: str
) -> None:
    with pytest.raises(UserError, match=name):
        check_variance_preserving(getattr(diffusers, kind)(**settings), "here")


@pytest.mark.parametrize("kind", COGVIDEOX)
def test_cogvideoxs_own_are_read_where_they_are_asked_for(kind: str) -> None:
    """With the shift of their signal, in float64 as they have it; not with samples clipped."""
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = getattr(diffusers, kind)(**settings, clip_sample=False, snr_shift_scale=3.0)
    check_variance_preserving(scheduler, "here", kinds=COGVIDEOX)
    path = read_variance_preserving(scheduler)
    assert torch.equal(path.alphas_cumprod, scheduler.alphas_cumprod)
    clipped = getattr(diffusers, kind)(**settings, clip_sample=True)
    with pytest.raises(UserError, match="clip_sample must be off"):
        check_variance_preserving(clipped, "here", kinds=COGVIDEOX)


@pytest.mark.parametrize(
    "kind", [k for k in SOLVERS if k != "DPMSolverSDEScheduler"]
)  # that one wants a package more
def test_every_solver_is_read_as_it_is_by_default(kind: str) -> None:
    clip = {"clip_sample": False} if kind.startswith("DDPM") else {}
    check_variance_preserving(getattr(diffusers, kind)(**LATENT, **clip), "here")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("FlowMatchLCMScheduler", {}),
        ("FlowMapEulerDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 1.0}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 0.0}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": -1.0}),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}),
        ("UniPCMultistepScheduler", {"flow_shift": 0.0, **ON_FLOW}),
        ("DPMSolverMultistepScheduler", {"thresholding": True, **ON_FLOW}),
        ("FlowMatchEulerDiscreteScheduler", {"max_shift": None, "use_dynamic_shifting": True}),
    ],
)
def test_what_samples_a_flow_otherwise_is_refused_by_name(
    kind: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=next(iter(settings), kind)):
        read_flow(getattr(diffusers, kind)(**settings), "here", TOKENS)


EULER = "FlowMatchEulerDiscreteScheduler"
DYNAMIC = {"use_dynamic_shifting": True}
LTX = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "shift_terminal": 0.1}
QWEN = {"max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
SQUARE = Plan(height=512, width=512)
CLIP = Plan(height=512, width=704, frames=161)


def line(n: int, low: float, high: float, base: int, top: int) -> float:
    """The mu that diffusers' pipelines compute (``calculate_shift``)."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    return calculate_shift(n, base, top, low, high)


@pytest.mark.parametrize("steps", [1, 2, 10, 28])
@pytest.mark.parametrize(
    ("kind", "settings", "tokens", "even", "plan", "mu"),
    [
        (EULER, {"shift": 3.0}, TOKENS, False, SQUARE, None),  # SD3, and Wan with Euler's
        (EULER, DYNAMIC, TOKENS, True, SQUARE, line(1024, 0.5, 1.15, 256, 4096)),  # FLUX.1-dev
        (EULER, DYNAMIC, TOKENS, True, Plan(), line(4096, 0.5, 1.15, 256, 4096)),
        (EULER, DYNAMIC, TOKENS, False, SQUARE, line(1024, 0.5, 1.15, 256, 4096)),  # SD3
        (EULER, {"shift": 1.0}, TOKENS, True, SQUARE, None),  # FLUX.1-schnell
        (EULER, DYNAMIC | QWEN, TOKENS, True, Plan(), line(4096, 0.5, 0.9, 256, 8192)),
        (EULER, {"shift": 3.0}, TOKENS, True, SQUARE, None),  # Z-Image-Turbo
        (EULER, {"shift": 7.0}, TOKENS, True, SQUARE, None),  # HunyuanVideo
        (
            EULER,
            DYNAMIC | LTX,
            Tokens(side=32, frames=8),
            True,
            CLIP,
            line(16 * 22 * 21, 0.95, 2.05, 1024, 4096),
        ),
        (EULER, DYNAMIC | {"time_shift_type": "linear"}, TOKENS, True, SQUARE, 0.63),
        ("UniPCMultistepScheduler", {"flow_shift": 5.0, **ON_FLOW}, TOKENS, False, SQUARE, None),
        (
            "DPMSolverMultistepScheduler",
            {"flow_shift": 3.0, **ON_FLOW},
            TOKENS,
            False,
            SQUARE,
            None,
        ),
    ],
)
def test_a_flow_grid_is_the_schedulers(
    kind: str,
    settings: dict[str, Any],
    tokens: Tokens,
    even: bool,
    plan: Plan,
    mu: float | None,
    steps: int,
) -> None:
    """The sigmas of every published grid, at a plan's resolution, within 1e-6 (diffusers keeps
    float32, and UniPC begins at 1 - 1e-6)."""
    if steps == 1 and "shift_terminal" in settings:
        pytest.skip("diffusers divides by zero there")
    theirs = getattr(diffusers, kind)(**settings)
    path = pickle.loads(pickle.dumps(read_flow(theirs, "here", tokens, even=even)))
    own = {"sigmas": np.linspace(1.0, 1.0 / steps, steps)} if even else {}
    theirs.set_timesteps(**own or {"num_inference_steps": steps}, **{"mu": mu} if mu else {})
    found = path.at(plan).levels(steps)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, theirs.sigmas.double(), rtol=0, atol=1.1e-6)
    torch.testing.assert_close(found[1:], theirs.sigmas[1:].double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [4, 28, 50])
@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_flux_2s_grid_is_its_pipelines(side: int, steps: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = compute_empirical_mu((side // 16) ** 2, steps)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), mu=mu)
    read = read_flow(theirs, "here", TOKENS, even=True)
    path = replace(read, moving=StepsShift(tokens=TOKENS))
    found = path.at(Plan(steps=steps, height=side, width=side)).levels(steps)
    torch.testing.assert_close(found, theirs.sigmas.double(), rtol=0, atol=1e-6)


def test_random_levels_follow_the_plans_shift() -> None:
    """Uniform in the flow's time, then moved as the levels of that resolution are: by exp(mu)."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    path = read_flow(theirs, "here", TOKENS, even=True)
    uniform_B = np.linspace(0.01, 0.99, 9)
    for plan, n in ((SQUARE, 1024), (Plan(), 4096)):
        mu = line(n, 0.5, 1.15, 256, 4096)
        wanted = theirs.time_shift(mu, 1.0, torch.from_numpy(uniform_B))
        found = path.at(plan).random_levels(uniform_B)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    with pytest.raises(AssertionError, match="ask path.at"):
        path.levels(4)


def test_numbers_of_what_is_switched_off_are_no_matter() -> None:
    check_variance_preserving(
        ddim(sample_max_value=7.0, clip_sample_range=3.0, dynamic_thresholding_ratio=0.5), "here"
    )
    flow = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, base_shift=0.1, max_shift=9.0, shift_terminal=None
    )
    assert read_flow(flow, "here", TOKENS) == RectifiedFlow(shift=3.0)


@pytest.mark.parametrize(
    ("schedule", "spacing", "offset", "to_one"),
    [
        ("linear", "leading", 0, True),
        ("scaled_linear", "leading", 1, False),
        ("scaled_linear", "trailing", 1, True),
        ("squaredcos_cap_v2", "trailing", 0, False),
    ],
)
def test_the_grid_is_ddims(
    tmp_path: Path, schedule: str, spacing: str, offset: int, to_one: bool
) -> None:
    """Timesteps, alphas and the end, as the DDIM of the loaded pipeline has them (which sets an
    offset of 0 to 1)."""
    folder = save_pipeline(tmp_path / "pipeline")
    settings = {"beta_schedule": schedule, "timestep_spacing": spacing, "set_alpha_to_one": to_one}
    edit(folder / "scheduler" / "scheduler_config.json", steps_offset=offset, **settings)
    path = StableDiffusion(path=str(folder)).load("cpu").path
    assert isinstance(path, VariancePreserving)
    plain = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).scheduler
    plain.set_timesteps(10)
    levels = path.levels(10)
    assert levels[:-1].tolist() == plain.timesteps.tolist()
    assert torch.equal(
        path.alpha(levels[:-1]) ** 2, plain.alphas_cumprod[plain.timesteps].double().sqrt() ** 2
    )
    assert float(path.alpha(levels[-1]) ** 2) == pytest.approx(
        float(plain.final_alpha_cumprod), abs=1e-12
    )


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr_is_sampled_as_diffusers_does(tmp_path: Path, prediction: str) -> None:
    """Trailing spacing, ten steps from pure noise: the pictures of diffusers' pipeline within a
    tenth of a grey level."""
    folder = save_pipeline(tmp_path / "pipeline", prediction=prediction)
    edit(
        folder / "scheduler" / "scheduler_config.json",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    policy = StableDiffusion(path=str(folder)).load("cpu")
    prompts = ("a red circle", "blue")
    unit = Unit(
        key=UnitKey("train", 1, 0),
        prompts=prompts,
        prompt_ids=(0, 1),
        sample_ids=(0, 0),
        seed=0,
        plan=Plan(steps=10, eta=0.0, guidance=3.0),
    )
    trajectory, media = rollout(policy, unit, 0)
    assert np.isfinite(trajectory.latents_BK1).all()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.from_numpy(trajectory.latents_BK1[:, 0])
    assert float(pipeline.scheduler.alphas_cumprod[-1]) == 0.0
    found = pipeline(
        list(prompts), latents=start, num_inference_steps=10, guidance_scale=3.0, output_type="np"
    ).images
    assert (
        np.abs(media[:, 0].astype(np.float64) - found.transpose(0, 3, 1, 2) * 255.0).max()
        < 0.5 + 0.1
    )


@pytest.mark.parametrize(
    ("kind", "spacing", "said"),
    [
        ("DDIMScheduler", "leading", ""),
        (
            "DDIMScheduler",
            "linspace",
            "rlalign steps from each timestep of the linspace grid to the next",
        ),
        ("DDIMScheduler", "trailing", "if plan.steps does not divide num_train_timesteps"),
        (
            "PNDMScheduler",
            "leading",
            "its scheduler is PNDMScheduler; rlalign steps by plan.rule instead",
        ),
        ("EulerDiscreteScheduler", "linspace", "its scheduler is EulerDiscreteScheduler"),
    ],
)
def test_a_solver_that_is_replaced_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, spacing: str, said: str
) -> None:
    """On stderr, once in a process, from two JSON files alone; loading says the same line."""
    folder = save_pipeline(tmp_path / "pipeline")
    edit(folder / "model_index.json", scheduler=["diffusers", kind])
    edit(folder / "scheduler" / "scheduler_config.json", timestep_spacing=spacing)
    capsys.readouterr()
    recipe = StableDiffusion(path=str(folder))
    recipe.announce()
    say_steps(str(folder))
    first = capsys.readouterr().err
    recipe.load("cpu")
    assert capsys.readouterr().err == ""
    assert first.count("\n") == (1 if said else 0)
    assert said in first
    assert str(folder) in first or not said
