"""Which schedulers a policy reads, and what it reads of their settings.

Of a scheduler a policy takes the noise levels and what the network predicts; how a step is made is
the plan's rule. So a solver's own way of stepping is replaced, and that is said; a setting that
moves the levels, clips what the network says or changes what that means is refused by name.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from rlalign.core.registry import UserError
from rlalign.diffusion.paths import LineShift, RectifiedFlow, Tokens, VariancePreserving
from rlalign.diffusion.predictions import PredictionType

FILE = "scheduler/scheduler_config.json"
STEPS_AS_RLALIGN = ("DDIMScheduler", "DDIMParallelScheduler")
"""Schedulers whose step is the rule ddim."""
SOLVERS = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers that step otherwise on the same noise levels, for the same networks."""
COGVIDEOX = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
"""CogVideoX's own: the first steps as the rule ddim does, the second is a solver."""
FLOWS = (
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
)
"""Schedulers of flow models; the last two only on flow levels."""
FLOW_READ = frozenset(
    {"shift", "flow_shift", "use_flow_sigmas", "use_dynamic_shifting", "shift_terminal"}
)
"""What a policy on the flow path reads, beside the line of a dynamic shift."""
READ = frozenset(
    {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
        "set_alpha_to_one",
        "snr_shift_scale",
        "steps_offset",
        "prediction_type",
        "timestep_spacing",
        "variance_type",
    }
)
"""What a policy on the variance-preserving path reads."""
REPLACED = frozenset(
    {
        "algorithm_type",
        "corrector_order",
        "disable_corrector",
        "euler_at_final",
        "interpolation_type",
        "lower_order_final",
        "noise_sampler_seed",
        "predict_x0",
        "predictor_order",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "tau_func",
    }
)
"""How a solver steps, for which the plan's rule stands in."""
IDLE = frozenset(
    {
        "base_image_seq_len",
        "base_shift",
        "clip_sample_range",
        "dynamic_thresholding_ratio",
        "flow_shift",
        "max_image_seq_len",
        "max_shift",
        "sample_max_value",
        "time_shift_type",
    }
)
"""Numbers of settings that are switched off."""
OFF = frozenset({"clip_sample"})
"""Switches whose default is on, and which must be off."""
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = tuple(kind for kind in get_args(PredictionType) if kind != "flow")


def check_variance_preserving(
    scheduler: Any, path: str, *, kinds: Sequence[str] = STEPS_AS_RLALIGN + SOLVERS
) -> None:
    """Refuses a scheduler of other classes than ``kinds``, of other noise levels than theirs, or
    that cannot be sampled."""
    kind = type(scheduler).__name__
    config = scheduler.config
    if kind not in kinds:
        raise _refusal(
            path,
            f"the scheduler must be one of {', '.join(kinds)}, got {kind}, which samples otherwise",
        )
    _check_settings(scheduler, path, READ | REPLACED)

    # what the network predicts, and at which timesteps
    if config.prediction_type not in PREDICTIONS:
        raise _refusal(
            path,
            f"prediction_type must be {' or '.join(PREDICTIONS)}, got {config.prediction_type!r}",
        )
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in SPACINGS:
        raise _refusal(path, f"timestep_spacing must be {' or '.join(SPACINGS)}, got {spacing!r}")
    if not isinstance(config.get("steps_offset", 1), int):
        raise _refusal(path, f"steps_offset must be a whole number, got {config.steps_offset!r}")
    _check_table(scheduler, path)


def read_variance_preserving(
    scheduler: Any, *, ends_clean: bool | None = None, beyond: int = 0
) -> VariancePreserving:
    """The path of a scheduler that ``check_variance_preserving`` has let through. ``ends_clean``
    None is what its ``set_alpha_to_one`` says; ``beyond`` 1 is DPM-Solver's own "linspace"."""
    config = scheduler.config
    if ends_clean is None:
        ends_clean = bool(config.get("set_alpha_to_one", True))
    return VariancePreserving(
        scheduler.alphas_cumprod,
        spacing=config.get("timestep_spacing", "leading"),
        offset=config.get("steps_offset", 1),
        beyond=beyond,
        ends_clean=ends_clean,
        variance_type=config.get("variance_type") or "fixed_small",
    )


