"""The memory that ``rlalign check`` speaks of, against what is in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rlalign.algorithms._memory import Memory
from rlalign.alignment.assemble import build_learner
from rlalign.alignment.collect import LocalCollect
from rlalign.cli import main
from rlalign.cli.check import cards, empty, memory, room, work
from rlalign.config import Run, dump, load_run
from rlalign.diffusion.rollout import rollout
from rlalign.learning.optimizers.base import pack_state
from rlalign.networks import devices
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.base import Policy
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
        pytest.param(("learner.shards=4", "learner.ema_decay=0.9"), marks=pytest.mark.promise),
        ("learner.optimizer.name=adafactor",),
        pytest.param(
            ("learner.shards=1", "algorithm={name: ddpo, proximal: true}"),
            marks=pytest.mark.promise,
        ),
        ("algorithm={name: dpok, value_lr: 1.0e-3, clip_range: 1.0e-3}",),
    ],
)
def test_what_an_update_holds_is_within_the_estimate(
    settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted when the optimiser steps in the second update: moments, the gradient, kept copies."""
    run = small_run(
        *settings,
        "learner.updates_per_round=2",
        "policy={name: points}",
        "rewards=[{name: centroid}]",
    )
    run = run.model_copy(
        update={"policy": run.policy.model_copy(update={"hidden": 512})}
    )  # larger than all the rest
    policy = run.policy.load("cpu")
    needs = memory.needs_of(run, policy, {"centroid": 0}, memory.Passes())
    expected = sum(needs.learner.values()) - memory.step_scratch(run, policy)
    gradient = memory.trained(policy)
    collect = LocalCollect(run)
    learner = build_learner(run)
    scored = collect.gather(
        collect.order(run.prompts.units(run.seed, 1, run.plan), learner.weights())
    )
    batch = run.algorithm.make_batch(scored, Memory())
    before = sum(memory.live_tensors().values()) - _of_learner(learner)
    most: list[int] = []
    step = learner.optimiser.step
    monkeypatch.setattr(
        learner.optimiser,
        "step",
        lambda: (step(), most.append(sum(memory.live_tensors().values())))[0],
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
    # what two of them share counts once
    tensors = {t.data_ptr(): t for one in kept for t in one.values()}.values()
    copies = sum(t.numel() * t.element_size() for t in tensors)
    network = learner._lanes[0].critic
    critic = bytes_of(network) if network is not None else 0
    return bytes_of(learner.policy.network) + copies + critic


def test_the_start_weights_are_kept_once() -> None:
    """The policy's reference is what the learner calls its base; a new LoRA has no reference."""
    learner = build_learner(small_run())
    mine, theirs = learner.base_weights().tensors, learner.policy.reference
    assert mine.keys() == theirs.keys()
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine)
    moved = learner.policy.weights()
    learner.policy.set_weights({name: tensor + 1 for name, tensor in moved.items()})
    assert all(torch.equal(mine[name], tensor) for name, tensor in moved.items())
    adapters = build_learner(small_run("policy.lora_rank=2"))
    assert adapters.policy.reference == {}
    assert adapters.base_weights().tensors.keys() == adapters.policy.trainable().keys()


def test_several_learners_hold_a_table_of_all_shards_and_its_sum() -> None:
    def gradients(*settings: str) -> int:
        run = small_run(*settings)
        policy = run.policy.load("cpu")
        return memory.learning(run, policy)["gradients"] // memory.trained(policy)

    assert gradients("learner.shards=4") == 4  # a lane each
    assert gradients("learner.shards=4", "runtime.learner.workers=2") == 4 + 4
    assert gradients("learner.shards=4", "runtime.device=cuda") == 2  # the sum, and the next one
    assert gradients("learner.shards=1") == 1


