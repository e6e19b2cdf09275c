"""Nodes that come and go as a cloud's do: notice before one is taken away, and a Ray with an
autoscaler that starts and ends nodes on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FakeMultiNodeProvider,
)
from ray.cluster_utils import AutoscalingCluster

MARK = "RLALIGN_TEST_CLUSTER"


def give_notice(address: str, node: str, seconds: float) -> None:
    """Has a node drain that will be taken away in so many seconds: what ``ray drain-node`` does, as
    a cloud's agent or Kubernetes has it do."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = round((time.time() + seconds) * 1000)
    client: Any = GcsClient(address=address)
    accepted, why = client.drain_node(node, reason, "the cloud takes it away", deadline)
    assert accepted, why


def processes_of(node: Mapping[str, Any]) -> list[psutil.Process]:
    """The raylet of one of ``ray.nodes()`` and what it has started; empty where it is gone."""
    mark = node["RayletSocketName"]
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.exe()).name == "raylet" and any(mark in a for a in process.cmdline()):
                return [process, *process.children(recursive=True)]
    return []


def take_away(node: Mapping[str, Any]) -> None:
    """Ends a node at once, without a word to Ray."""
    for process in processes_of(node):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


class LocalAutoscaling(AutoscalingCluster):
    """Ray's own autoscaling cluster for tests, beside other Rays on this machine: it has its own
    port and ends its own processes alone."""

    def __init__(self, head: dict[str, Any], groups: dict[str, Any], folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._mark = uuid.uuid4().hex
        self._folder = folder
        super().__init__(head, groups, autoscaler_v2=True)

    @property
    def address(self) -> str:
        """Of the head."""
        return f"127.0.0.1:{self._port}"

    def _generate_config(
        self,
        head_resources: dict[str, Any],
        worker_node_types: dict[str, Any],
        autoscaler_v2: bool = False,
        **config_kwargs: Any,
    ) -> dict[str, Any]:
        """Written by hand: Ray's wheel lacks the example that this usually starts from, and the
        provider of that name asks for it too."""
        provider = {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": self.address,
        }
        commands = ("initialization", "setup", "head_setup", "worker_setup")
        commands += ("head_start_ray", "worker_start_ray")
        head = {"resources": head_resources, "node_config": {}, "max_workers": 0}
        return {
            "cluster_name": "local",
            "max_workers": 8,
            "upscaling_speed": 8.0,
            "idle_timeout_minutes": 0.1,
            "provider": provider,
            "auth": {"ssh_user": "nobody"},
            "available_node_types": {**worker_node_types, "ray.head.default": head},
            "head_node_type": "ray.head.default",
            "file_mounts": {},
            "cluster_synced_files": [],
            **{f"{name}_commands": [] for name in commands},
        }

    def start(
        self,
        _system_config: dict[str, Any] | None = None,
        override_env: dict[str, str] | None = None,
    ) -> None:
        """Starts the head, and with it the autoscaler."""
        config = self._folder / "autoscaling.json"
        config.write_text(json.dumps(self._config))
        marks = {
            MARK: self._mark,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }
        given = [
            "--head",
            "--node-ip-address=127.0.0.1",
            f"--port={self._port}",
            f"--autoscaling-config={config}",
            f"--num-cpus={self._head_resources['CPU']}",
            "--include-dashboard=false",
            "--disable-usage-stats",
        ]
        if _system_config is not None:
            given.append(f"--system-config={json.dumps(_system_config)}")
        ray = str(Path(sys.executable).parent / "ray")
        # a raylet may wait in vain for its agent on a busy machine; nodes are tried again anyway
        env = os.environ | marks | (override_env or {})
        while subprocess.run([ray, "start", *given], env=env, check=False).returncode:
            self.shutdown()

    def shutdown(self) -> None:
        """Kills what ``start`` has started, and what that has."""
        mark = f"{MARK}={self._mark}".encode()
        found = True
        while found:
            found = False
            for process in psutil.process_iter():
                with suppress(OSError, psutil.NoSuchProcess):
                    if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                        process.kill()
                        found = True
            time.sleep(0.1)
