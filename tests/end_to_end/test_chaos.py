"""Thirty kills in one run, and four nodes that are taken away with notice: workers, coordinator,
learner and whole nodes of a cluster of several; the result does not change.

    make chaos

A cluster of one head and two nodes on this machine, with the health settings that cluster/ ships,
and one reward worker with a spare. Who is killed when is random with a seed. The run is then asked
to stop, goes on locally for two rounds and must be, bit for bit, the run that nobody disturbed.
Prints how long each kind took to work again: the killed process, and the pool that it belongs to;
and what of it was loading, which depends on the model and not on Ray.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlalign.alignment import control
from rlalign.alignment.loop import train_local
from rlalign.learning import checkpoint
from tests.runs import assert_same_run, small_run
from tests.spot import give_notice

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KILLS = {"rollout": 12, "reward": 8, "coordinator": 4, "learner": 4, "node": 2, "drained node": 4}
NOTICE_SECONDS = 20.0
"""Before a node that drains is killed: the shortest that a cloud gives is 30."""
SEED = 7
CPUS = 3
"""Of a node, as Ray counts. The run reserves 4; two nodes have room for it, however the quarters of
its rewards lie."""
SETTINGS = (
    "rounds=100000",
    "plan.steps=5",
    "evaluate.every=0",
    "checkpoint.every=5",
    "runtime.reward.workers=1",
    "runtime.reward.spares=1",
    "runtime.max_attempts=60",
)


def shipped_health() -> dict[str, int]:
    """The health settings of cluster/ray-env.sh, by Ray's names."""
    text = (Path(__file__).parents[2] / "cluster" / "ray-env.sh").read_text(encoding="utf-8")
    found = re.findall(r"^export RAY_(health_check_\w+)=\$\{RAY_\1:-(\d+)\}$", text, re.MULTILINE)
    assert len(found) == 4
    return {name: int(value) for name, value in found}


@pytest.fixture
def cluster() -> Iterator[Any]:
    from rlalign.runtime.cluster import prepare_environment

    prepare_environment("auto")
    from ray.cluster_utils import Cluster

    found = Cluster(
        initialize_head=True, head_node_args={"num_cpus": CPUS, "_system_config": shipped_health()}
    )
    for _ in range(2):
        found.add_node(num_cpus=CPUS)
    yield found
    import ray

    ray.shutdown()
    found.shutdown()