def _check_table(scheduler: Any, path: str) -> None:
    """Refuses cumulative alphas without noise, or without a signal where the prediction needs
    one."""
    # the noise levels must be complete and in their range
    config = scheduler.config
    table = torch.as_tensor(scheduler.alphas_cumprod)
    if len(table) != config.num_train_timesteps or not len(table):
        raise _refusal(
            path,
            f"num_train_timesteps must be {len(table)}, the number of its betas, got"
            f" {config.num_train_timesteps}",
        )
    if not bool(((table >= 0.0) & (table <= 1.0)).all()):
        raise _refusal(
            path, "its betas must be numbers in [0, 1], or the noise levels are not numbers"
        )

    # only the last timestep may be without signal
    if bool((table[:-1] == 0.0).any()):
        first = int((table == 0.0).nonzero()[0])
        raise _refusal(
            path,
            f"its betas leave no signal from timestep {first} of {len(table)} on"
            " (alphas_cumprod 0)",
        )

    # timestep 0 is where sampling ends; only the linspace grid asks the network there
    clear = table[0 if config.get("timestep_spacing") == "linspace" else 1 :] == 1.0
    if bool(clear.any()):
        raise _refusal(path, "its betas leave no noise at the first timesteps (alphas_cumprod 1)")

    # a network that predicts noise says nothing there
    without_signal = bool(table[-1] == 0.0) or bool(config.get("rescale_betas_zero_snr"))
    if without_signal and config.prediction_type == "epsilon":
        raise _refusal(
            path,
            "rescale_betas_zero_snr needs prediction_type v_prediction or sample, got epsilon: at"
            " zero terminal SNR the noise says nothing of the picture, and sampling divides by zero"
            " (not finite, NaN)",
        )


def read_flow(scheduler: Any, path: str, tokens: Tokens, *, even: bool = False) -> RectifiedFlow:
    """The path of a flow scheduler: FlowMatchEuler, or UniPC or DPM-Solver on flow levels.

    ``tokens`` counts what the denoiser sees, for a shift that depends on it; ``even`` says that the
    pipeline hands FlowMatchEuler K even levels of its own, as FLUX's does. Raises UserError for
    other schedulers, and for settings that move the levels otherwise.

    UniPC and DPM-Solver tell the denoiser their timesteps cut to whole numbers, and UniPC begins
    1e-6 below pure noise, where its own step has a division by zero; here both are exact.
    """
    kind = type(scheduler).__name__
    config = scheduler.config
    if kind not in FLOWS:
        raise _refusal(
            path, f"the scheduler must be {' or '.join(FLOWS)}, got {kind}, which samples otherwise"
        )
    solver = kind != "FlowMatchEulerDiscreteScheduler"
    if solver:
        _check_flow_solver(scheduler, path)
    else:
        _check_settings(scheduler, path, FLOW_READ | {"num_train_timesteps"})

    # the numbers of the one formula
    steps = config.num_train_timesteps
    shift = config.flow_shift if solver else config.shift
    terminal = config.get("shift_terminal") or 0.0
    if not isinstance(steps, int) or steps < 2:
        raise _refusal(path, f"num_train_timesteps must be a whole number >= 2, got {steps!r}")
    if not isinstance(shift, int | float) or not 0.0 < shift < math.inf:
        name = "flow_shift" if solver else "shift"
        raise _refusal(path, f"{name} must be a number > 0, got {shift!r}")
    if not isinstance(terminal, int | float) or not 0.0 <= terminal < 1.0:
        raise _refusal(path, f"shift_terminal must be a number in [0, 1), got {terminal!r}")

    # where the levels lie before they are shifted, and what the shift follows
    moving = _moving(config, tokens, path) if config.get("use_dynamic_shifting") else None
    first, last, beyond = _grid(kind, steps, even=even, fixed=moving is None)
    return RectifiedFlow(
        shift=shift,
        train_steps=steps,
        first=first,
        last=last,
        beyond=beyond,
        terminal=terminal,
        moving=moving,
    )


