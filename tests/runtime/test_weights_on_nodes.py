"""Weights on a cluster of two nodes: each node gets them once, while its workers still work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rlalign.alignment.models import Model
from rlalign.config import RuntimeSettings
from rlalign.engine import Rewards, Work
from rlalign.policies.base import Policy
from rlalign.runtime import weights
from rlalign.runtime.weights import Rows
from tests.toy import Toy, ToyFamily, ToyPolicy, make_units

pytestmark = [pytest.mark.ray, pytest.mark.promise]

NODE_BYTES = 200 * 2**20
"""Of the store of a node."""


class WideFamily(ToyFamily):
    """The toy with 32 MB of weights that add nothing to its answer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.network.register_parameter("ballast", torch.nn.Parameter(torch.zeros(2**23)))


class WidePolicy(ToyPolicy):
    """Of that family. Source: none, a test's own."""

    kind: ClassVar[type[ToyFamily]] = WideFamily


class Wide(Toy):
    """Its recipe. Source: none, a test's own."""

    def load(self, device: str, **how: Any) -> ToyPolicy:
        return WidePolicy(seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Wait(Work):
    """A piece that takes until a file is there, and says what the weights are then."""

    file: Path

    def do(self, policy: Policy, rewards: Rewards) -> float:
        self.file.with_suffix(".begun").touch()
        while not self.file.exists():
            time.sleep(0.02)
        return float(policy.trainable()["ballast"][-1].detach())


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A head, where this process is, and a second node."""
    from rlalign.runtime.cluster import prepare_environment

    prepare_environment("auto")
    import ray
    from ray.cluster_utils import Cluster

    store: Any = {"object_store_memory": NODE_BYTES}
    found = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **store}
    )
    found.add_node(num_cpus=2, resources={"second": 2}, **store)
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


def stored(cluster: Any) -> int:
    """Bytes in the store of the second node."""
    from ray._private.internal_api import node_stats

    (node,) = cluster.worker_nodes
    found = node_stats(node.node_ip_address, node.node_manager_port, include_memory_info=False)
    return int(found.store_stats.object_store_bytes_used)


def until(reached: Callable[[], bool]) -> None:
    """Waits; the test's own time limit ends a hang."""
    while not reached():
        time.sleep(0.05)


def test_a_node_of_two_workers_gets_weights_once_and_while_they_work(
    nodes: Any, tmp_path: Path
) -> None:
    """They are taken over between two pieces: the first answers with what it began under."""
    import ray

    from rlalign.runtime.workers import PolicySource, PolicyWorker

    source = PolicySource(model=Model(title="wide", recipe=Wide()), runtime=RuntimeSettings())
    kind: Any = ray.remote(PolicyWorker)
    kind = kind.options(num_cpus=0, resources={"second": 1}, max_concurrency=2)
    actors = [kind.remote(source, f"rollout {n}") for n in range(2)]
    ray.get([actor.ping.remote() for actor in actors])
    (unit,) = make_units(1)

    def version(number: int) -> Mapping[str, torch.Tensor]:
        own = WidePolicy().weights()
        return {**own, "ballast": torch.full_like(own["ballast"], float(number))}

    def asked(number: int, file: Path, *manifests: Any) -> list[Any]:
        """One piece for each worker; what each has answered, later."""
        work = Wait(unit=unit, file=file)
        return [
            actor.do.options(num_returns=2).remote(work, ("current", number), *manifests)[0]
            for actor in actors
        ]

    # under the first version, both amid a piece
    first = weights.publish(Rows.of(version(1)), limit=2**22)
    gate = tmp_path / "one"
    begun = asked(1, gate, first)
    until((tmp_path / "one.begun").exists)
    size = ray.get(first).bytes
    assert size > 2**25
    assert size <= stored(nodes) < 1.5 * size

    # the second one comes while they work
    second = weights.publish(Rows.of(version(2)), limit=2**22)
    (tmp_path / "two").touch()
    after = asked(2, tmp_path / "two", second)
    until(lambda: stored(nodes) >= 2 * size)
    assert stored(nodes) < 2.5 * size, "twice, for two workers"
    assert not ray.wait(begun, timeout=0)[0]

    gate.touch()
    assert ray.get(begun) == [1.0, 1.0]
    assert ray.get(after) == [2.0, 2.0]
