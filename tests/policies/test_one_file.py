"""A new model family is one file: ``tests/policies/clips.py`` trains, here and on Ray, and nothing
else knows of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.config import Run, parse_run
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.diffusion.rollout import moves, replay_log_prob, rollout
from rlalign.policies.base import Words
from tests.policies.clips import Clips
from tests.runs import assert_same_run, metrics

PROMPTS = ("a red circle", "blue", "a green square above two circles")
PLAN = Plan(steps=4, rule="flow_sde", eta=0.7, guidance=2.0, height=16, width=24, frames=5)


def run_of(**changes: Any) -> Run:
    settings: dict[str, Any] = {
        "name": "clips",
        "rounds": 2,
        "policy": {"name": "tests.policies.clips:Clips"},
        "plan": PLAN.model_dump(),
        "prompts": {
            "name": "list",
            "prompts": list(PROMPTS),
            "per_round": 4,
            "per_unit": 1,
            "samples_per_prompt": 2,
        },
        "rewards": [{"name": "jpeg"}],
        "algorithm": {"name": "grpo"},
        "learner": {"lr": 0.01, "shards": 2, "updates_per_round": 2},
        "evaluate": {"prompts": 4, "grid": 4},
    }
    return parse_run({**settings, **changes})


def unit_of(plan: Plan = PLAN) -> Unit:
    ids = tuple(range(len(PROMPTS)))
    return Unit(
        key=UnitKey("train", 1, 0),
        prompts=PROMPTS,
        prompt_ids=ids,
        sample_ids=(0,) * len(PROMPTS),
        seed=0,
        plan=plan,
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_ratio_is_one_before_the_first_update(precision: str) -> None:
    """Five-dimensional latents, masks and whole numbers among the words, guidance: log-probs again,
    bit for bit."""
    policy = Clips(precision=precision).load("cpu")  # type: ignore[arg-type]
    unit = unit_of()
    trajectory, media = rollout(policy, unit, 0)
    assert trajectory.latents_BK1.shape == (3, 5, 4, 3, 4, 6)
    assert media.shape == (3, 5, 3, 16, 24)
    latents = torch.from_numpy(trajectory.latents_BK1)
    condition = policy.encode(unit.prompts, unit.plan)
    for k in range(unit.plan.steps):
        with torch.no_grad():
            log_prob_B1, _ = replay_log_prob(policy, unit, *moves(latents, [k]), [k], condition)
        assert torch.equal(log_prob_B1[:, 0], torch.from_numpy(trajectory.log_prob_BK[:, k]))


def test_guidance_is_the_familys_own() -> None:
    """Against the negative prompt, at the length of the caption's own prediction; the told guidance
    is a number of the words, and no pass more."""
    policy = Clips(negative_prompt="blue noise", embedded_guidance=2.5).load("cpu")
    x = torch.randn(3, 4, 3, 4, 6)
    condition = policy.encode(PROMPTS, PLAN)
    timestep_B = torch.full((3,), 500.0)
    with torch.no_grad():
        found = policy.family.look(policy.answer, x, timestep_B, condition, 2.0)
        assert policy.meter.calls == 6
        cond = policy.family.predict(x, timestep_B, condition.caption)
        uncond = policy.family.predict(x, timestep_B, policy.family.words(["blue noise"] * 3, PLAN))
        assert torch.equal(policy.family.look(policy.answer, x, timestep_B, condition, 1.0), cond)
        assert policy.meter.calls == 9
        other = Clips(embedded_guidance=9.0).load("cpu")
        told = other.family.predict(x, timestep_B, other.encode(PROMPTS, PLAN).caption)
    assert not torch.allclose(told, cond)
    mixed = uncond + 2.0 * (cond - uncond)
    torch.testing.assert_close(found.norm(dim=1), cond.norm(dim=1))
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(found, dim=1), unit(mixed, dim=1))


def test_lanes_decode_side_by_side_as_alone() -> None:
    """The autoencoder keeps its features on itself; every lane has its own, and four threads give
    what one gives."""
    first = Clips().load("cpu")
    lanes = [first, *(first.replica() for _ in range(3))]
    assert len({id(lane.family.vae) for lane in lanes}) == 4
    latents = torch.randn(12, 1, 4, 5, 8, 8)
    with torch.no_grad():
        alone = [first.decode(one) for one in latents]

    def decoded(lane: int) -> list[torch.Tensor]:
        with torch.no_grad():
            return [lanes[lane].decode(one) for one in latents[lane::4]]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(decoded, range(4)))
    for lane, parts in enumerate(found):
        for one, wanted in zip(parts, alone[lane::4], strict=True):
            assert torch.equal(one, wanted)


def test_the_size_needs_no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Clips().load("cpu")
    monkeypatch.setattr(policy.family, "decode", None)
    assert policy.drawn_size(PLAN) == (16, 24)


def test_a_value_network_is_told_the_mean_of_the_tokens_that_count() -> None:
    words = Clips().load("cpu").family.words(PROMPTS, PLAN)
    for row, text in enumerate(PROMPTS):
        count = min(len(text.split()), 6)
        wanted = words["embeds_BLD"][row, :count].mean(0)
        torch.testing.assert_close(words.summary_BD[row], wanted)


def test_words_are_repeated_taken_and_cast_by_row() -> None:
    words = Words({"a_BL": torch.randn(3, 2), "mask_B": torch.tensor([True, False, True])})
    twice = words.repeat(2)
    assert torch.equal(twice["mask_B"], torch.tensor([True, False, True] * 2))
    assert torch.equal(twice["a_BL"], torch.cat([words["a_BL"]] * 2))
    picked = words.take(torch.tensor([2, 0]))
    assert torch.equal(picked["a_BL"], words["a_BL"][[2, 0]])
    cast = words.to(dtype=torch.float64)
    assert cast["a_BL"].dtype == torch.float64
    assert cast["mask_B"].dtype == torch.bool
    assert torch.equal(Words.cat([words, words])["a_BL"], twice["a_BL"])


@pytest.mark.promise
@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("algorithm", ["grpo", "dpok", "rwr"])
def test_it_trains_two_rounds(tmp_path: Path, algorithm: str) -> None:
    from rlalign.alignment.loop import train_local

    value = {"value_lr": 0.001} if algorithm == "dpok" else {}
    run = run_of(algorithm={"name": algorithm, **value})
    train_local(run, tmp_path / "run", resume=False, on_record=lambda _: None)
    lines = metrics(tmp_path / "run")
    assert len(lines) == 2
    assert all(np.isfinite(line["reward/jpeg/mean"]) for line in lines)
    before, after = run.policy.load("cpu").weights(), trained(tmp_path / "run")
    assert any(not torch.equal(before[n], after[n]) for n in before)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "policy" / "clips.safetensors")


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_it_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    from rlalign.alignment.loop import train_local
    from rlalign.runtime import train_on_ray

    run = run_of(runtime={"rollout_workers": 2})
    train_local(run, tmp_path / "here", resume=False, on_record=lambda _: None)
    train_on_ray(run, tmp_path / "ray", resume=False, on_record=lambda _: None)
    assert_same_run(tmp_path / "here", tmp_path / "ray")
