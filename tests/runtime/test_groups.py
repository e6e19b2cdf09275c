"""Rollout workers of several processes over which their denoiser is spread: what one process gives,
also after one of them has died."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.alignment.models import Model, ready_policy
from rlalign.config import RuntimeSettings
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import build
from rlalign.engine.local import LiveRewards, LocalEngine
from rlalign.engine.pieces import Advance, Pictures
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.runtime.roles import ROLLOUT
from tests.policies.family_runs import policy_of

pytestmark = pytest.mark.ray

RUNTIME = RuntimeSettings.model_validate({"rollout": {"workers": 1, "shard": 2}})
PLAN = Plan(steps=2, rule="flow_sde", eta=0.7, guidance=2.0, height=16, width=16)


def unit_of(number: int, steps: int) -> Unit:
    rows = [(0, "a red circle", 2 * number), (1, "blue", 2 * number + 1)]
    plan = PLAN.model_copy(update={"steps": steps})
    return Unit.of_rows(UnitKey("sample", 0, number), rows, 3, plan)


UNITS = [unit_of(number, steps) for number, steps in enumerate((2, 3, 2, 2, 4))]
"""Five for two processes, of unequal lengths."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small FLUX under a LoRA."""
    folder = tmp_path_factory.mktemp("model")
    write_pipeline(folder, FAMILIES["flux"], seed=1)
    settings = {**policy_of("flux", folder), "lora_rank": 2, "precision": "bfloat16"}
    return Model(title="flux", recipe=build("policies", settings))


@pytest.fixture(scope="module")
def weights(model: Model) -> dict[str, torch.Tensor]:
    """Of an adapter that has an effect."""
    found = model.load("cpu").weights()
    noise = torch.Generator().manual_seed(5)
    return {n: t + 0.1 * torch.randn(t.shape, generator=noise) for n, t in found.items()}


def pictures(engine: Any, weights: dict[str, torch.Tensor] | None = None) -> list[np.ndarray]:
    if weights is not None:
        engine.set_weights(weights)
    return engine.map([Pictures(unit=unit, version=0) for unit in UNITS])


def expected(model: Model, weights: dict[str, torch.Tensor] | None = None) -> list[np.ndarray]:
    """The pictures of one process with the whole denoiser."""
    policy = ready_policy(model, "cpu", 1.0)
    if weights is not None:
        policy.set_weights(weights)
    return pictures(LocalEngine(policy, [LiveRewards(())], rows=2, parallel=False))


@pytest.fixture(scope="module")
def engine_of(ray_cluster: None) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """Makes an engine on one worker of a model, and the worker."""
    import ray
    from ray._private.state import actors

    from rlalign.runtime.engine import RayEngine
    from rlalign.runtime.groups import create_policy_worker
    from rlalign.runtime.workers import PolicySource

    engines = []
    workers = []

    def make(model: Model) -> tuple[Any, Any]:
        source = PolicySource(model=model, runtime=RUNTIME)
        workers.append(create_policy_worker("test", len(workers), source))
        engines.append(RayEngine(RUNTIME, {ROLLOUT: workers[-1:]}, UNITS[0], rows=2))
        return engines[-1], workers[-1]

    yield make
    for engine in engines:
        engine.close()

    # the others are a lead's own, and end with it
    for worker in workers:
        ray.kill(worker)
    while any(actor["State"] != "DEAD" for actor in actors().values()):
        time.sleep(0.05)


def assert_equal(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def processes(worker: Any) -> tuple[int, int]:
    """Of a group: the lead's, and the other member's."""
    import ray

    asked: Any = worker.apply.remote(lambda lead: ray.get(lead._others[0].process_id.remote()))
    found: Any = ray.get([worker.process_id.remote(), asked])
    return found[0], found[1]


@pytest.mark.slow
def test_pictures_are_those_of_a_whole_worker_though_each_process_dies(
    model: Model, weights: dict[str, torch.Tensor], engine_of: Callable[..., tuple[Any, Any]]
) -> None:
    """Under the weights that it loads and under new ones, which a group that has begun anew is sent
    again; work that fails is told, and the group goes on."""
    from rlalign.runtime.pool import UnitFailed

    engine, worker = engine_of(model)
    assert_equal(pictures(engine), expected(model))
    wanted = expected(model, weights)
    assert_equal(pictures(engine, weights), wanted)
    first = processes(worker)

    # latents of too many channels fail in the denoiser
    x = torch.zeros(2, 5, 2, 2)
    with pytest.raises(UnitFailed, match="failed on 3 attempts"):
        engine.map([Advance(unit=UNITS[0], x=x, stop=1)])
    assert_equal(pictures(engine), wanted)
    assert processes(worker) == first

    # each of its processes ends, and the whole group begins anew
    os.kill(first[1], signal.SIGKILL)
    assert_equal(pictures(engine), wanted)
    second = processes(worker)
    os.kill(second[0], signal.SIGKILL)
    assert_equal(pictures(engine), wanted)
    assert len({*first, *second, *processes(worker)}) == 6
    assert engine._pools[ROLLOUT].restarts == 2


@pytest.mark.slow
def test_a_frozen_denoiser_without_an_adapter_is_spread_too(
    model: Model, engine_of: Callable[..., tuple[Any, Any]]
) -> None:
    """And each process holds about half of it."""
    import ray

    recipe: Any = model.recipe
    plain = replace(model, recipe=recipe.model_copy(update={"lora_rank": 0}))
    engine, worker = engine_of(plain)
    assert_equal(pictures(engine), expected(plain))

    def held(lead: Any) -> int:
        weights = lead._own._policy.network.parameters()
        return sum(one.to_local().untyped_storage().nbytes() for one in weights)

    whole = sum(4 * p.numel() for p in plain.load("cpu").network.parameters())
    part: Any = ray.get(worker.apply.remote(held))
    assert part < 0.6 * whole


@pytest.mark.slow
def test_what_cannot_be_loaded_is_refused_with_its_reason(
    engine_of: Callable[..., tuple[Any, Any]], tmp_path: Path
) -> None:
    from rlalign.core.registry import UserError

    write_pipeline(tmp_path, FAMILIES["flux"], seed=1)
    recipe = build("policies", {**policy_of("flux", tmp_path), "lora_rank": 2})
    weights = next((tmp_path / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="policy.path: cannot load"):
        engine_of(Model(title="flux", recipe=recipe))
