"""The learner: no way of splitting an update changes its result, and what goes wrong is said."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlalign.algorithms._memory import Memory
from rlalign.algorithms._objectives import gaussian_kl
from rlalign.algorithms.base import Loss
from rlalign.algorithms.ddpo import DDPO
from rlalign.core.batches import StepBatch, StepPass
from rlalign.core.registry import UserError
from rlalign.diffusion.rollout import replay
from rlalign.learning.evaluate import kl_to_reference
from rlalign.learning.learner import Learner
from rlalign.learning.settings import LearnerSettings
from rlalign.policies.base import Policy
from tests.toy import ToyPolicy, as_float64, collect, gradient, make_units

DDPO_WIDE = DDPO(clip_range=0.2, advantage="global")


def batch_of(policy: Policy, *, round: int = 1, count: int = 8) -> StepBatch:
    return DDPO_WIDE.make_batch(collect(policy, make_units(count, round=round)), Memory())


def learner_of(policy: Policy, **settings: Any) -> Learner:
    values = {"lr": 1e-2, "updates_per_round": 2, **settings}
    return Learner(policy, DDPO_WIDE.loss, LearnerSettings(**values), seed=0)


def trained(
    rounds: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    lanes: int | None = None,
    **settings: Any,
) -> Learner:
    """A learner after some rounds of on-policy DDPO on the toy policy."""
    learner = learner_of(ToyPolicy(dtype=dtype), **settings)
    if lanes is not None:
        use_lanes(learner, lanes)
    for round in range(1, rounds + 1):
        train_round(learner, round)
    return learner


def use_lanes(learner: Learner, lanes: int) -> None:
    """Fewer replicas at work than shards, one after the other on each."""
    from concurrent.futures import ThreadPoolExecutor

    learner._lanes = learner._lanes[:lanes]
    if lanes == 1:
        learner._pool = ThreadPoolExecutor(1)


def train_round(learner: Learner, round: int) -> dict[str, float]:
    batch = batch_of(learner.policy, round=round)
    if next(learner.policy.network.parameters()).dtype == torch.float64:
        batch = as_float64(batch)
    return learner.update(batch, round=round)


def same(one: Learner, other: Learner) -> bool:
    """Equal to the last bit: weights, moments, step counts, averages, version."""
    mine, yours = one.state_dict(), other.state_dict()
    return mine.keys() == yours.keys() and all(torch.equal(mine[n], yours[n]) for n in mine)


def last_gradient(
    monkeypatch: pytest.MonkeyPatch, batch: StepBatch, dtype: torch.dtype, **settings: Any
) -> torch.Tensor:
    """The gradient that one update's optimiser step would see, before clipping."""
    seen: list[torch.Tensor] = []
    place = Learner._place

    def spy(self: Learner, gradient: list[torch.Tensor]) -> None:
        seen.append(torch.cat([one.flatten() for one in gradient]))
        place(self, gradient)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "_place", spy)
        learner_of(ToyPolicy(dtype=dtype), updates_per_round=1, **settings).update(batch, round=1)
    (flat,) = seen
    return flat


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("steps_per_pass", [1, 2, 5])
def test_accumulated_passes_equal_one_big_batch(
    monkeypatch: pytest.MonkeyPatch, shards: int, steps_per_pass: int
) -> None:
    """O24: all (sample, step) pairs in one mean against passes of slices, float64, absolute 1e-10
    (and 1e-12 over shards)."""
    policy = ToyPolicy(dtype=torch.float64)
    batch = as_float64(batch_of(policy))
    pairs = [
        DDPO_WIDE.loss(p, policy).value for p in batch.passes(5)
    ]  # equal units: the mean of unit means
    wanted = gradient(torch.stack(pairs).mean(), policy)
    assert wanted.abs().max() > 1e-3
    found = last_gradient(
        monkeypatch, batch, torch.float64, shards=shards, steps_per_pass=steps_per_pass
    )
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