@pytest.mark.promise
def test_shards_one_after_the_other_hold_the_sum_and_the_next_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, where there is one lane: while a shard's gradient is made only the sum is held
    beside it, whatever the number of shards."""
    run = small_run("policy={name: points}", "rewards=[{name: centroid}]", "learner.shards=4")
    learner = build_learner(run)
    learner._lanes = learner._lanes[:1]
    collect = LocalCollect(run)
    units = run.prompts.units(run.seed, 1, run.plan)
    scored = collect.gather(collect.order(units, learner.weights()))
    batch = run.algorithm.make_batch(scored, Memory())
    held: list[int] = []
    shard = learner._shard

    def watched(*given: Any) -> Any:
        found = shard(*given)
        held.append(sum(memory.live_tensors().values()))
        return found

    monkeypatch.setattr(learner, "_shard", watched)
    learner.update(batch, round=1)
    gradient = memory.trained(learner.policy)
    first, second, third, fourth = held[:4]
    assert second - first == pytest.approx(gradient, rel=0.1)
    assert third - second == pytest.approx(0, abs=0.1 * gradient)
    assert fourth - third == pytest.approx(0, abs=0.1 * gradient)


def needs(run: Run, size: int) -> memory.Needs:
    return memory.Needs(
        learner={"all": size},
        rollout={"all": size},
        rewards={"shapes": 0, "jpeg": 0},
        on_gpu=memory.on_gpu(run.runtime),
    )


@pytest.mark.parametrize("window", [0, 2])
def test_a_round_of_clips_is_its_latents_and_frames(window: int) -> None:
    """As a rollout makes them, of a plan with a window those of the window alone."""
    from tests.policies.test_one_file import PLAN, run_of, unit_of

    plan = PLAN.model_dump() | {"window": window, "steps": 6}
    settings = {"algorithm": {"name": "rwr"}, "evaluate": {"prompts": 1, "grid": 1}}
    run = run_of(plan=plan, **settings)
    policy = run.policy.load("cpu")
    trajectory, media = rollout(policy, unit_of(run.plan), 0)
    sample = (trajectory.latents_BK1[0].nbytes, media[0].nbytes)
    assert memory.of_a_round(run, policy) == run.samples_per_round * sum(sample)


def test_what_is_short_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    run, total = small_run(), psutil.virtual_memory().total
    assert "short" not in room.here(run_bundles(run), needs(run, 1000))["this machine"]
    assert room.here(run_bundles(run), needs(run, total))["this machine"].count("(short by ") == 2
    run = small_run("runtime.device=cuda", "runtime.rollout.gpus=0.25", "runtime.learner.gpus=0.5")
    monkeypatch.setattr(devices, "gpus", lambda: 1)
    monkeypatch.setattr(devices, "gpu_memory", lambda: 80_000_000_000)
    said = room.here(run_bundles(run), needs(run, 30_000_000_000))
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
    assert room.on_node(node, needs(run, 4_000_000_000)) == ""
    node.put(Bundle(role=ROLLOUT, needs={"CPU": 1.0}))
    assert room.on_node(node, needs(run, 4_000_000_000)) == "; about 4.9 GB of 10.0 GB of memory"
    node.put(Bundle(role=LEARNER, needs={"CPU": 1.0}))
    node.put(Bundle(role=reward_role("shapes"), needs={}))
    assert (
        room.on_node(node, needs(run, 4_000_000_000))
        == "; about 10.7 GB of 10.0 GB of memory (short by 700.0 MB)"
    )


def told_by(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The rows that a check has printed."""
    lines = capsys.readouterr().out.splitlines()
    columns = [re.split(r"  +", line.strip(), maxsplit=1) for line in lines]
    return {row[0]: row[1] for row in columns if len(row) > 1}


@pytest.mark.promise
def test_check_speaks_of_every_worker(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(CONFIGS / "tiny_draft.yaml")]) == 0
    told = told_by(capsys)
    assert told["fitted worker"] == "3.5 MB"
    assert told["shapes worker"] == "0.0 MB"
    assert told["learner: reward fitted"] == "3.5 MB"
    assert told["learner: unet"] == told["learner: start weights"] == "6.8 MB"
    assert "of memory, " in told["this machine"]


# --- part by part, against a real run ------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline of SDXL's classes."""
    folder = tmp_path_factory.mktemp("sdxl") / "pipeline"
    write_pipeline(folder, FAMILIES["sdxl"])
    return folder


def sdxl_run(folder: Path, *settings: str) -> Run:
    """All weights with Adafactor."""
    policy = f"policy={{name: sdxl, path: {folder}, gradient_checkpointing: true}}"
    plan = "plan={steps: 3, guidance: 3.0, height: 32, width: 32}"
    more = ("learner.optimizer.name=adafactor", "learner.shards=1", "rewards=[{name: jpeg}]")
    return small_run(policy, plan, *more, *settings)


