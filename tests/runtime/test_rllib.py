"""RLlib's PPO on the denoising environment: the module is the policy, and PPO reaches what DDPO
reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.config import load_run
from rlalign.core.registry import UserError
from tests.runs import CONFIGS, small_run

pytestmark = pytest.mark.ray


def test_the_module_is_the_policys_own_gaussian() -> None:
    from ray.rllib.core.columns import Columns

    from rlalign.runtime.rllib import DenoisingModule, environment

    run = load_run(CONFIGS / "points.yaml")
    env = environment(run)
    module = DenoisingModule(
        observation_space=env.observation_space,
        action_space=env.action_space,
        model_config={"run": run},
    )
    starts = [env.reset(seed=number)[0] for number in range(6)]
    batch = {Columns.OBS: torch.stack([torch.from_numpy(start) for start in starts])}
    found = module.forward_train(batch)[Columns.ACTION_DIST_INPUTS]
    gaussian = env.chain.gaussian(batch[Columns.OBS])
    assert torch.equal(found[:, :2], gaussian.mean.flatten(1))
    assert torch.allclose(found[:, 2:].exp(), gaussian.std.expand_as(gaussian.mean).flatten(1))
    assert module.compute_values(batch).shape == (6,)
    trained = {name.split(".")[0] for name, _ in module.named_parameters()}
    assert trained == {"denoiser", "value"}


def test_an_algorithm_without_a_clip_range_is_refused() -> None:
    from rlalign.runtime.rllib import ppo_config

    with pytest.raises(UserError, match="takes the clip range of algorithm ddpo or grpo, got rwr"):
        ppo_config(load_run(CONFIGS / "points.yaml", ["algorithm={name: rwr}"]), 0)


def test_a_list_of_prompts_that_is_too_long_is_refused(tmp_path: Path) -> None:
    """Each has a number in an observation; two records of one text are two of them."""
    from rlalign.runtime.rllib import prompts_of

    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "left", "n": 1}\n{"prompt": "left", "n": 2}\n"left"\n"left"\n')
    prompts = f"prompts={{name: file, path: {path}, column: prompt}}"
    assert prompts_of(load_run(CONFIGS / "points.yaml", [prompts])) == ["left"] * 3
    (tmp_path / "p.txt").write_text("left\n" * 10_001)
    run = load_run(CONFIGS / "points.yaml", [f"prompts={{name: file, path: {tmp_path / 'p.txt'}}}"])
    with pytest.raises(UserError, match=r"at most 10,000 for rllib, .*, got 10,001"):
        prompts_of(run)


def test_lora_is_refused(tmp_path: Path) -> None:
    from rlalign.runtime.rllib import train

    with pytest.raises(UserError, match="trains all weights of a policy"):
        train(small_run("policy.lora_rank=2"), tmp_path, lambda _: None)


@pytest.mark.slow
def test_ppo_reaches_what_ddpo_reaches(tmp_path: Path) -> None:
    """Same file, same evaluation, seeds 0 and 1: from -0.33 both come above -0.06, and within 0.03
    of one another."""
    from rlalign.alignment.loop import train_local
    from rlalign.learning.evaluate import read_final
    from rlalign.runtime.rllib import train

    for seed in (0, 1):
        run = load_run(CONFIGS / "points.yaml", [f"seed={seed}"])
        mine, theirs = tmp_path / f"ddpo-{seed}", tmp_path / f"ppo-{seed}"
        train_local(run, mine, resume=False, on_record=lambda _: None)
        ppo: Any = train(run, theirs, lambda _: None)
        ddpo: Any = read_final(mine, run.rounds)
        key = "reward/centroid/mean"
        assert ddpo["base"][key] == pytest.approx(ppo["base"][key], abs=1e-6)
        assert ddpo["base"][key] < -0.3
        print(
            f"seed {seed}: base {ppo['base'][key]:.4f}, PPO {ppo['aligned'][key]:.4f}, DDPO"
            f" {ddpo['aligned'][key]:.4f}"
        )
        assert min(ppo["aligned"][key], ddpo["aligned"][key]) > -0.06
        assert abs(ppo["aligned"][key] - ddpo["aligned"][key]) < 0.03