class Chaos:
    """Kills, and watches how long it takes until the killed one works again."""

    def __init__(self, cluster: Any, folder: Path) -> None:
        self._cluster, self._folder, self._random = cluster, folder, random.Random(SEED)
        self.took: dict[str, list[float]] = {kind: [] for kind in KILLS}
        self.pool: dict[str, list[float]] = {}
        """Seconds until a worker of the same pool works."""
        self.loading: dict[str, list[float]] = {}
        self.left: list[float] = []
        """Seconds from the notice until no worker of a node that drains is left on it, or until its
        end."""
        self.placed: list[float] = []
        """Seconds until the last worker of a killed node began to load elsewhere."""
        self.errors: list[BaseException] = []
        self.redone: list[int] = []
        self.lines: list[dict[str, Any]] = []

    def order(self) -> list[str]:
        kinds = [kind for kind, count in KILLS.items() for _ in range(count)]
        self._random.shuffle(kinds)
        return kinds

    def rounds(self) -> int:
        return len([line for line in list(self.lines) if "round" in line])

    def kill(self, kind: str) -> None:
        import ray

        start = time.monotonic()
        if kind == "node":
            self._until(self._all_answer, 600)
            node, there = self._busy_node()
            start, killed_at = time.monotonic(), time.time()
            self._cluster.remove_node(node, allow_graceful=False)
            for actor, process in there.items():  # a worker may outlive its node by a moment
                self._until(
                    lambda a=actor, p=process: self._process(a, wait=1.0) not in (None, p), 600
                )
            self.took[kind].append(time.monotonic() - start)
            loading = ray.get([a.loading_seconds.remote() for a in there], timeout=600)
            ready_at = ray.get(
                [a.apply.remote(lambda worker: worker.ready_at) for a in there], timeout=600
            )
            began = [ready - took for ready, took in zip(ready_at, loading, strict=True)]
            self.placed.append(max(began, default=killed_at) - killed_at)
            self._cluster.add_node(num_cpus=CPUS)
            self._another_round()
        elif kind == "drained node":
            self._until(self._all_answer, 600)
            node, there = self._busy_node()
            self._drain(node, there)
            self._cluster.add_node(num_cpus=CPUS)
            self._another_round()
        elif kind == "learner":
            process = checkpoint.writer(self._folder)
            before = self.lines[-1]["round"]
            assert process is not None
            os.kill(process, signal.SIGKILL)
            count = self._another_round()
            self.took[kind].append(time.monotonic() - start)
            self.redone.append(before - self.lines[count - 1]["round"] + 1)
        else:
            self._until(lambda: all(self._process(a, wait=5.0) for a in self._actors(kind)), 600)
            actor = self._random.choice(self._actors(kind))
            process, start = self._process(actor), time.monotonic()
            assert process is not None
            name = next(n for n, a in self._named(kind).items() if a == actor)
            os.kill(process, signal.SIGKILL)
            if kind == "reward":
                self._until(lambda: self._scores(name.rpartition("-")[0]), 600)
                self.pool.setdefault(kind, []).append(time.monotonic() - start)
            self._until(lambda: self._process(actor, wait=2.0) not in (None, process), 600)
            self.took[kind].append(time.monotonic() - start)
            if kind != "coordinator":
                self.loading.setdefault(kind, []).append(
                    ray.get(actor.loading_seconds.remote(), timeout=600)
                )

    def _drain(self, node: Any, there: dict[Any, int | None]) -> None:
        """Gives notice to a node, and kills it when the time is over, whether or not its workers
        have left it: on a busy machine they may not have."""
        start = time.monotonic()
        deadline = start + NOTICE_SECONDS
        give_notice(self._cluster.address, node.node_id, NOTICE_SECONDS)

        def is_left() -> bool:
            # a handle of an actor that was ended fails at once
            return not set(there) & {a for k in ("rollout", "reward") for a in self._actors(k)}

        self._until(lambda: is_left() or time.monotonic() > deadline, 600)
        self.left.append(time.monotonic() - start)
        while not self._all_answer() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.took["drained node"].append(time.monotonic() - start)
        time.sleep(max(0.0, deadline - time.monotonic()))
        self._cluster.remove_node(node, allow_graceful=False)

    def _busy_node(self) -> tuple[Any, dict[Any, int | None]]:
        """(a node, not the head, that holds a worker, its workers with their processes); any node
        where none does."""
        import ray

        actors = [actor for kind in ("rollout", "reward") for actor in self._actors(kind)]
        homes = ray.get([actor.node_id.remote() for actor in actors], timeout=600)
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: node.node_id)
        node = self._random.choice([node for node in nodes if node.node_id in homes] or nodes)
        held = [a for a, home in zip(actors, homes, strict=True) if home == node.node_id]
        return node, {actor: self._process(actor) for actor in held}

    def _another_round(self) -> int:
        """Waits for a round after those recorded so far; which number its line has."""
        have = len(self.lines)
        self._until(lambda: len(self.lines) > have, 600)
        return have + 1

    def _actors(self, kind: str) -> list[Any]:
        return list(self._named(kind).values())

    def _named(self, kind: str) -> dict[str, Any]:
        import ray

        found = {}
        for name in sorted(n for n in ray.util.list_named_actors() if f"/{kind}" in n):
            with contextlib.suppress(ValueError):  # ended since it was listed
                found[name] = ray.get_actor(name)
        return found

    def _scores(self, pool: str) -> bool:
        """Whether some worker of a reward's pool scores a picture, now."""
        import ray

        pixels = np.zeros((1, 1, 3, 32, 32), np.uint8)
        asked = [
            a.score.remote({"media": pixels}, ("a red circle",))
            for n, a in self._named("reward").items()
            if pool in n
        ]
        while asked:
            done, asked = ray.wait(asked, timeout=5.0)
            for answer in done:
                try:
                    return bool(np.isfinite(ray.get(answer)[0]).all())
                except ray.exceptions.RayActorError:
                    continue
            if not done:
                return False
        return False

    def _process(self, actor: Any, wait: float = 600.0) -> int | None:
        import ray

        try:
            return ray.get(actor.process_id.remote(), timeout=wait)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return None

    def _all_answer(self) -> bool:
        kinds = ("rollout", "reward", "coordinator")
        return all(self._process(actor, wait=1.0) for kind in kinds for actor in self._actors(kind))

    def _until(self, true: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert not self.errors, f"the run ended: {self.errors[0]}"
            assert time.monotonic() < deadline, f"nothing worked again within {seconds} s"
            time.sleep(0.02)


@pytest.mark.timeout(3600)
def test_thirty_kills_change_nothing(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlalign.runtime import train_on_ray

    folder, run = tmp_path / "run", small_run(*SETTINGS)
    chaos = Chaos(cluster, folder)
    errors = chaos.errors

    def record(line: dict[str, Any]) -> None:
        if "round" in line:
            chaos.lines.append(line)

    def work() -> None:
        try:
            train_on_ray(run, folder, resume=False, on_record=record, address=cluster.address)
        except BaseException as error:  # noqa: BLE001 -- told to the test's thread
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    chaos._until(lambda: chaos.rounds() >= 2 or errors, 600)
    pause = random.Random(SEED + 1)
    for number, kind in enumerate(chaos.order()):
        assert not errors, errors
        with capsys.disabled():
            print(f"{number + 1:3} {kind:12} after {chaos.rounds()} rounds", flush=True)
        chaos.kill(kind)
        time.sleep(pause.uniform(0.0, 1.5))
    chaos._another_round()
    control.ask(folder, stop=True)
    thread.join(timeout=600)
    assert not errors, errors
    assert not thread.is_alive()
    state = control.status_of(folder)
    assert state["state"] == "stopped"
    done = state["round"]
    with capsys.disabled():
        print(
            f"\n{sum(KILLS.values())} accidents in {chaos.rounds()} rounds made, {done} of them"
            " different"
        )
        for kind, seconds in chaos.took.items():
            loading = chaos.loading.get(kind)
            of_it = f", of which loading {statistics.median(loading):.1f} s" if loading else ""
            took = f"{statistics.median(seconds):5.1f} s (at most {max(seconds):.1f} s){of_it}"
            print(f"{kind:12} {len(seconds):3} times, works again after {took}")
        for kind, seconds in chaos.pool.items():
            print(
                f"{kind:12} pool works again after {statistics.median(seconds):.2f} s (at most"
                f" {max(seconds):.2f} s)"
            )
        print(
            "node: noticed and its workers placed elsewhere after"
            f" {[round(s, 1) for s in chaos.placed]} s, net of loading"
        )
        print(
            "drained node: left by its workers after"
            f" {[round(s, 1) for s in chaos.left]} s; {state['nodes']['hours']:.2f} node hours"
        )
        print(
            f"rounds redone after a learner's death: {chaos.redone} (a checkpoint every"
            f" {run.checkpoint.every})"
        )

    for count in ("restarts/rollout", "restarts/reward"):
        counts = [line[count] for line in chaos.lines]
        assert counts == sorted(counts), f"{count} went back: {counts}"
    longer = small_run(*SETTINGS, f"rounds={done + 2}")
    train_local(longer, folder, resume=True, on_record=lambda _: None)
    train_local(longer, tmp_path / "undisturbed", resume=False, on_record=lambda _: None)
    assert_same_run(folder, tmp_path / "undisturbed")
    assert max(chaos.redone) <= run.checkpoint.every