def test_units_of_unequal_size_weigh_by_their_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit of 1 and a unit of 5 samples: the gradient is the mean over the six samples (float64,
    1e-12)."""
    policy = ToyPolicy(dtype=torch.float64)
    units = [*make_units(1, per_unit=1), make_units(2, per_unit=5)[1]]
    batch = as_float64(DDPO_WIDE.make_batch(collect(policy, units), Memory()))
    unit_means = [DDPO_WIDE.loss(p, policy).value for p in batch.passes(5)]
    wanted = gradient(unit_means[0] / 6 + unit_means[1] * 5 / 6, policy)
    found = last_gradient(monkeypatch, batch, torch.float64)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


def test_shards_agree_with_one_another_in_float32() -> None:
    """Other summation orders, same training: three rounds, weights within 1e-4 of a learning rate
    of 1e-2."""
    one = trained(shards=1)
    for shards in (2, 4):
        other = trained(shards=shards)
        for name, tensor in one.policy.weights().items():
            assert torch.allclose(other.policy.weights()[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "optimizer", ["adamw", pytest.param("adafactor", marks=pytest.mark.promise)]
)
@pytest.mark.parametrize("shards", [pytest.param(2, marks=pytest.mark.promise), 4])
def test_how_many_lanes_run_changes_no_bit(shards: int, optimizer: str) -> None:
    many, single = (
        trained(shards=shards, lanes=n, optimizer={"name": optimizer}) for n in (None, 1)
    )
    assert len(many._lanes) == shards
    assert len(single._lanes) == 1
    assert same(many, single)


def test_an_update_repeats_to_the_last_bit() -> None:
    one, other = trained(shards=2, ema_decay=0.9), trained(shards=2, ema_decay=0.9)
    assert same(one, other)
    assert one.version == 6
    moved = [
        not torch.equal(t, one.base_weights().tensors[n]) for n, t in one.policy.weights().items()
    ]
    assert all(moved)


def test_the_shuffle_depends_on_seed_round_and_epoch() -> None:
    """Two epochs of a round see the units in another order, and another seed in yet another."""
    orders: list[tuple[int, ...]] = []

    class Spy(StepBatch):
        def pick(self, indices: Any) -> StepBatch:
            orders.append(tuple(indices))
            return super().pick(indices)

    for seed in (0, 1):
        policy = ToyPolicy()
        learner = Learner(
            policy, DDPO_WIDE.loss, LearnerSettings(updates_per_round=1, epochs=2), seed=seed
        )
        learner.update(Spy(**vars(batch_of(policy))), round=1)
    assert len({*orders}) == 4
    assert all(sorted(o) == list(range(8)) for o in orders)


CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from tests.learning.test_learner import train_round, learner_of
from tests.toy import ToyPolicy
learner = learner_of(
    ToyPolicy(), shards=int(sys.argv[1]), ema_decay=0.9, optimizer={"name": sys.argv[3]}, warmup=4
)
assert learner.accelerator.num_processes == 2, learner.accelerator.num_processes
metrics = [train_round(learner, round) for round in (1, 2, 3)]
tensors = dict(learner.state_dict())
for i, m in enumerate(metrics):
    tensors.update({f"metrics/{i}/{k}": torch.tensor(v, dtype=torch.float64) for k, v in m.items()})
tensors = {n: t.clone() for n, t in tensors.items()}
save_file(tensors, Path(sys.argv[2]) / f"rank-{learner.accelerator.process_index}.safetensors")
learner.accelerator.end_training()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_pair(
    shards: int, out: Path, optimizer: str = "adamw"
) -> list[subprocess.CompletedProcess[str]]:
    """Two learner processes over gloo on loopback."""
    common = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-c", CHILD, str(shards), str(out), optimizer]
    processes = [
        subprocess.Popen(
            command,
            env={**common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    results = [p.communicate() for p in processes]
    return [
        subprocess.CompletedProcess(command, p.returncode, out_text, err_text)
        for p, (out_text, err_text) in zip(processes, results, strict=True)
    ]


@pytest.mark.promise
@pytest.mark.parametrize(("shards", "optimizer"), [(2, "adamw"), (8, "adamw"), (2, "adafactor")])
def test_two_learner_processes_equal_one_to_the_last_bit(
    tmp_path: Path, shards: int, optimizer: str
) -> None:
    """Three rounds of two updates, four of them warm-up: weights, the optimiser's state, averages
    and every metric, on both ranks."""
    for done in run_pair(shards, tmp_path, optimizer):
        assert done.returncode == 0, done.stderr
    named = {"name": optimizer}
    learner = learner_of(ToyPolicy(), shards=shards, ema_decay=0.9, optimizer=named, warmup=4)
    metrics = [train_round(learner, round) for round in (1, 2, 3)]
    wanted = dict(learner.state_dict())
    for i, line in enumerate(metrics):
        wanted.update(
            {f"metrics/{i}/{k}": torch.tensor(v, dtype=torch.float64) for k, v in line.items()}
        )
    for rank in (0, 1):
        found = load_file(tmp_path / f"rank-{rank}.safetensors")
        assert found.keys() == wanted.keys()
        apart = [n for n in wanted if not torch.equal(found[n], wanted[n])]
        assert not apart


@pytest.mark.slow
def test_shards_must_be_a_multiple_of_the_processes(tmp_path: Path) -> None:
    for done in run_pair(3, tmp_path):
        assert done.returncode == 1
        assert (
            r"learner.shards must be a multiple of runtime.learner.workers (2), got 3"
            in done.stderr
        )


def test_the_average_is_the_closed_form() -> None:
    """average_n = d average_{n-1} + (1 - d) weights_n from the base weights on, float64, 1e-14."""
    learner = learner_of(ToyPolicy(dtype=torch.float64), ema_decay=0.75, updates_per_round=1)
    wanted = dict(learner.base_weights().tensors)
    assert learner.weights_to_show().kind == "average"
    for round in (1, 2, 3):
        train_round(learner, round)
        wanted = {n: 0.75 * wanted[n] + 0.25 * t for n, t in learner.weights().tensors.items()}
        shown = learner.weights_to_show()
        assert shown.tag == ("average", round)
        for name, tensor in shown.tensors.items():
            assert torch.allclose(tensor, wanted[name], rtol=0, atol=1e-14)
    plain = trained(1)
    assert plain.weights_to_show().tag == ("current", 2)


@pytest.mark.parametrize("more", [{}, {"optimizer": {"name": "adafactor"}, "warmup": 6}])
def test_it_goes_on_from_its_state_to_the_last_bit(tmp_path: Path, more: dict[str, Any]) -> None:
    """Two rounds, through a file, two more, against four in a row; with the average and shuffled
    units, and in the midst of a warm-up."""
    settings = {"ema_decay": 0.9, "shards": 2, **more}
    straight = trained(4, **settings)
    stopped = trained(2, **settings)
    save_file(
        {n: t.clone() for n, t in stopped.state_dict().items()}, tmp_path / "state.safetensors"
    )
    resumed = learner_of(ToyPolicy(seed=5), **settings)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert same(resumed, stopped)
    for round in (3, 4):
        train_round(resumed, round)
    assert same(resumed, straight)


def test_a_state_before_the_first_update_is_whole() -> None:
    fresh, other = trained(0), learner_of(ToyPolicy(seed=5))
    other.load_state_dict(fresh.state_dict())
    assert same(fresh, other)


def test_loaded_state_shares_no_memory_with_what_it_was_loaded_from() -> None:
    stopped, resumed = trained(1), learner_of(ToyPolicy())
    state = {n: t.clone() for n, t in stopped.state_dict().items()}
    resumed.load_state_dict(state)
    before = {n: t.clone() for n, t in state.items()}
    train_round(resumed, 2)
    assert all(torch.equal(state[n], before[n]) for n in state)


def test_a_missing_tensor_is_a_key_error() -> None:
    state = trained(1).state_dict()
    del state["policy/inner.weight"]
    with pytest.raises(KeyError, match=r"policy/inner\.weight"):
        learner_of(ToyPolicy()).load_state_dict(state)


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_spoils_the_weights() -> None:
    policy = ToyPolicy()
    learner = learner_of(policy)
    batch = batch_of(policy)
    before = policy.weights()
    advantage = tuple(torch.full_like(a, torch.nan) for a in batch.advantage)
    with pytest.raises(
        UserError, match=r"the gradient is not finite after 0 updates; lower learner\.lr"
    ):
        learner.update(replace(batch, advantage=advantage), round=1)
    assert all(torch.equal(t, before[n]) for n, t in policy.weights().items())


def test_the_norm_is_reported_before_it_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping to 1e-3: Adam sees a gradient of that norm (its first moment is a tenth of it), the
    metric the whole one."""
    batch = batch_of(ToyPolicy())
    flat = last_gradient(monkeypatch, batch, torch.float32)
    learner = learner_of(ToyPolicy(), updates_per_round=1, max_grad_norm=1e-3)
    metrics = learner.update(batch, round=1)
    assert metrics["grad_norm"] == pytest.approx(flat.norm().item(), rel=1e-5)
    moments = [
        t.flatten() for n, t in learner.state_dict().items() if n.startswith("optimiser/exp_avg/")
    ]
    assert torch.cat(moments).norm().item() == pytest.approx(1e-4, rel=1e-2)


