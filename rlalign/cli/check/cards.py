"""On which cards a run's workers fit, and which settings take less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlalign.cli.check.memory import PASS, START, STEP, Needs, Parts, trained
from rlalign.cli.check.room import megabytes
from rlalign.core.registry import build
from rlalign.runtime.roles import LEARNER, ROLLOUT

if TYPE_CHECKING:
    from rlalign.config import Run
    from rlalign.policies.base import Policy

CARDS = (24, 40, 48, 80, 141)
"""GB of the cards that people have: RTX 4090, A100, A6000 or L40S, A100 or H100, H200."""
PER_PROCESS = 1_000_000_000
"""Bytes of a card that CUDA and its libraries take in each process: an assumption."""


def fitting(bytes_taken: int, processes: int = 1) -> list[int]:
    """The cards that so much fits on."""
    return [gb for gb in CARDS if bytes_taken + processes * PER_PROCESS <= gb * 1e9]


def card_rows(run: Run, needs: Needs) -> dict[str, str]:
    """The smallest card that each role fits on, and that all of them do; nothing for a run that
    computes on the CPU."""
    sizes = {
        str(role): needs.of(role)
        for role in (LEARNER, ROLLOUT)
        if needs.computes_on_gpu(role) and needs.of(role)
    }
    if not sizes:
        return {}
    if "reward" in needs.on_gpu:
        sizes["rewards"] = sum(needs.rewards.values())
    told = [f"{name} {_smallest(size)}" for name, size in sizes.items()]
    if len(sizes) > 1:
        told.append(f"all of them together {_smallest(sum(sizes.values()), len(sizes))}")
    counted = "" if PASS in needs.learner or STEP in needs.learner else "; passes are not counted"
    return {
        "fits on cards of": (
            f"{'; '.join(told)} (of {', '.join(map(str, CARDS))} GB, a GB less for each"
            f" process{counted})"
        )
    }


def _smallest(size: int, processes: int = 1) -> str:
    found = fitting(size, processes)
    return f"{found[0]} GB" if found else f"on none ({megabytes(size)})"


def advice_rows(run: Run, policy: Policy, needs: Needs, has: float) -> dict[str, str]:
    """What to switch on where a role does not fit on a card of so many bytes, with what it
    saves."""
    roles = [role for role in (LEARNER, ROLLOUT) if needs.computes_on_gpu(role)]
    if all(needs.of(role) + PER_PROCESS <= has for role in roles):
        return {}
    told = [
        *_of_learner(run, policy, needs.learner),
        *_of_rollout(run, policy, needs.rollout),
        *_of_passes(run, needs),
    ]
    return {"to take less": "; ".join(told) or "more cards, or a smaller model"}


def _of_learner(run: Run, policy: Policy, parts: Parts) -> list[str]:
    """Settings that make the learner's lasting parts smaller."""
    found = []
    full = not (run.policy.lora_rank or run.policy.adapter)
    state = parts.get(f"{run.learner.optimizer.name} state", 0)
    if full and run.learner.optimizer.name == "adamw":
        small = _state_of(policy, "adafactor")
        found.append(f"learner.optimizer.name=adafactor (state {megabytes(state)} -> {small})")
    if full and policy.family.lora_targets:
        lasting = [START, "gradients", f"{run.learner.optimizer.name} state", "average"]
        size = sum(parts.get(name, 0) for name in lasting)
        size += sum(count for name, count in parts.items() if name.startswith("copy "))
        found.append(
            f"policy.lora_rank=16 (most of {megabytes(size)} of start weights, copies, gradients"
            " and state)"
        )
    if full and run.learner.shard == "none" and policy.family.can_spread:
        found.append(
            "learner.shard=all (of weights, start weights, copies, gradients and state each of"
            " runtime.learner.workers holds a part)"
        )
    if run.policy.precision != "bfloat16":
        frozen = "" if full else " and of the frozen weights"
        found.append(f"policy.precision=bfloat16 (about half of a pass{frozen})")
    if not full and run.learner.shard == "none" and policy.family.can_spread:
        frozen = sum(parts.get(name, 0) for name in denoisers(policy))
        found.append(
            f"learner.shard=base (of {megabytes(frozen)} of denoiser each of"
            " runtime.learner.workers holds a part)"
        )
    if run.learner.shards > 1 and run.runtime.learner.workers == 1:
        each = trained(policy)
        found.append(f"learner.shards=1 ({megabytes(each)} of gradients)")
    return found


def _of_rollout(run: Run, policy: Policy, parts: Parts) -> list[str]:
    """Settings that make a rollout worker's lasting parts smaller."""
    adapts = run.policy.lora_rank or run.policy.adapter
    if not adapts or run.runtime.rollout.shard > 1 or not policy.family.can_spread:
        return []
    held = sum(parts.get(name, 0) for name in denoisers(policy))
    return [
        f"runtime.rollout.shard=2 (rollout: half of {megabytes(held)} of denoiser in each of two"
        " processes)"
    ]


def denoisers(policy: Policy) -> list[str]:
    """Names of the family's parts that are denoisers."""
    family = policy.family
    return [name for name in family.parts() if family.role_of(name) == "denoiser"]


def _state_of(policy: Policy, optimizer: str) -> str:
    """What another optimiser would keep."""
    other: Any = build("optimizers", {"name": optimizer})
    return megabytes(other.bytes_of_state(list(policy.trainable().values())))


def _of_passes(run: Run, needs: Needs) -> list[str]:
    """Settings that make passes smaller."""
    found = []
    settings: Mapping[str, object] = run.policy.model_dump()
    learner = needs.learner.get(PASS, 0)
    rollout = needs.rollout.get(PASS, 0)
    if not run.policy.gradient_checkpointing:
        size = f"of {megabytes(learner)} " if learner else ""
        found.append(
            f"policy.gradient_checkpointing=true (most {size}of a pass, a third more time)"
        )
    if settings.get("decode_rows") == 0 and run.samples_per_unit > 1:
        size = f"of {megabytes(rollout)}" if rollout else "of decoding"
        found.append(f"policy.decode_rows=1 (rollout: a part {size})")
    if settings.get("vae_tiling") is False:
        found.append("policy.vae_tiling=true (rollout: decoding in tiles, other pixels)")
    if run.learner.steps_per_pass > 1:
        found.append("learner.steps_per_pass=1 (a pass)")
    if run.samples_per_unit > 1:
        found.append(f"fewer than {run.samples_per_unit} samples a unit (passes)")
    return found
