"""Pipeline folders with one field of one JSON file changed: plain diffusers' picture, or one
message.

Every case is made from the seed and its number. What is drawn is compared with diffusers' own
pipeline from the same noise, in grey levels of a picture of 16 x 16; a solver that rlalign says it
replaces is compared with diffusers' DDIM.
"""

from __future__ import annotations

import inspect
import json
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.alignment.models import find_model
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import UserError
from rlalign.diffusion.rollout import rollout
from rlalign.networks.pipelines.schedulers import SOLVERS
from tests.toy import save_flow_pipeline, save_pipeline

SEED = 16
STEPS = 4
PROMPTS = ("a red circle", "blue")
TOLERANCE = 0.1
"""Grey levels of 255, beside the half that rounding takes. Both sides compute in float32."""
NAMES = {"stable_diffusion": "StableDiffusionPipeline", "sd3": "StableDiffusion3Pipeline"}

ANY: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    0.5,
    1e-5,
    24,
    "",
    "word",
    [],
    [8, 8],
    [4, 6, 8],
    {},
    {"a": 1},
)
LIVELY: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction", "trigflow"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "trained_betas": ([0.01] * 1000, [0.5] * 1000, [0.02] * 7, [0.0] * 1000, [0.001] * 999 + [1.0]),
    "beta_start": (0.0, 0.0001, 0.5, 2.0, -0.1, float("nan")),
    "beta_end": (0.0, 0.02, 0.5, 1.0, 2.0),
    "num_train_timesteps": (1, 3, 100, 500, 999),
    "set_alpha_to_one": (True, False),
    "rescale_betas_zero_snr": (True,),
    "thresholding": (True,),
    "clip_sample": (True, "yes"),
    "sample_size": ([8, 8], [8, 12], [12, 8], 16, 4, 6, 7, 64),
    "shift": (0.5, 1.0, 3.0, 6.0, 0.0, -1.0, 1, True),
    "shift_factor": (0.0, 0.5, None),
    "scaling_factor": (1.0, 0.18215, -1.0, 0.0),
    "class_embed_type": ("timestep", "identity", "projection"),
    "addition_embed_type": ("text", "text_time", "image"),
    "num_class_embeds": (10,),
    "time_cond_proj_dim": (16,),
    "encoder_hid_dim_type": ("text_proj", "image_proj"),
    "in_channels": (9, 8, 5),
    "hidden_act": ("gelu", "quick_gelu", "silu", "nothing"),
    "act_fn": ("silu", "gelu", "relu", "swish"),
    "model_max_length": (8, 16, 17, 77, 10**30),
    "pad_token": ("a", "<|startoftext|>"),
    "padding_side": ("left", "right"),
    "_class_name": (
        "StableDiffusionPipeline",
        "StableDiffusion3Pipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelPipeline",
    ),
    "use_dynamic_shifting": (True,),
    "shift_terminal": (0.02,),
    "stochastic_sampling": (True,),
    "use_karras_sigmas": (True,),
    "norm_num_groups": (2, 8),
    "latents_mean": ([0.1, 0.2, 0.3, 0.4],),
    "use_attention_mask": (True, False),
    "center_input_sample": (True,),
    "flip_sin_to_cos": (False,),
    "freq_shift": (1,),
}
"""Values that mean something to the setting of this name."""
OTHER_SCHEDULERS = (
    *SOLVERS,
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "EDMEulerScheduler",
    "IPNDMScheduler",
    "CMStochasticIterativeScheduler",
    "CogVideoXDDIMScheduler",
    "UnCLIPScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "FlowMapEulerDiscreteScheduler",
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "stable_diffusion": save_pipeline(folder / "unet"),
        "sd3": save_flow_pipeline(folder / "flow"),
    }


def known_settings(config: dict[str, Any]) -> list[str]:
    """What the class of a part's config takes."""
    import diffusers

    kind = getattr(diffusers, str(config.get("_class_name")), None)
    return (
        [
            n
            for n in inspect.signature(kind.__init__).parameters
            if n not in ("self", "args", "kwargs")
        ]
        if kind
        else []
    )


def change(folder: Path, rng: random.Random) -> str:
    """Changes one field of one JSON file of a folder, and says which."""
    if rng.random() < 0.15:
        return change_scheduler(folder, rng.choice(OTHER_SCHEDULERS))
    files = sorted(folder.rglob("*.json"))
    weights = [3 if f.parent.name in ("scheduler", "unet", "transformer") else 1 for f in files]
    file = rng.choices(files, weights)[0]
    config = json.loads(file.read_text())
    names = {*config, *known_settings(config)}
    lively = names & set(LIVELY)
    key = rng.choice(sorted(lively if lively and rng.random() < 0.5 else names))
    if key in config and rng.random() < 0.15:
        del config[key]
        said = "removed"
    else:
        values = (
            LIVELY[key]
            if key in LIVELY and rng.random() < 0.7
            else (*ANY, *relatives(config.get(key)))
        )
        config[key] = rng.choice(values)
        said = repr(config[key])[:60]
    file.write_text(json.dumps(config))
    return f"{file.relative_to(folder)}: {key} {said}"


