"""What weights cost on their way from the learner to two rollout workers: bytes, and seconds.

    python benchmarks/weights.py [share] [turns]     # share 16: every 16th tensor of the UNet
    python benchmarks/weights.py whole [turns]       # the whole UNet, in bfloat16 alone: 12 GB
    python benchmarks/weights.py bytes               # what is sent of published sizes; no Ray

Sizes are those of published networks (from torch's meta device), numbers are random. Three ways
take turns in one process: *whole*, all tensors in float32 as one object, which a worker copies
before it takes them over; *float32*, what rlalign does in that precision: chunks that are put,
fetched and taken over side by side; and *bfloat16*, the same with what rollouts round anyway sent
rounded. Seconds are from the call that publishes until both workers hold the weights; once the
workers are on the learner's node, once both are on a second one (two raylets of one machine, so the
network is its memory).

So that a machine of 24 GB suffices, tensors of the learner and of the workers lie over one another
in a buffer of ``POOL`` bytes, which no cache holds: what is read and written is the real amount,
what is kept is not.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import torch
from rich.console import Console
from rich.table import Table

from rlalign.networks import lora
from rlalign.networks.precision import rounded_names
from rlalign.networks.random_models import FAMILIES, Size, empty_networks
from rlalign.policies.base import Policy
from rlalign.runtime import weights
from rlalign.runtime.weights import Rows

POOL = 512 * 2**20
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 32
"""At which a LoRA of SDXL's attention has 46 million numbers."""
NETWORKS = (("sdxl", "unet"), ("flux", "transformer"))
Shapes = Mapping[str, torch.Size]


def shapes_of(family: str, part: str, *, rank: int = 0) -> tuple[Shapes, frozenset[str]]:
    """(name -> shape of each trained weight, those that are sent in bfloat16) at the size of the
    published checkpoint; of a LoRA with ``rank``."""
    size: Size = "published"
    network = empty_networks(FAMILIES[family], size)[part]
    if rank:
        lora.attach(network, rank=rank, alpha=0, targets=ATTENTION)
    rounded = rounded_names(network, "bfloat16")
    found = {name: p.shape for name, p in network.named_parameters() if p.requires_grad}
    return found, rounded