def test_metrics_are_weighted_means_and_maxima() -> None:
    """loss is the mean over all pairs of an update, ratio/max_deviation the largest,
    ratio/first_update that of the first."""
    policy = ToyPolicy()
    batch = batch_of(policy)
    wanted = sum(DDPO_WIDE.loss(p, policy).value.item() * p.weight for p in batch.passes(5))
    metrics = learner_of(ToyPolicy(), updates_per_round=1).update(batch, round=1)
    assert metrics["loss"] == pytest.approx(wanted, abs=1e-6)
    assert metrics["ratio/first_update"] == 0.0
    assert metrics["ratio/max_deviation"] == 0.0
    metrics = learner_of(ToyPolicy(), updates_per_round=4).update(batch, round=1)
    assert metrics["ratio/first_update"] == 0.0
    assert metrics["ratio/max_deviation"] > 1e-4  # later updates of the round are off-policy


def test_lanes_share_weights_but_not_gradients_nor_the_reference() -> None:
    """A replica sees updates in place; inside as_reference only that replica computes with the
    pretrained weights."""
    policy = ToyPolicy()
    twin = policy.replica()
    with torch.no_grad():
        policy.network.outer.bias.add_(1.0)
    assert torch.equal(twin.network.outer.bias, policy.network.outer.bias)
    twin.network.outer.bias.sum().backward()
    assert policy.network.outer.bias.grad is None
    with twin.as_reference():
        assert not torch.equal(twin.network.outer.bias, policy.network.outer.bias)
        assert torch.equal(twin.network.outer.bias, policy.reference["outer.bias"])
    assert twin.network.outer.bias.data_ptr() == policy.network.outer.bias.data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_lanes_that_look_at_the_reference_do_not_disturb_one_another(lora_rank: int) -> None:
    """A loss that replays each pass under the reference first: four lanes at once give the bits of
    one lane."""

    def loss(one: StepPass, policy: Policy) -> Loss:
        condition = policy.encode(one.unit.prompts).rows(len(one.steps))
        with torch.no_grad(), policy.as_reference():
            reference = replay(policy, one.unit, one.before_BS, one.steps, condition).gaussian
        own = replay(policy, one.unit, one.before_BS, one.steps, condition).gaussian
        plain = DDPO_WIDE.loss(one, policy)
        return Loss(
            value=plain.value + gaussian_kl(own.mean, reference.mean, own.std).mean(),
            maxima=plain.maxima,
        )

    def run(lanes: int) -> Learner:
        policy = ToyPolicy(lora_rank=lora_rank)
        settings = LearnerSettings(lr=1e-2, updates_per_round=2, shards=4)
        learner = Learner(policy, loss, settings, seed=0)
        use_lanes(learner, lanes)
        for round in range(1, 6):
            train_round(learner, round)
        return learner

    assert same(run(4), run(1))


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_the_distance_from_the_pretrained_weights_is_the_same_on_any_lanes(shards: int) -> None:
    learner = trained(rounds=1, shards=shards)
    weights = learner.weights_to_show()
    scored = collect(learner.policy, make_units(4))
    expected = kl_to_reference(learner.policy, scored)
    train_round(learner, 2)  # these weights are asked about, not those that the policy has
    assert learner.kl_to_pretrained(weights, scored) == expected > 0
    assert same(learner, trained(rounds=2, shards=shards))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_weights_before_the_first_update_are_the_pretrained_ones(lora_rank: int) -> None:
    learner = learner_of(ToyPolicy(lora_rank=lora_rank, lora_alpha=lora_rank))
    base = learner.base_weights()
    scored = collect(learner.policy, make_units(2))
    train_round(learner, 1)
    assert learner.kl_to_pretrained(base, scored) == 0.0


@pytest.mark.slow
def test_it_learns() -> None:
    """O25 in small: 12 rounds of 96 samples at lr 0.02 raise the first number of the latent by more
    than 0.5 (4 seeds).

    The reward's standard deviation within a round is about 1, so 0.5 is five standard errors of a
    round's mean.
    """
    for seed in range(4):
        policy = ToyPolicy(seed=seed)
        learner = learner_of(policy, lr=2e-2)
        means = []
        for round in range(1, 13):
            scored = collect(policy, make_units(8, per_unit=12, seed=seed, round=round))
            means.append(float(sum(s.total_B.mean() for s in scored)) / 8)
            learner.update(DDPO_WIDE.make_batch(scored, Memory()), round=round)
        assert means[-1] - means[0] > 0.5, (seed, means)
