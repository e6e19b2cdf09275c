"""How long a round takes: an estimate, by figures that were measured on one card and the arithmetic
of the run's own passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlalign.diffusion.noise import noise_masks

if TYPE_CHECKING:
    from rlalign.config import Run
    from rlalign.policies.base import Policy

CARD = "one H100 (80 GB)"
PAGE = "docs/performance.md"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What was measured of one policy, a sample and step with guidance, and a picture decoded."""

    rollout_ms: float
    update_ms: float
    decode_ms: float


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of denoiser with the model that was measured."""

    title: str
    flops: float
    """Of a sample and step there, forward: two rows, 512 x 512."""
    figures: dict[tuple[str, bool], Figure]
    """(precision, gradient_checkpointing) -> what was measured with a LoRA."""


UNET = Kind(
    title="Stable Diffusion 1.5",
    flops=1.6e12,
    figures={
        ("float32", False): Figure(rollout_ms=63.0, update_ms=138, decode_ms=93),
        ("tf32", False): Figure(rollout_ms=23.5, update_ms=66.1, decode_ms=22),
        ("bfloat16", False): Figure(rollout_ms=12.3, update_ms=31.1, decode_ms=22),
        ("bfloat16", True): Figure(rollout_ms=13.5, update_ms=48.6, decode_ms=22),
    },
)
TRANSFORMER = Kind(
    title="Stable Diffusion 3.5 medium",
    flops=4.054e12,
    figures={
        ("tf32", False): Figure(rollout_ms=43.8, update_ms=118, decode_ms=22),
        ("bfloat16", False): Figure(rollout_ms=25.5, update_ms=59.5, decode_ms=22),
        ("bfloat16", True): Figure(rollout_ms=25.4, update_ms=91.1, decode_ms=22),
    },
)
DECODE_FLOPS = 2.515e12
"""Of a picture of 512 x 512 in the autoencoder that was measured."""


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What the run's passes come to, of one sample."""

    rollout: float
    """Of a step, with guidance."""
    learner: float
    """Of a step, or of a time that it is noised, forward."""
    decode: float


def kind_of(policy: Policy) -> Kind:
    """The kind of a policy's denoiser."""
    return UNET if "UNet" in type(policy.network).__name__ else TRANSFORMER


def round_rows(run: Run, policy: Policy, flops: Arithmetic | None) -> dict[str, str]:
    """Seconds of a round, or why none can be said; nothing for a run that computes on the CPU."""
    if run.runtime.device == "cpu":
        return {}
    name = "a round"
    if flops is None:
        return {name: "no time can be said: the passes of this policy are not counted"}
    kind = kind_of(policy)
    key = (run.policy.precision, run.policy.gradient_checkpointing)
    figure = kind.figures.get(key)
    if figure is None:
        checkpointing = " with gradient_checkpointing" if key[1] else ""
        return {
            name: (
                f"no time can be said: nothing was measured in {key[0]}{checkpointing} of"
                f" {kind.title}, the model of this kind ({PAGE})"
            )
        }

    # what a sample takes, on as many cards as there are workers
    rollout = update = 0.0
    runtime = run.runtime
    if run.rolls_out:
        look = figure.rollout_ms * flops.rollout / kind.flops
        decode = figure.decode_ms * flops.decode / DECODE_FLOPS
        rollout = run.samples_per_round * (run.plan.steps * look + decode) / 1e3
        rollout /= runtime.rollout.workers * runtime.rollout.shard
    step = figure.update_ms * flops.learner / kind.flops
    update = learned_looks(run) * step / 1e3 / runtime.learner.workers
    sampled = f"rollouts {seconds(rollout)}, " if run.rolls_out else ""
    each = f" of {runtime.rollout.shard} cards each" if runtime.rollout.shard > 1 else ""
    workers = f"{runtime.rollout.workers} rollout{each}, {runtime.learner.workers} learner"
    return {
        name: (
            f"about {seconds(rollout + update)}: {sampled}updates {seconds(update)}; by"
            f" {kind.title} on {CARD} ({PAGE}) and the arithmetic of this run, an estimate for a"
            f" card a worker ({workers}); rewards, a reference's passes and evaluations come on top"
        )
    }


def learned_looks(run: Run) -> int:
    """Samples and steps (or samples and noises) that a round's updates look at with a gradient."""
    epochs = run.learner.epochs
    if run.preferences is not None:
        return 2 * run.preferences.pairs_per_round * run.algorithm.times_noised * epochs
    if run.algorithm.eats.per_step:
        steps = sum(noise_masks(run.plan)[0]) - getattr(run.algorithm, "skip_last", 0)
        return run.samples_per_round * max(steps, 1) * epochs
    return run.samples_per_round * run.algorithm.times_noised * epochs


def seconds(count: float) -> str:
    """A duration for people."""
    if count >= 5400:
        return f"{count / 3600:.1f} h"
    return f"{count / 60:.0f} min" if count >= 90 else f"{count:.0f} s"