def make_tensors(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Random float32 tensors, one over the other where there are too many."""
    largest = max(shape.numel() for shape in shapes.values())
    pool = torch.randn(max(largest, min(POOL // 4, sum(s.numel() for s in shapes.values()))))
    found, at = {}, 0
    for name, shape in shapes.items():
        at = at if at + shape.numel() <= len(pool) else 0
        found[name] = pool[at : at + shape.numel()].view(shape)
        at += shape.numel()
    return found


class Holder:
    """A rollout worker as far as weights go."""

    def __init__(self, shapes: Shapes) -> None:
        torch.set_num_threads(1)
        network = torch.nn.Module()
        for number, tensor in enumerate(make_tensors(shapes).values()):
            network.register_parameter(str(number), torch.nn.Parameter(tensor))
        self._names = dict(zip(shapes, map(str, range(len(shapes))), strict=True))
        family: Any = SimpleNamespace(network=network, device="cpu")
        self._policy = Policy(family, reference={})

    def ping(self) -> None:
        """Answers."""

    def take_whole(self, arrays: Mapping[str, np.ndarray]) -> None:
        """All of them, copied first."""
        copies = {n: torch.from_numpy(np.array(array)) for n, array in arrays.items()}
        self._policy.set_weights({self._names[n]: tensor for n, tensor in copies.items()})

    def take_chunks(self, manifest: weights.Manifest) -> None:
        """Chunk by chunk, as PolicyWorker does."""
        rows = weights.receive([manifest])
        self._policy.set_rows((self._names[n], tensor, first) for n, tensor, first in rows)


@contextmanager
def cluster(store_bytes: int) -> Iterator[None]:
    """A head, where this process is, and a second node with a store of the same size."""
    from rlalign.runtime.cluster import prepare_environment

    prepare_environment(None)
    from ray.cluster_utils import Cluster

    node: Any = {"num_cpus": 2, "object_store_memory": store_bytes}
    head = {**node, "resources": {"first": 2}, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    found.add_node(**node, resources={"second": 2})
    ray.init(address=found.address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
        found.shutdown()


def turn(
    actors: list[Any], tensors: Mapping[str, torch.Tensor], rounded: frozenset[str], how: str
) -> tuple[float, float, int]:
    """(seconds of publishing, seconds until all hold them, bytes in the store of the learner)."""
    start = time.monotonic()
    ref: ray.ObjectRef
    if how == "whole":
        ref = ray.put({name: tensor.cpu().numpy() for name, tensor in tensors.items()})
        size = sum(tensor.nbytes for tensor in tensors.values())
        published = time.monotonic() - start
        ray.get([actor.take_whole.remote(ref) for actor in actors])
    else:
        ref = weights.publish(Rows.of(tensors), rounded if how == "bfloat16" else ())
        published = time.monotonic() - start
        ray.get([actor.take_chunks.remote(ref) for actor in actors])
        manifest: Any = ray.get(ref)
        size = manifest.bytes
    return published, time.monotonic() - start, size


def measure(
    title: str, shapes: Shapes, rounded: frozenset[str], ways: tuple[str, ...], turns: int
) -> list[list[str]]:
    """A row of the table for each place and way; medians after a first turn that warms up."""
    tensors = make_tensors(shapes)
    rows = []
    for place in ("first", "second"):
        kind: Any = ray.remote(num_cpus=0, resources={place: 1})(Holder)
        actors = [kind.remote(shapes) for _ in range(2)]
        ray.get([actor.ping.remote() for actor in actors])
        found: dict[str, list[tuple[float, float, int]]] = {way: [] for way in ways}
        for _ in range(turns + 1):
            for way in ways:
                found[way].append(turn(actors, tensors, rounded, way))
                time.sleep(2.0)  # Ray frees what nobody refers to
        for way in ways:
            published, took, _ = (
                statistics.median(one) for one in zip(*found[way][1:], strict=True)
            )
            where = "the learner's" if place == "first" else "another"
            row = [title, where, way, f"{found[way][0][2] / 1e6:.0f}"]
            rows.append([*row, f"{published:.2f}", f"{took:.2f}"])
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
        for actor in actors:
            ray.kill(actor)
        time.sleep(2.0)
    return rows


def count_bytes() -> list[list[str]]:
    """Of each network, what is sent of it whole and in chunks."""
    rows = []
    for family, part in NETWORKS:
        for rank in (RANK, 0):
            shapes, rounded = shapes_of(family, part, rank=rank)
            counts = {name: shape.numel() for name, shape in shapes.items()}
            whole = 4 * sum(counts.values())
            less = 2 * sum(count for name, count in counts.items() if name in rounded)
            what = f"LoRA, rank {rank}" if rank else "all weights"
            title = f"{FAMILIES[family].title}, {what}"
            millions = f"{sum(counts.values()) / 1e6:.0f}"
            rows.append([title, millions, f"{whole / 1e6:.0f}", f"{(whole - less) / 1e6:.0f}"])
    return rows


def main() -> None:
    torch.set_num_threads(1)
    asked = sys.argv[1] if len(sys.argv) > 1 else "16"
    turns = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    console = Console(width=120)
    if asked == "bytes":
        table = Table("network", "millions of numbers", "MB in float32", "MB as sent in bfloat16")
        for row in count_bytes():
            table.add_row(*row)
        console.print(table)
        return

    # a LoRA, and as much of all weights as memory allows
    lora_shapes, lora_rounded = shapes_of("sdxl", "unet", rank=RANK)
    every, rounded = shapes_of("sdxl", "unet")
    step = 1 if asked == "whole" else int(asked)
    some = dict(list(every.items())[::step])
    ways = ("bfloat16",) if asked == "whole" else ("whole", "float32", "bfloat16")
    largest = sum(shape.numel() for shape in some.values()) * (2 if asked == "whole" else 4)
    part = "SDXL's UNet" if step == 1 else f"every {step}th tensor of SDXL's UNet"
    table = Table("weights", "workers' node", "way", "MB", "published s", "held by both s")
    with cluster(int(1.3 * largest) + 2**29):
        for title, shapes, less in (
            (f"LoRA, rank {RANK}, of SDXL's UNet", lora_shapes, lora_rounded),
            (f"{part} ({sum(s.numel() for s in some.values()) / 1e6:.0f} M)", some, rounded),
        ):
            for row in measure(title, shapes, less, ways, turns):
                table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
