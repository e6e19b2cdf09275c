"""The time of a round that ``rlalign check`` tells, and what its counted passes come to beside what
was measured on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlalign.algorithms.ddpo import DDPO
from rlalign.cli.check import empty, memory, rounds, work
from rlalign.config import Run
from rlalign.core.records import Plan
from rlalign.policies.sd3 import StableDiffusion3
from rlalign.policies.stable_diffusion import StableDiffusion
from tests.runs import small_run

FIGURES = [(kind, key) for kind in (rounds.UNET, rounds.TRANSFORMER) for key in kind.figures]


@pytest.mark.promise
@pytest.mark.parametrize(("kind", "key"), FIGURES)
def test_the_measured_case_takes_what_was_measured(
    kind: rounds.Kind, key: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 samples of 10 steps of the measured arithmetic: so many times the figures; on twice the
    cards half the time, of twice the arithmetic twice."""
    monkeypatch.setattr(rounds, "kind_of", lambda policy: kind)
    settings = (
        "runtime.device=cuda",
        f"policy.precision={key[0]}",
        f"policy.gradient_checkpointing={str(key[1]).lower()}",
        "plan.steps=10",
        "prompts.per_round=8",
        "prompts.samples_per_prompt=8",
        "runtime.rollout.workers=1",
    )
    flops = rounds.Arithmetic(rollout=kind.flops, learner=kind.flops, decode=rounds.DECODE_FLOPS)
    figure = kind.figures[key]

    def told(run: Run, flops: rounds.Arithmetic) -> str:
        return rounds.round_rows(run, run.policy.load("cpu"), flops)["a round"]

    rollout = 64 * (10 * figure.rollout_ms + figure.decode_ms) / 1e3
    update = 64 * 10 * figure.update_ms / 1e3
    run = small_run(*settings)
    expected = f"rollouts {rounds.seconds(rollout)}, updates {rounds.seconds(update)};"
    assert expected in told(run, flops)
    twice = replace(flops, learner=2 * flops.learner)
    assert f"updates {rounds.seconds(2 * update)};" in told(run, twice)
    cards = small_run(*settings, "runtime.rollout.workers=2", "runtime.learner.workers=2")
    expected = f"rollouts {rounds.seconds(rollout / 2)}, updates {rounds.seconds(update / 2)};"
    assert expected in told(cards, flops)


def test_what_was_not_measured_is_said() -> None:
    run = small_run("runtime.device=cuda", "policy.gradient_checkpointing=true")
    policy = run.policy.load("cpu")
    flops = rounds.Arithmetic(rollout=1.0, learner=1.0, decode=1.0)
    assert (
        "nothing was measured in float32 with gradient_checkpointing of Stable Diffusion 1.5"
        in (rounds.round_rows(run, policy, flops)["a round"])
    )
    assert "no time can be said" in rounds.round_rows(run, policy, None)["a round"]
    assert rounds.round_rows(small_run(), policy, flops) == {}


def test_looks_of_a_round() -> None:
    """Samples and steps, of a window its steps alone; noised samples; both pictures of a pair."""
    plain = small_run("plan.steps=10", "learner.epochs=2")
    assert rounds.learned_looks(plain) == 8 * 10 * 2
    window = plain.model_copy(update={"plan": Plan(steps=10, window=3)})
    assert rounds.learned_looks(window) == 8 * 3 * 2
    assert isinstance(plain.algorithm, DDPO)
    last = plain.algorithm.model_copy(update={"skip_last": 1})
    assert rounds.learned_looks(plain.model_copy(update={"algorithm": last})) == 8 * 9 * 2
    nft = small_run("algorithm={name: rwr, draws: 3}", config="tiny_rwr")
    assert rounds.learned_looks(nft) == 8 * 3


LORA = {"lora_rank": 16, "precision": "bfloat16"}
CHECKPOINTING = {**LORA, "gradient_checkpointing": True}
UNET = ("stable-diffusion-v1-5/stable-diffusion-v1-5", StableDiffusion, {})
TRANSFORMER = ("stabilityai/stable-diffusion-3.5-medium", StableDiffusion3, {"t5_tokens": 1})
FULL = {"precision": "bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "settings", "update_gb"),
    [
        (UNET, LORA, 21.3),
        (UNET, CHECKPOINTING, 7.0),
        (UNET, FULL, 57.1),
        (TRANSFORMER, LORA, 45.1),
        (TRANSFORMER, CHECKPOINTING, 9.8),
    ],
)
def test_counted_memory_is_that_of_a_gpu(
    model: tuple[str, Any, dict[str, Any]], settings: dict[str, Any], update_gb: float
) -> None:
    """Within 15 % of docs/performance.md: eight samples of 512 x 512, guided, on an H100. There
    Stable Diffusion 3.5 had no T5 and text encoders of two layers, and beside the learner a second
    copy of what it trains, with its moments; and then the start weights were kept twice, and the
    gradient once more as one vector. The arithmetic is that of the figures."""
    path, recipe, more = model
    policy_recipe = recipe(path=path, **settings, **more)
    source = empty.find_source(policy_recipe)
    assert source is not None
    rule = {"rule": "flow_sde", "eta": 0.7} if recipe is StableDiffusion3 else {}
    run = small_run(
        "runtime.device=cuda",
        "learner.shards=1",
        "learner.updates_per_round=1",
        "prompts.per_round=8",
        "prompts.per_unit=8",
        "prompts.samples_per_prompt=1",
    ).model_copy(
        update={
            "policy": policy_recipe,
            "plan": Plan(steps=4, guidance=5.0, height=512, width=512, **rule),
        }
    )
    policy = empty.load_empty(policy_recipe, source)
    passes, flops = work.count_passes(run, policy)
    parts = memory.needs_of(run, policy, {}, passes).learner
    absent = parts.get("text_encoder_3", 0) + 0.9 * parts.get("text_encoder_2", 0)
    trained = memory.trained(policy)
    expected = sum(parts.values()) - absent + (3 + 2) * trained
    assert expected == pytest.approx(update_gb * 1e9, rel=0.15)
    assert flops is not None
    kind = rounds.kind_of(policy)
    assert flops.rollout == pytest.approx(kind.flops, rel=0.02)
    assert flops.decode == pytest.approx(rounds.DECODE_FLOPS, rel=0.02)
