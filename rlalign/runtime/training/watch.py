"""Ray Train's watch over the learner's nodes, on the driver's node.

The watcher is a process that asks which nodes drain and tells the learner's group: where a round
outlasts the notice, the group then starts again elsewhere at the deadline, and not when Ray has
missed the node. Ray Train puts it on any node of the cluster, since it reserves nothing. There it
keeps a node from being idle, so that an autoscaler never ends it, and may go with the very node
that it should tell of.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class WatchHere(PreemptionCallback):
    """Has the watcher of each group of learners live on the node of Ray Train's controller, which
    is the driver's."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Starts a watcher for the nodes of a group."""
        self._stop_watcher()
        nodes: dict[str, list[int]] = {}
        actors = {}
        for worker in worker_group.get_workers():
            rank = worker.distributed_context.world_rank
            nodes.setdefault(worker.metadata.node_id, []).append(rank)
            actors[rank] = worker.actor

        here = ray.get_runtime_context().get_node_id()
        kind: Any = ray.remote(num_cpus=0, max_restarts=-1)(PreemptionWatcher)
        self._watcher = kind.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True)
        ).remote(
            node_to_ranks=nodes,
            poll_interval_s=self._poll_interval_s,
            worker_actors_by_rank=actors,
        )
