"""How fast learners that hold a part of the weights each write and read a checkpoint, beside plain
files of the same bytes.

``python benchmarks/shards.py FOLDER [--parameters N] [--dtype DTYPE] [--processes N]`` fills
weights with random bits, in matrices of 4096 x 4096 and their vectors. In turns every process
writes the bytes that it holds into a file of its own, and all of them write a checkpoint; both are
on the disk when the clock stops. Then every process reads its file, and its part of the checkpoint,
after the pages of both were dropped from memory (a file system that keeps them anyway gives the
numbers of memory). What was read is compared with what was written. The files are deleted at the
end.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as group
import torch.multiprocessing as processes

from rlalign.learning import checkpoint
from rlalign.learning.checkpoint import Checkpoint
from rlalign.networks.shares import own_part, range_of_rows, read_like

SIDE = 4096
PIECE = 16 << 20


def main() -> None:
    said = argparse.ArgumentParser(description=__doc__)
    said.add_argument("folder", type=Path)
    said.add_argument("--parameters", type=float, default=2.6e9)
    said.add_argument("--dtype", default="bfloat16")
    said.add_argument("--processes", type=int, default=2)
    said.add_argument("--rounds", type=int, default=3)
    asked = said.parse_args()
    folder = asked.folder / f"shards-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        processes.spawn(work, (asked, folder), nprocs=asked.processes)
    finally:
        shutil.rmtree(folder)


def work(rank: int, asked: argparse.Namespace, folder: Path) -> None:
    """One process."""
    torch.set_num_threads(1)
    group.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=asked.processes
    )
    tensors = make_tensors(rank, asked)
    count = sum(tensor.numel() for tensor in tensors.values())
    own = sum(part.numel() * part.element_size() for part in map(own_part, tensors.values()))
    if rank == 0:
        size = count * getattr(torch, asked.dtype).itemsize
        print(
            f"{count / 1e9:.2f} B parameters in {asked.dtype}, {size / 1e9:.2f} GB,"
            f" {asked.processes} processes, {own / 1e9:.2f} GB each"
        )

    # writing, in turns
    plain = folder / f"plain-{rank}"
    seconds: dict[str, list[float]] = {}
    saved = Checkpoint(round=1, tensors=tensors, facts={})
    for _ in range(asked.rounds):
        measure(seconds, "plain write", lambda: write_plain(plain, tensors))
        measure(
            seconds,
            "checkpoint write",
            lambda: checkpoint.save(folder, saved, run_identity="", keep=1),
        )

    # reading, in turns
    for _ in range(asked.rounds):
        drop_pages(folder)
        measure(seconds, "plain read", lambda: read_plain(plain))
        drop_pages(folder)
        measure(seconds, "checkpoint read", lambda: read_checkpoint(folder, tensors))
    if rank == 0:
        tell(seconds, count * getattr(torch, asked.dtype).itemsize)
    group.barrier()
    group.destroy_process_group()


def make_tensors(rank: int, asked: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The weights, of which this process makes its own rows alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (asked.processes,))
    dtype = getattr(torch, asked.dtype)
    bits = np.random.Generator(np.random.SFC64(rank))
    found: dict[str, torch.Tensor] = {}
    for number in range(round(asked.parameters / (SIDE * SIDE + SIDE))):
        for name, shape in (("weight", (SIDE, SIDE)), ("bias", (SIDE,))):
            first, end = range_of_rows(SIDE, asked.processes, rank)
            whole = torch.empty(shape, device="meta")
            words = (end - first) * whole[0].numel() * dtype.itemsize // 8
            rows = torch.from_numpy(bits.integers(0, 2**62, words, dtype=np.int64)).view(dtype)
            found[f"policy/blocks.{number}.{name}"] = DTensor.from_local(
                rows.view(end - first, *shape[1:]),
                mesh,
                [Shard(0)],
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
    return found


def measure(seconds: dict[str, list[float]], what: str, do: Callable[[], object]) -> None:
    """From when all processes begin until the last one is done."""
    group.barrier()
    start = time.perf_counter()
    do()
    group.barrier()
    seconds.setdefault(what, []).append(time.perf_counter() - start)


def write_plain(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    with file.open("wb") as target:
        for part in map(own_part, tensors.values()):
            target.write(part.reshape(-1).view(torch.uint8).numpy().data)
        target.flush()
        os.fsync(target.fileno())


def read_plain(file: Path) -> None:
    buffer = bytearray(PIECE)
    with file.open("rb", buffering=0) as source:
        while source.readinto(buffer):
            pass


def read_checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    found = checkpoint.read_newest(folder).tensors
    for name, tensor in tensors.items():
        read = own_part(read_like(found, name, tensor))
        # bits, as random ones may be no numbers
        first, other = (one.reshape(-1).view(torch.uint8) for one in (read, own_part(tensor)))
        assert torch.equal(first, other), name


def drop_pages(folder: Path) -> None:
    """Asks that no file of a folder is kept in memory."""
    group.barrier()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def tell(seconds: dict[str, list[float]], size: int) -> None:
    for what, each in seconds.items():
        middle = statistics.median(each)
        print(
            f"{what:<18} {middle:6.1f} s  {size / middle / 1e9:5.2f} GB/s  (least {min(each):.1f},"
            f" most {max(each):.1f})"
        )
    for what in ("write", "read"):
        pairs = zip(seconds[f"checkpoint {what}"], seconds[f"plain {what}"], strict=True)
        ratios = sorted(mine / plain for mine, plain in pairs)
        print(
            f"{what}: {statistics.median(ratios):.2f} times the plain one's seconds"
            f" ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"most memory of process 0: {peak:.2f} GB")


if __name__ == "__main__":
    main()