def relatives(value: Any) -> tuple[Any, ...]:
    """Values of the same type, near by."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return (value[:-1], [*value, value[-1]]) if isinstance(value, list) and value else ()
    return value + 1, value * 2, value / 2, value // 2, str(value)


def change_scheduler(folder: Path, kind: str) -> str:
    """Another scheduler class in the index, on the settings that are there."""
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, "scheduler": ["diffusers", kind]}))
    return f"scheduler {kind}"


def unit_of(plan: Plan) -> Unit:
    return Unit(
        key=UnitKey("train", 1, 0),
        prompts=PROMPTS,
        prompt_ids=(0, 1),
        sample_ids=(0, 0),
        seed=0,
        plan=plan,
    )


def plain_picture(family: str, folder: Path, start: torch.Tensor, t5_tokens: int) -> np.ndarray:
    """(B, 3, H, W) in grey levels 0..255 of diffusers' own pipeline, with DDIM in place of another
    solver."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    given: dict[str, Any] = {n: None for n, kind in index.items() if kind == [None, None]}
    pipeline = getattr(diffusers, NAMES[family]).from_pretrained(
        folder, dtype=torch.float32, **given
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.check_inputs = lambda *_, **__: (
        None
    )  # it wants sides in eights; what is compared is the picture
    more: dict[str, Any] = {"max_sequence_length": t5_tokens} if family == "sd3" else {"eta": 0.0}
    if family == "stable_diffusion":
        config = pipeline.scheduler.config
        if (
            type(pipeline.scheduler).__name__ in SOLVERS
            or config.get("timestep_spacing") == "linspace"
        ):
            pipeline.scheduler = from_grid_to_grid(pipeline.scheduler)
    pictures = pipeline(
        list(PROMPTS),
        latents=start.clone(),
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        output_type="np",
        **more,
    ).images
    return pictures.transpose(0, 3, 1, 2) * 255.0


def from_grid_to_grid(scheduler: Any) -> Any:
    """diffusers' DDIM on the noise levels and timesteps of another scheduler; every step ends at
    the next timestep."""
    from diffusers import DDIMScheduler

    class OnGrid(DDIMScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, **settings: Any) -> Any:
            later = [int(t) for t in self.timesteps if int(t) < int(timestep)]
            now = self.alphas_cumprod[int(timestep)]
            then = self.alphas_cumprod[later[0]] if later else self.final_alpha_cumprod
            kind = self.config.prediction_type
            noise, clean = model_output, (sample - (1 - now).sqrt() * model_output) / now.sqrt()
            if kind == "v_prediction":
                noise = now.sqrt() * model_output + (1 - now).sqrt() * sample
                clean = now.sqrt() * sample - (1 - now).sqrt() * model_output
            if kind == "sample":
                noise, clean = (sample - now.sqrt() * model_output) / (1 - now).sqrt(), model_output
            return (then.sqrt() * clean + (1 - then).sqrt() * noise,)

    names = inspect.signature(DDIMScheduler.__init__).parameters
    found = OnGrid(**{n: v for n, v in scheduler.config.items() if n in names})
    found.alphas_cumprod = scheduler.alphas_cumprod
    found.final_alpha_cumprod = (
        torch.tensor(1.0) if found.config.set_alpha_to_one else found.alphas_cumprod[0]
    )
    return found


def outcome(base: Path, family: str, folder: Path, number: int) -> tuple[str, str]:
    """(what was changed, "picture" | the message); raises AssertionError where it is neither right
    nor one message."""
    rng = random.Random(f"{SEED}/{number}")
    shutil.copytree(base, folder)
    said = f"case {number}, {family}: {change(folder, rng)}"
    rule = "flow_ode" if family == "sd3" else "ddim"
    plan, message = Plan(steps=STEPS, rule=rule, eta=0.0, guidance=3.0), ""
    try:
        policy = find_model(str(folder)).load("cpu")
        trajectory, media = rollout(policy, unit_of(plan), 0)
    except UserError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{said}: {type(error).__name__}: {error}") from error
    if message:
        assert "\n" not in message, f"{said}: more than one line: {message}"
        assert str(folder) in message or message.startswith("plan."), (
            f"{said}: a message without its place: {message}"
        )
        return said, message
    start = torch.from_numpy(trajectory.latents_BK1[:, 0])
    try:
        wanted = plain_picture(
            family, folder, start, getattr(policy, "t5_tokens", 0)
        )  # zero for a family without
    except Exception as error:
        raise AssertionError(
            f"{said}: drawn, where diffusers says {type(error).__name__}: {error}"
        ) from error
    assert media[:, 0].shape == wanted.shape, (
        f"{said}: {media[:, 0].shape}, where diffusers draws {wanted.shape}"
    )
    difference = np.abs(media[:, 0].astype(np.float64) - wanted).max()
    assert difference <= 0.5 + TOLERANCE, (
        f"{said}: {difference} grey levels from diffusers' picture"
    )
    return said, "picture"


def run_cases(bases: dict[str, Path], folder: Path, count: int) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count):
            family = ("stable_diffusion", "sd3")[number % 3 == 2]
            copy = folder / str(number)
            yield outcome(bases[family], family, copy, number)
            shutil.rmtree(copy)


@pytest.mark.slow
@pytest.mark.parametrize(
    "count", [40, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])], ids=str
)
def test_a_changed_folder_is_plain_diffusers_picture_or_one_message(
    bases: dict[str, Path], tmp_path: Path, count: int
) -> None:
    """Both happen often: a test of refusals alone, or of changes that matter to nothing, would say
    little."""
    found = list(run_cases(bases, tmp_path, count))
    drawn = sum(result == "picture" for _, result in found)
    assert count // 4 < drawn < count, f"{drawn} pictures in {count} cases"