def _check_flow_solver(scheduler: Any, path: str) -> None:
    """Refuses a solver of both paths that is not on flow levels."""
    _check_settings(scheduler, path, FLOW_READ | READ | REPLACED)
    config = scheduler.config
    if not config.use_flow_sigmas or config.prediction_type != "flow_prediction":
        raise _refusal(
            path,
            "use_flow_sigmas must be true and prediction_type flow_prediction, got"
            f" {config.use_flow_sigmas!r} and {config.prediction_type!r}",
        )


def _grid(kind: str, steps: int, *, even: bool, fixed: bool) -> tuple[float, float | None, int]:
    """First and last of the levels before they are shifted, and how many of them are left out."""
    lowest = 1.0 / steps
    if kind == "DPMSolverMultistepScheduler":
        return 1.0 - lowest, 0.0, 1
    if kind == "UniPCMultistepScheduler":
        return (1.0, 0.0, 1) if even else (1.0, lowest, 1)
    if even:
        return 1.0, 0.0, 1
    return 1.0, None if fixed else lowest, 0


def _moving(config: Any, tokens: Tokens, path: str) -> LineShift:
    """The line of a dynamic shift; UniPC's config may leave its numbers out, as pipelines do."""
    numbers = {
        "base_shift": config.get("base_shift", 0.5),
        "max_shift": config.get("max_shift", 1.15),
        "base_tokens": config.get("base_image_seq_len", 256),
        "max_tokens": config.get("max_image_seq_len", 4096),
    }
    kind = config.get("time_shift_type", "exponential")
    finite = all(isinstance(n, int | float) and math.isfinite(n) for n in numbers.values())
    if not finite or numbers["base_tokens"] == numbers["max_tokens"]:
        raise _refusal(
            path,
            "base_shift, max_shift and two different base_image_seq_len and max_image_seq_len must"
            f" be numbers, got {', '.join(str(n) for n in numbers.values())}",
        )
    return LineShift(tokens=tokens, exponential=kind == "exponential", **numbers)


def _check_settings(scheduler: Any, path: str, read: Collection[str]) -> None:
    """Refuses a setting that is neither read nor idle, unless it is off, or as its class has it."""
    for name, parameter in inspect.signature(type(scheduler).__init__).parameters.items():
        if name in ("self", "args", "kwargs") or name in read or name in IDLE:
            continue
        value = scheduler.config.get(name, parameter.default)
        if name in OFF or not parameter.default:
            if value:
                raise _refusal(path, f"{name} must be off (false or null), got {value!r}")
        elif value != parameter.default:
            raise _refusal(path, f"{name} must be {parameter.default!r}, got {value!r}")


def _refusal(path: str, rule: str) -> UserError:
    return UserError(
        f"policy.path: cannot read {path!r}: {FILE}: {rule}; change it in a copy of the folder, or"
        " name another"
    )


def say_steps(path: str, folder: Path | None = None) -> None:
    """Says in one line on stderr where rlalign steps otherwise than a folder's own scheduler.

    Once in a process. Reads two JSON files and loads nothing, so that a command can say it before
    its workers load. ``path`` is what the user wrote; ``folder`` is where that lies, if elsewhere.
    """
    place = folder or Path(path)
    try:
        kind = json.loads((place / "model_index.json").read_text(encoding="utf-8"))["scheduler"][1]
        config = json.loads((place / FILE).read_text(encoding="utf-8"))
        spacing = config.get("timestep_spacing", "leading")
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return  # what is wrong with them, loading says

    # rlalign takes steps of its own
    if kind in (*SOLVERS, COGVIDEOX[1]):
        _say(
            f"note: {path}: its scheduler is {kind}; rlalign steps by plan.rule instead, on its"
            " noise levels"
        )
    elif kind in (*STEPS_AS_RLALIGN, COGVIDEOX[0]) and spacing in ("linspace", "trailing"):
        when = " if plan.steps does not divide num_train_timesteps" if spacing == "trailing" else ""
        _say(
            f"note: {path}: rlalign steps from each timestep of the {spacing} grid to the next,"
            f" where {kind} lands beside it{when}"
        )


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
