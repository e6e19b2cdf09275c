"""What torch.compile and channels-last make of SDXL, Stable Diffusion 3.5 medium and Stable
Diffusion 1.5 at their published sizes: milliseconds, memory, the share of the card, and the ratio.

    python benchmarks/gpu_kernels.py          # needs a CUDA device; under ten minutes on an H200
    python benchmarks/gpu_kernels.py --small  # the same steps on small models, on any device; the
    CPU compiles nothing

Models are written by rlalign's random models and read back as a user's would be. A share is the
arithmetic of the denoiser's calls (counted by torch) over what a large bfloat16 matrix product
reaches on the same card in the same process, so that it needs no data sheet.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import DEVICE, forget_peak, median, peak_gb, timed
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

import rlalign
from rlalign.algorithms.base import step_batch
from rlalign.core import registry
from rlalign.core.records import Plan, Scored, Unit, UnitKey
from rlalign.diffusion.rollout import rollout
from rlalign.learning.learner import Learner
from rlalign.learning.settings import LearnerSettings
from rlalign.networks.random_models import find_family
from rlalign.networks.random_models.folder import write_pipeline
from rlalign.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with its plan."""

    title: str
    family: str
    """Of the random models."""
    plan: Plan
    samples: int
    settings: Mapping[str, Any]


LORA = {"lora_rank": 16, "precision": "bfloat16"}
CASES = (
    Case(
        title="SDXL, 1024 x 1024, guidance 5",
        family="sdxl",
        plan=Plan(steps=4, guidance=5.0, height=1024, width=1024),
        samples=4,
        settings={**LORA, "decode_rows": 1},
    ),
    Case(
        title="Stable Diffusion 3.5 medium, 512 x 512, guidance 4.5",
        family="sd35",
        plan=Plan(steps=4, rule="flow_sde", eta=0.7, guidance=4.5, height=512, width=512),
        samples=8,
        settings={**LORA, "t5_tokens": 0},
    ),
    Case(
        title="Stable Diffusion 1.5, 512 x 512, guidance 5",
        family="sd15",
        plan=Plan(steps=4, guidance=5.0, height=512, width=512),
        samples=8,
        settings=LORA,
    ),
)
KERNELS = ((), ("channels last",), ("compiled",), ("channels last", "compiled"))


def main() -> None:
    small = "--small" in sys.argv[1:]
    if DEVICE == "cpu" and not small:
        print("gpu_kernels.py needs a CUDA device; --small takes the same steps on small models")
        return
    console = Console(width=150)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    peak = matmul_flops(256 if small else 8192)
    console.print(f"torch {torch.__version__}, {name}: a matrix product {peak / 1e12:.1f} TFLOP/s")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            size = "tiny" if small else "published"
            write_pipeline(Path(folder), find_family(case.family), size)
            console.print(compare(case, folder, peak, small))


def compare(case: Case, folder: str, peak: float, small: bool) -> Table:
    """A row for each choice of kernels."""
    table = Table(title=case.title, title_justify="left")
    for column in (
        "kernels",
        "first rollout s",
        "rollout ms / sample and step",
        "share of a matrix product",
        "update ms / sample and step",
        "rollout GB",
        "update GB",
        "max |ratio - 1|",
    ):
        table.add_column(column)
    for kernels in KERNELS if DEVICE == "cuda" else KERNELS[:2]:
        table.add_row(
            " and ".join(kernels) or "as they are", *measure(case, folder, kernels, peak, small)
        )
        torch.compiler.reset()
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return table


def measure(
    case: Case, folder: str, kernels: Sequence[str], peak: float, small: bool
) -> Iterator[str]:
    """The columns of one row."""
    settings = {**case.settings, **({} if DEVICE == "cuda" else {"precision": "float32"})}
    policy = rlalign.load_policy(folder, device=DEVICE, **settings)
    plan = Plan(steps=4, rule=case.plan.rule, eta=case.plan.eta, guidance=case.plan.guidance)
    unit = unit_of(plan if small else case.plan, 2 if small else case.samples)
    flops = count_flops(policy, unit)
    if "channels last" in kernels:
        policy.network.to(memory_format=torch.channels_last)
    if "compiled" in kernels:
        policy.network.compile()

    # a rollout without its decoding
    yield f"{timed(lambda: rollout(policy, unit, 0)):.1f}"
    forget_peak()
    whole = median(lambda: rollout(policy, unit, 0))
    held = peak_gb()
    trajectory, _ = rollout(policy, unit, 0)
    clean = torch.from_numpy(np.array(trajectory.latents_BK1[:, -1])).to(DEVICE)
    with torch.no_grad():
        seconds = whole - median(lambda: policy.decode(clean))
    count = len(unit.prompts) * unit.plan.steps
    yield f"{seconds * 1e3 / count:.2f}"
    yield f"{flops * unit.plan.steps / seconds / peak:.2f}"

    # an update, the first of which compiles
    learner, batch = learner_of(policy, unit, trajectory)
    ratio = learner.update(batch, round=1)["ratio/first_update"]
    forget_peak()
    update = median(lambda: learner.update(batch, round=2))
    yield f"{update * 1e3 / len(unit.prompts) / int(trajectory.stochastic_K.sum()):.2f}"
    yield f"{held:.1f}"
    yield f"{peak_gb():.1f}"
    yield f"{ratio:.1e}"


def unit_of(plan: Plan, samples: int) -> Unit:
    """A unit of one prompt."""
    return Unit(
        key=UnitKey("train", 1, 0),
        prompts=("a red circle",) * samples,
        prompt_ids=(0,) * samples,
        sample_ids=tuple(range(samples)),
        seed=0,
        plan=plan,
    )


def learner_of(policy: Policy, unit: Unit, trajectory: Any) -> tuple[Learner, Any]:
    """A learner of DDPO's loss, and the unit's steps as its batch."""
    reward_B = np.linspace(-1, 1, len(unit.prompts), dtype=np.float32)
    scored = Scored(
        unit=unit, policy_version=0, raw={"x": reward_B}, total_B=reward_B, trajectory=trajectory
    )
    algorithm: Any = registry.build("algorithms", {"name": "ddpo", "clip_range": 1e-4})
    learner = Learner(policy, algorithm.loss, LearnerSettings(updates_per_round=1), seed=0)
    return learner, step_batch([scored], reward_B.astype(np.float64))


def count_flops(policy: Policy, unit: Unit) -> float:
    """Floating point operations of one denoising step of a unit, guidance included."""
    x = torch.zeros(len(unit.prompts), *policy.latent_shape(unit.plan), device=DEVICE)
    condition = policy.encode(unit.prompts, unit.plan)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        policy.denoise(x, torch.tensor(0.5), condition, unit.plan.guidance)
    return float(counter.get_total_flops())


def matmul_flops(side: int) -> float:
    """Operations a second of a square bfloat16 matrix product."""
    a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    timed(lambda: a @ a)
    return 2 * side**3 / median(lambda: a @ a)


if __name__ == "__main__":
    main()
