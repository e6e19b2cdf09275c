"""What a GPU makes of models of full size: seconds, memory, and whether the numbers repeat.

    python benchmarks/gpu.py            # needs a CUDA device; about four minutes on an H100
    python benchmarks/gpu.py --quick    # two rows of each model
    python benchmarks/gpu.py --small    # the same steps on small networks of the same classes, on
    any device

The networks have the published sizes of Stable Diffusion 1.5 and 3.5 medium and random weights:
time and memory do not depend on what weights say. A row is one policy setting; a rollout and an
update are rlalign's own, of one unit.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from full_size import stable_diffusion_3, stable_diffusion_15
from rich.console import Console
from rich.table import Table

from rlalign.algorithms.base import step_batch
from rlalign.core import registry
from rlalign.core.records import Plan, Scored, Unit, UnitKey
from rlalign.diffusion.rollout import rollout
from rlalign.learning.learner import Learner
from rlalign.learning.settings import LearnerSettings
from rlalign.policies.base import Policy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family with its plan and algorithm, and the policy settings that are compared."""

    title: str
    pipeline: Callable[[bool], Any]
    family: str
    plan: Plan
    algorithm: dict[str, Any]
    samples: int
    variants: tuple[dict[str, Any], ...]


LORA = {"lora_rank": 16}
NO_T5 = {"t5_tokens": 0}
"""CLIP's 77 word tokens alone, as in the tables of docs/performance.md."""
CASES = (
    Case(
        title="Stable Diffusion 1.5, 512 x 512, guidance 5",
        pipeline=stable_diffusion_15,
        family="stable_diffusion",
        plan=Plan(steps=4, guidance=5.0),
        algorithm={"name": "ddpo", "clip_range": 1e-4},
        samples=8,
        variants=(
            {**LORA},
            {**LORA, "precision": "tf32"},
            {**LORA, "precision": "bfloat16"},
            {**LORA, "precision": "bfloat16", "gradient_checkpointing": True},
            {"precision": "bfloat16"},
        ),
    ),
    Case(
        title="Stable Diffusion 3.5 medium, 512 x 512, guidance 4.5",
        pipeline=stable_diffusion_3,
        family="sd3",
        plan=Plan(steps=4, rule="flow_sde", eta=0.7, guidance=4.5),
        algorithm={"name": "grpo", "clip_range": 1e-4},
        samples=8,
        variants=(
            {**LORA, **NO_T5, "precision": "tf32"},
            {**LORA, **NO_T5, "precision": "bfloat16"},
            {**LORA, **NO_T5, "precision": "bfloat16", "gradient_checkpointing": True},
        ),
    ),
)


def main() -> None:
    small = "--small" in sys.argv[1:]
    if DEVICE == "cpu" and not small:
        print("gpu.py needs a CUDA device; --small tries the same steps on small networks")
        return
    console = Console(width=150)
    console.print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}"
    )
    for case in CASES:
        table = Table(title=case.title, title_justify="left")
        for column in (
            "policy",
            "rollout ms / sample and step",
            "decode ms / picture",
            "update ms / sample and step",
            "rollout GB",
            "update GB",
            "max |ratio - 1|",
            "an update repeats",
            "without the repeating kernels",
        ):
            table.add_column(column)
        for variant in case.variants[1:3] if "--quick" in sys.argv[1:] else case.variants:
            table.add_row(
                ", ".join(f"{n} {v}" for n, v in variant.items()), *measured(case, variant, small)
            )
            if DEVICE == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        console.print(table)


def measured(case: Case, settings: dict[str, Any], small: bool) -> Iterator[str]:
    """The columns of one row."""
    policy = loaded(case, settings, small)
    unit = Unit(
        key=UnitKey("train", 1, 0),
        prompts=("a red circle",) * case.samples,
        prompt_ids=(0,) * case.samples,
        sample_ids=tuple(range(case.samples)),
        seed=0,
        plan=case.plan,
    )
    trajectory, _ = rollout(policy, unit, 0)
    forget_peak()
    whole = median(lambda: rollout(policy, unit, 0))
    peak = peak_gb()
    clean = torch.from_numpy(np.array(trajectory.latents_BK1[:, -1])).to(DEVICE)
    with torch.no_grad():
        decode = median(lambda: policy.decode(clean))
    yield f"{(whole - decode) * 1e3 / case.samples / case.plan.steps:.2f}"
    yield f"{decode * 1e3 / case.samples:.1f}"

    reward_B = np.linspace(-1, 1, case.samples, dtype=np.float32)
    scored = Scored(
        unit=unit, policy_version=0, raw={"x": reward_B}, total_B=reward_B, trajectory=trajectory
    )
    batch = step_batch([scored], reward_B.astype(np.float64))
    algorithm: Any = registry.build("algorithms", case.algorithm)
    learner = Learner(policy, algorithm.loss, LearnerSettings(updates_per_round=1), seed=0)
    ratio = learner.update(batch, round=1)["ratio/first_update"]
    start = {n: t.clone() for n, t in learner.state_dict().items()}
    forget_peak()
    ends, seconds = [], []
    for _ in range(2):
        learner.load_state_dict(start)
        seconds.append(timed(lambda: learner.update(batch, round=2)))
        ends.append(policy.weights())
    per = 1e3 / case.samples / int(trajectory.stochastic_K.sum())
    yield f"{min(seconds) * per:.2f}"
    yield f"{peak:.1f}"
    yield f"{peak_gb():.1f}"
    yield f"{ratio:.1e}"
    yield same(ends)
    yield faster(learner, batch, start, per)


def faster(learner: Learner, batch: Any, start: dict[str, torch.Tensor], per: float) -> str:
    """Update time, and whether it repeats, with torch's default choice of kernels."""
    torch.use_deterministic_algorithms(False)
    ends, seconds = [], []
    for _ in range(3):
        learner.load_state_dict(start)
        seconds.append(timed(lambda: learner.update(batch, round=2)))
        ends.append(learner.policy.weights())
    return f"{min(seconds) * per:.2f} ms, {same(ends)}"


def same(ends: list[dict[str, torch.Tensor]]) -> str:
    """Whether all sets of weights are the first one, bit for bit."""
    off = max(float((one[n] - ends[0][n]).abs().max()) for one in ends[1:] for n in one)
    return "bitwise" if off == 0.0 else f"off by {off:.0e}"


def loaded(case: Case, settings: dict[str, Any], small: bool) -> Policy:
    """A live policy around a pipeline that was made here rather than read from a folder."""
    recipe: Any = registry.build("policies", {"name": case.family, "path": "made-here", **settings})
    with torch.device(DEVICE):
        pipeline = case.pipeline(small)
    return recipe.make_policy(recipe.family(recipe, pipeline, DEVICE))


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call, all kernels included."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median(work: Callable[[], Any]) -> float:
    """Median seconds of three calls."""
    return statistics.median(timed(work) for _ in range(3))


def forget_peak() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    """The most that was allocated since ``forget_peak``, GB of 10^9 bytes."""
    return torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0


if __name__ == "__main__":
    main()
