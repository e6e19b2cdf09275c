"""The memory that ``rlalign check`` speaks of, against what is in memory."""

from __future__ import annotations

import psutil
import pytest
import torch

from rlalign.algorithms._memory import Memory
from rlalign.alignment.assemble import build_learner
from rlalign.alignment.collect import LocalCollect
from rlalign.cli import main, memory
from rlalign.config import Run
from rlalign.networks import devices
from rlalign.runtime.placement import Bundle, Node
from rlalign.runtime.reservation import run_bundles
from rlalign.runtime.roles import LEARNER, ROLLOUT, reward_role
from tests.runs import CONFIGS, small_run


def bytes_of(*modules: torch.nn.Module) -> int:
    return sum(
        p.numel() * p.element_size() for m in modules for p in [*m.parameters(), *m.buffers()]
    )


def test_what_loading_leaves_behind_is_every_part_of_a_policy() -> None:
    run = small_run()
    policy, loaded = memory.measure_load(lambda: run.policy.load("cpu"))
    parts = bytes_of(policy.network, policy.family.vae, policy.family.pipeline.text_encoder)
    reference = memory.trained(policy)  # a kept copy: all weights are trained
    assert parts + reference <= loaded < 1.01 * (parts + reference)


def test_of_a_lora_no_reference_is_kept() -> None:
    run = small_run("policy.lora_rank=2")
    policy, loaded = memory.measure_load(lambda: run.policy.load("cpu"))
    parts = bytes_of(policy.network, policy.family.vae, policy.family.pipeline.text_encoder)
    assert parts <= loaded < 1.01 * parts
    assert memory.trained(policy) < 0.1 * parts


def test_what_a_reward_holds() -> None:
    reward = small_run("rewards=[{name: bradley_terry}]").rewards[0]
    scorer, size = memory.measure_load(lambda: reward.load("cpu"))
    assert scorer
    assert size == pytest.approx(
        (CONFIGS.parent / "rlalign/assets/tiny_reward/open_clip_model.safetensors").stat().st_size,
        rel=0.01,
    )
    assert memory.measure_load(lambda: small_run().rewards[1].load("cpu"))[1] == 0  # jpeg


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("learner.shards=4", "learner.ema_decay=0.9"),
        ("learner.shards=1", "algorithm={name: ddpo, proximal: true}"),
        ("algorithm={name: dpok, value_lr: 1.0e-3, clip_range: 1.0e-3}",),
    ],
)
def test_what_an_update_holds_is_within_the_estimate(
    settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted when the optimiser steps in the second update: moments, flat gradients of all shards,
    kept copies."""
    run = small_run(
        *settings,
        "learner.updates_per_round=2",
        "policy={name: points}",
        "rewards=[{name: centroid}]",
    )
    run = run.model_copy(
        update={"policy": run.policy.model_copy(update={"hidden": 512})}
    )  # larger than all the rest
    policy, loaded = memory.measure_load(lambda: run.policy.load("cpu"))
    expected, gradient = loaded + memory.learning(run, policy), memory.trained(policy)
    collect = LocalCollect(run)
    learner = build_learner(run)
    scored = collect.gather(
        collect.order(run.prompts.units(run.seed, 1, run.plan), learner.weights())
    )
    batch = run.algorithm.make_batch(scored, Memory())
    before = sum(memory._tensors().values()) - _of_learner(learner)
    most: list[int] = []
    step = learner.optimiser.step
    monkeypatch.setattr(
        learner.optimiser, "step", lambda: (step(), most.append(sum(memory._tensors().values())))[0]
    )
    learner.update(batch, round=1)
    found = max(most) - before
    assert found <= expected + 0.1 * gradient
    assert (
        found >= expected - run.learner.shards * gradient - 0.1 * gradient
    )  # the lanes' own gradients are gone by then


def _of_learner(learner) -> int:
    """What the learner holds before its first update: its policy and the copies that it keeps."""
    kept = [
        learner._base,
        learner._average or {},
        learner.policy.reference,
        *learner._snapshots.values(),
    ]
    copies = sum(t.numel() * t.element_size() for one in kept for t in one.values())
    network = learner._lanes[0].critic
    critic = bytes_of(network) if network is not None else 0
    return bytes_of(learner.policy.network) + copies + critic


def test_several_learners_hold_a_table_of_all_shards_and_its_sum() -> None:
    def gradients(*settings: str) -> int:
        run = small_run(*settings)
        policy = run.policy.load("cpu")
        return (
            memory.learning(run, policy) // memory.trained(policy) - 3
        )  # base weights and moments

    assert gradients("learner.shards=4") == 4 + 4
    assert gradients("learner.shards=4", "runtime.learner.workers=2") == 2 + 2 * 4
    assert gradients("learner.shards=4", "runtime.device=cuda") == 4 + 2
    assert gradients("learner.shards=1") == 2


def needs(run: Run, size: int) -> memory.Needs:
    return memory.Needs(
        learner=size,
        rollout=size,
        rewards={"shapes": 0, "jpeg": 0},
        on_gpu=memory.on_gpu(run.runtime),
    )


def test_what_is_short_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    run, total = small_run(), psutil.virtual_memory().total
    assert "short" not in memory.here(run_bundles(run), needs(run, 1000))["this machine"]
    assert memory.here(run_bundles(run), needs(run, total))["this machine"].count("(short by ") == 2
    run = small_run("runtime.device=cuda", "runtime.rollout.gpus=0.25", "runtime.learner.gpus=0.5")
    monkeypatch.setattr(devices, "gpus", lambda: 1)
    monkeypatch.setattr(devices, "gpu_memory", lambda: 80_000_000_000)
    said = memory.here(run_bundles(run), needs(run, 30_000_000_000))
    assert "short" not in said["this machine"]
    assert (
        said["this machine's GPU"]
        == "80.0 GB; --local takes about 60.0 GB, on Ray learner 30.0 GB, rollout 30.0 GB (short by"
        " 10.0 GB)"
    )


def test_a_node_says_what_its_workers_take_of_its_memory() -> None:
    run = small_run()
    has = {"CPU": 4.0, "memory": 10e9}
    node = Node(title="one", free=dict(has), total=has)
    assert memory.on_node(node, needs(run, 4_000_000_000)) == ""
    node.put(Bundle(role=ROLLOUT, needs={"CPU": 1.0}))
    assert memory.on_node(node, needs(run, 4_000_000_000)) == "; about 4.9 GB of 10.0 GB of memory"
    node.put(Bundle(role=LEARNER, needs={"CPU": 1.0}))
    node.put(Bundle(role=reward_role("shapes"), needs={}))
    assert (
        memory.on_node(node, needs(run, 4_000_000_000))
        == "; about 10.7 GB of 10.0 GB of memory (short by 700.0 MB)"
    )


def test_check_speaks_of_every_worker(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(CONFIGS / "tiny_draft.yaml")]) == 0
    told = {
        key: value.strip()
        for key, _, value in (line.partition("  ") for line in capsys.readouterr().out.splitlines())
    }
    assert "fitted worker about 3.5 MB, shapes worker about 0.0 MB" in told["memory"]
    assert "of memory, " in told["this machine"]