@pytest.mark.promise
def test_each_part_is_what_a_real_update_holds(sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights of a small SDXL with Adafactor: weights, start weights, gradients and the
    optimiser's state to the byte, a pass within 15 % of what torch's allocator hands out."""
    run = sdxl_run(sdxl)
    source = empty.folder_source(run.policy)
    assert source is not None
    passes, _ = work.count_passes(run, empty.load_empty(run.policy, source))
    parts = memory.needs_of(run, run.policy.load("cpu"), {"jpeg": 0}, passes).learner

    # an update, in this thread
    learner = build_learner(run)
    collect = LocalCollect(run)
    units = run.prompts.units(run.seed, 1, run.plan)
    scored = collect.gather(collect.order(units, learner.weights()))
    batch = run.algorithm.make_batch(scored, Memory())
    gradients: list[int] = []
    step = learner.optimiser.step
    own = learner.policy.trainable().values()

    def watched() -> None:
        found = [p.grad for p in own if p.grad is not None]
        gradients.append(sum(g.numel() * g.element_size() for g in found))
        step()

    monkeypatch.setattr(learner.optimiser, "step", watched)
    learner.update(batch, round=1)
    for name, module in learner.policy.family.parts().items():
        assert parts[name] == bytes_of(module)
    base = learner.base_weights().tensors.values()
    assert parts["start weights"] == sum(t.numel() * t.element_size() for t in base)
    assert parts["gradients"] == gradients[0]
    state = pack_state(learner.optimiser, learner._parameters).values()
    kept = sum(t.numel() * t.element_size() for t in state if t.is_floating_point() and t.ndim)
    assert parts["adafactor state"] == kept

    # a pass whose gradients are there already
    one = next(batch.passes(1))
    lane = learner._lanes[0]
    lane.loss_of(one, learner.loss).value.backward()
    assert passes.learner == pytest.approx(
        allocated(lambda: lane.loss_of(one, learner.loss).value.backward()), rel=0.15
    )
    whole = run.policy.load("cpu")
    rolled_out(run, whole)  # what a library sets up in its first pass is its own
    assert passes.rollout == pytest.approx(allocated(lambda: rolled_out(run, whole)), rel=0.15)


def allocated(run: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator has handed out at once while this ran."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    results: Any = profile.profiler
    events = results.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        now += size
        most = max(most, now)
    return most


@torch.no_grad()
def rolled_out(run: Run, policy: Policy) -> None:
    unit = run.prompts.units(run.seed, 1, run.plan)[0]
    condition = policy.encode(unit.prompts, run.plan)
    x = torch.zeros(len(unit.prompts), *policy.latent_shape(run.plan))
    policy.denoise(x, policy.path.levels(3)[0], condition, run.plan.guidance)
    policy.decode(x)


@pytest.mark.promise
@pytest.mark.parametrize("rank", ["4", pytest.param("0", marks=pytest.mark.slow)])
def test_without_weights_check_says_the_same(
    rank: str, sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of configs alone is counted, not loaded: every size is that of the folder with its
    weights, for adapters too."""
    bare = tmp_path / "bare"
    write_pipeline(bare, FAMILIES["sdxl"], with_weights=False)
    found = []
    for folder in (sdxl, bare):
        file = tmp_path / "run.yaml"
        run = sdxl_run(folder, f"policy.lora_rank={rank}", "policy.precision=bfloat16")
        file.write_text(dump(run))
        assert main(["check", str(file)]) == 0
        found.append(told_by(capsys))
    whole, counted = found
    assert counted.pop("not read").startswith(
        f"weights of the policy: its sizes are those of the configs in {bare}, which has no"
    )
    apart = {name for name in whole if whole[name] != counted.get(name)}
    assert apart <= {"this machine"}
    assert "learner: a pass" in whole


def test_a_published_checkpoint_is_counted_where_it_is_not_in_the_cache() -> None:
    """SDXL, all weights, Adafactor, bfloat16: four bytes a parameter for weights, start weights and
    gradients, and next to nothing for the state. It fits a card of 80 GB."""
    run = load_run(CONFIGS / "published/diffusion_dpo_sdxl.yaml")
    source = empty.find_source(run.policy)
    assert source is not None
    assert source.sizes.startswith("SDXL base 1.0 as published: stabilityai/stable-diffusion-xl")
    policy = empty.load_empty(run.policy, source)
    passes = memory.Passes(learner=3_000_000_000)
    needs = memory.needs_of(run, policy, {"pickscore": 0}, passes)
    count = 2_567_463_684
    for part in ("unet", "start weights", "gradients"):
        assert needs.learner[part] == 4 * count
    assert needs.learner["adafactor state"] < 0.1 * 4 * count
    assert 30e9 < needs.of(LEARNER) < 45e9
    assert cards.fitting(needs.of(LEARNER)) == [40, 48, 80, 141]
    told = cards.card_rows(run, needs)["fits on cards of"]
    assert told.startswith("learner 40 GB; rollout 40 GB; ")
    rows = room.rows(needs)
    assert rows["  learner: gradients"] == "10.3 GB"


def test_of_a_denoiser_that_learners_share_each_holds_a_part() -> None:
    """FLUX.1 as published, under a LoRA in bfloat16: what is left of 23.8 GB, the adapters and, for
    a moment, two blocks."""
    path = "black-forest-labs/FLUX.1-dev"
    policy = f"policy={{name: flux, path: {path}, lora_rank: 32, precision: bfloat16}}"
    settings = (policy, "plan={rule: flow_sde}", "learner.shards=4", "learner.shard=base")

    def parts(workers: int) -> dict[str, int]:
        run = small_run(*settings, f"runtime.learner.workers={workers}")
        return memory.learner_weights(run, live)

    run = small_run(*settings)
    source = empty.find_source(run.policy)
    assert source is not None
    live = empty.load_empty(run.policy, source)
    whole, two, four = parts(1), parts(2), parts(4)
    adapters = memory.trained(live)
    frozen = whole["transformer"] - adapters
    assert two["transformer"] - adapters == pytest.approx(frozen / 2, rel=1e-6)
    assert four["transformer"] - adapters == pytest.approx(frozen / 4, rel=1e-6)
    # a double block has 340 M weights, as FLUX.1 has them outside of blocks 58 M
    assert memory.GATHERED not in whole
    assert two[memory.GATHERED] == four[memory.GATHERED] == pytest.approx(1.48e9, rel=0.02)
    needs = memory.needs_of(run, live, {"shapes": 0, "jpeg": 0}, memory.Passes())
    assert needs.learner["transformer"] == whole["transformer"]

    # so does each process of a rollout worker
    shared = small_run(*settings, "runtime.rollout.shard=4")
    rollout = memory.needs_of(shared, live, {"shapes": 0, "jpeg": 0}, memory.Passes())
    for part in ("transformer", memory.GATHERED):
        assert rollout.rollout[part] == four[part]
    assert memory.GATHERED not in needs.rollout
    rows = room.rows(rollout)
    assert rows["rollout worker"].endswith(" in each of its 4 processes")
    told = cards.advice_rows(
        small_run(*settings[:-1], "runtime.device=cuda"),
        live,
        memory.Needs(rollout={}, rewards={}, learner=whole, on_gpu=frozenset({"learner"})),
        24e9,
    )["to take less"]
    assert "learner.shard=base (of 24.0 GB of denoiser each of" in told
    assert "runtime.rollout.shard=2 (rollout: half of " in told


def test_what_takes_less_is_said_where_no_card_is_large_enough() -> None:
    run = small_run("runtime.device=cuda", "runtime.rollout.gpus=1", "runtime.learner.gpus=1")
    policy = run.policy.load("cpu")
    needs = memory.needs_of(run, policy, {}, memory.Passes(learner=10_000_000, rollout=1))
    assert cards.advice_rows(run, policy, needs, 24e9) == {}
    told = cards.advice_rows(run, policy, needs, 1e9)["to take less"]
    smaller = memory.learning(small_run("learner.optimizer.name=adafactor"), policy)
    small = room.megabytes(smaller["adafactor state"])
    assert f"learner.optimizer.name=adafactor (state 13.5 MB -> {small})" in told
    # start weights, the gradients of two shards, and two moments
    lasting = room.megabytes(5 * memory.trained(policy))
    assert f"policy.lora_rank=16 (most of {lasting} of start weights" in told
    assert "policy.gradient_checkpointing=true (most of 10.0 MB of a pass" in told
    assert "policy.decode_rows=1" in told


def test_a_card_offers_its_bytes_less_one_for_each_process() -> None:
    assert cards.fitting(23_000_000_000) == [24, 40, 48, 80, 141]
    assert cards.fitting(23_000_000_001) == [40, 48, 80, 141]
    assert cards.fitting(23_000_000_000, processes=2) == [40, 48, 80, 141]
    assert cards.fitting(141_000_000_000) == []
