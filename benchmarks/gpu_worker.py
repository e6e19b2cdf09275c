"""What keeps a card busy: compiled blocks and channels-last memory, the share of the card's own
matrix product that rollouts and updates reach, and a Ray worker whose units overlap or do not.

    python benchmarks/gpu_worker.py [minutes]     # needs a CUDA device; 10 minutes unless told
    python benchmarks/gpu_worker.py --small       # the same steps on small networks, any device

Networks have the published sizes of Stable Diffusion 1.5, XL and 3.5 medium and random weights. A
row is printed when it is there; what no longer fits the minutes is named and left out. FLOP are
those that torch counts of an uncompiled pass; the bound is one large matrix product in the same
precision on the same device.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gpu
import numpy as np
import torch
from full_size import stable_diffusion_3, stable_diffusion_15, stable_diffusion_xl
from gpu import DEVICE, LORA, NO_T5, Case, loaded, median, timed
from torch.utils.flop_counter import FlopCounterMode

from rlalign.algorithms.base import step_batch
from rlalign.core import registry
from rlalign.core.records import Plan, Scored, Unit, UnitKey
from rlalign.diffusion.rollout import rollout
from rlalign.learning.learner import Learner
from rlalign.learning.settings import LearnerSettings

NARROW = {**LORA, "precision": "bfloat16", "gradient_checkpointing": True}
UNET = ({**NARROW}, {**NARROW, "compile": True}, {**NARROW, "compile": True, "channels_last": True})
CASES = (
    replace(gpu.CASES[0], pipeline=stable_diffusion_15, variants=UNET),
    Case(
        title="Stable Diffusion XL, 1024 x 1024, guidance 5",
        pipeline=stable_diffusion_xl,
        family="sdxl",
        plan=Plan(steps=4, guidance=5.0),
        algorithm={"name": "ddpo", "clip_range": 1e-4},
        samples=4,
        variants=UNET,
    ),
    replace(
        gpu.CASES[1],
        pipeline=stable_diffusion_3,
        variants=({**NARROW, **NO_T5}, {**NARROW, **NO_T5, "compile": True}),
    ),
)
UNITS = 6
"""Of the Ray worker, in each order."""


@dataclass(kw_only=True)
class Clock:
    """The minutes that are left."""

    ends: float

    def allows(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self.ends


def main() -> None:
    small = "--small" in sys.argv[1:]
    if DEVICE == "cpu" and not small:
        print("gpu_worker.py needs a CUDA device; --small tries the same steps on small networks")
        return
    numbers = [one for one in sys.argv[1:] if not one.startswith("-")]
    clock = Clock(ends=time.monotonic() + 60 * float(numbers[0] if numbers else 10))
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {card}")
    bound = matrix_product(256 if small else 8192)
    print(f"one matrix product in bfloat16: {bound / 1e12:.3f} TFLOP/s")
    ray_worker(small)
    longest = 0.0
    for case in CASES:
        print(f"\n{case.title}", flush=True)
        for settings in case.variants:
            shown = ", ".join(f"{n} {v}" for n, v in settings.items() if n not in NARROW) or "plain"
            if not clock.allows(1.5 * longest):
                print(f"  {shown}: left out, no time is left")
                continue
            start = time.monotonic()
            print(f"  {shown}: {row(case, settings, small, bound)}", flush=True)
            longest = max(longest, time.monotonic() - start)
            free()


def row(case: Case, settings: dict[str, Any], small: bool, bound: float) -> str:
    """What one policy setting makes of a model."""
    policy = loaded(case, settings, small)
    unit = unit_of(case, 0)
    first = timed(lambda: policy.warm_up(case.plan, case.samples))
    trajectory, _ = rollout(policy, unit, 0)

    # the chain alone, without decoding
    clean = torch.from_numpy(np.array(trajectory.latents_BK1[:, -1])).to(DEVICE)
    with torch.no_grad():
        decode = median(lambda: policy.decode(clean))
    whole = median(lambda: rollout(policy, unit, 0)) - decode

    # an update of the same unit
    reward_B = np.linspace(-1, 1, case.samples, dtype=np.float32)
    scored = Scored(
        unit=unit, policy_version=0, raw={"x": reward_B}, total_B=reward_B, trajectory=trajectory
    )
    batch = step_batch([scored], reward_B.astype(np.float64))
    algorithm: Any = registry.build("algorithms", case.algorithm)
    learner = Learner(policy, algorithm.loss, LearnerSettings(updates_per_round=1), seed=0)
    ratio = learner.update(batch, round=1)["ratio/first_update"]
    update = min(timed(lambda: learner.update(batch, round=2)) for _ in range(2))

    # from the learner to a worker
    tensors = learner.weights().tensors
    size = sum(t.nbytes for t in tensors.values())
    hand_off = median(lambda: policy.set_weights({n: t.cpu() for n, t in tensors.items()}))

    forward, both = flops(case, settings, small)
    steps = int(trajectory.stochastic_K.sum())
    per = 1e3 / case.samples
    return (
        f"warm-up {first:.1f} s, rollout {whole * per / case.plan.steps:.2f} ms / sample and step"
        f" ({forward * case.plan.steps / whole / bound:.1%} of the matrix product), decode"
        f" {decode * per:.1f} ms / picture, update {update * per / steps:.2f} ms / sample and step"
        f" ({both * steps / update / bound:.1%}), hand-off of {size / 1e6:.1f} MB"
        f" {hand_off * 1e3:.1f} ms, max |ratio - 1| {ratio:.1e}, {gpu.peak_gb():.1f} GB at most"
    )


def flops(case: Case, settings: dict[str, Any], small: bool) -> tuple[float, float]:
    """FLOP of a unit's pass at one step: forward alone, and forward and backward. What is computed
    twice for less memory counts once."""
    plain = {n: v for n, v in settings.items() if n not in ("compile", "gradient_checkpointing")}
    policy = loaded(case, plain, small)
    unit = unit_of(case, 0)
    condition = policy.encode(unit.prompts, unit.plan)
    x = torch.zeros(case.samples, *policy.latent_shape(case.plan), device=DEVICE)
    level = policy.path.at(case.plan).levels(case.plan.steps)[1]

    def one_pass() -> torch.Tensor:
        return policy.denoise(x, level, condition, case.plan.guidance)[1]

    with torch.no_grad():
        forward = counted(one_pass)
    both = counted(lambda: one_pass().square().mean().backward())
    return forward, both


def counted(work: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def matrix_product(side: int) -> float:
    """FLOP/s of one matrix product in bfloat16."""
    a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    median(lambda: a @ a)
    return 2.0 * side**3 / median(lambda: a @ a)


def unit_of(case: Case, index: int) -> Unit:
    return Unit(
        key=UnitKey("train", 1, index),
        prompts=("a red circle",) * case.samples,
        prompt_ids=(0,) * case.samples,
        sample_ids=tuple(range(index * case.samples, (index + 1) * case.samples)),
        seed=0,
        plan=case.plan,
    )


def free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- one worker on Ray ----------------------------------------------------------------------------


def recipe(small: bool) -> Any:
    """Stable Diffusion 1.5 with random weights, as a policy that a worker loads by itself."""
    name = "gpu_policy:SmallRandom" if small else "gpu_policy:Random"
    return registry.build("policies", {"name": name, "path": "made-here", **NARROW})


def ray_worker(small: bool) -> None:
    """Seconds of units with a slow reward by one worker, one after the other and overlapped, in
    turns."""
    import ray

    from rlalign.alignment.models import Model
    from rlalign.config import RuntimeSettings
    from rlalign.engine.pieces import Rollout, Score
    from rlalign.runtime.actors import create_reward_worker
    from rlalign.runtime.engine import RayEngine
    from rlalign.runtime.groups import create_policy_worker
    from rlalign.runtime.rewards import RewardActors
    from rlalign.runtime.roles import ROLLOUT, reward_role
    from rlalign.runtime.workers import PolicySource

    case = CASES[0]
    on_card = {"device": DEVICE, "rollout": {"workers": 1, "gpus": 1 if DEVICE == "cuda" else 0}}
    runtime = RuntimeSettings.model_validate(on_card)
    slow: Any = registry.build("rewards", {"name": "function", "call": "gpu_policy:slow_score"})
    ray.init(address="local", log_to_driver=False, include_dashboard=False)
    try:
        scorer = create_reward_worker("gpu", 0, slow, runtime)
        asked = RewardActors(
            rewards=(slow,), held_out=(), actors={slow.title: [scorer]}, runtime=runtime
        )
        source = PolicySource(
            model=Model(title="random", recipe=recipe(small)), runtime=runtime, rewards=asked
        )
        members = {
            ROLLOUT: [create_policy_worker("gpu", 0, source)],
            reward_role(slow.title): [scorer],
        }
        units = [unit_of(case, index) for index in range(UNITS)]
        shape: Any = None
        seconds: dict[tuple[str, int], list[float]] = {}
        for turn in range(3):
            for seats in (1, 2):
                engine = RayEngine(runtime, members, units[0], rows=case.samples, seats=seats)
                shape = engine.latent_shape(case.plan)
                x = torch.zeros(case.samples, *shape)
                kinds = {
                    "rollouts": [Rollout(unit=unit, version=0) for unit in units],
                    "looks with a score": [Score(unit=unit, x=x, k=0, steps=2) for unit in units],
                }
                for kind, works in kinds.items():
                    took = timed(lambda works=works, engine=engine: engine.perform(works))
                    if turn:  # the first warms up
                        seconds.setdefault((kind, seats), []).append(took)
                engine.close()
        for (kind, seats), took in sorted(seconds.items()):
            how = "overlapped" if seats > 1 else "one after the other"
            print(f"Ray, {UNITS} {kind}, {how}: {', '.join(f'{s:.2f}' for s in took)} s")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
