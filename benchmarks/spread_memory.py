"""What a learner's process holds when the trained weights are spread over several of them.

``python benchmarks/spread_memory.py [--layers N] [--processes 1,2,4]`` trains all weights of a
random FLUX for one update in groups of processes on this machine's CPU, AdamW in float32 with an
average of the weights, and prints of the largest process: what it holds after the update, as torch
counts its tensors and as the system counts its memory, and the most that the system counted; of the
metrics how far they are from those of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as group
import torch.multiprocessing as processes

WIDTH = 16
"""Heads of 64 numbers."""


def main() -> None:
    said = argparse.ArgumentParser(description=__doc__)
    said.add_argument("--layers", type=int, default=8)
    said.add_argument("--processes", default="1,2,4")
    asked = said.parse_args()
    counts = [int(count) for count in asked.processes.split(",")]
    spawn = processes.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with spawn.Pool(1) as pool:
            scored = pool.apply(prepare, (folder, asked.layers))
        for count in counts:
            processes.spawn(learn, (count, folder, scored), nprocs=count)
            told = [
                json.loads((folder / f"{count}-{rank}.json").read_text()) for rank in range(count)
            ]
            tell(count, told, json.loads((folder / f"{counts[0]}-0.json").read_text()))


def prepare(folder: Path, layers: int) -> Any:
    """Writes the model, and draws the samples of a round."""
    from diffusers import FluxTransformer2DModel

    from rlalign.alignment.collect import LocalCollect
    from rlalign.core.records import Weights
    from rlalign.networks.random_models import FAMILIES, write_pipeline

    torch.set_num_threads(1)
    write_pipeline(folder / "model", FAMILIES["flux"], seed=1)
    place = folder / "model" / "transformer"
    kind: Any = FluxTransformer2DModel
    config = kind.load_config(place)
    config |= {
        "num_layers": layers // 4,
        "num_single_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": WIDTH,
        "axes_dims_rope": (16, 24, 24),
    }
    torch.manual_seed(1)
    network = kind.from_config(config)
    count = sum(weight.numel() for weight in network.parameters())
    network.save_pretrained(place)
    print(f"{count / 1e6:.0f} M parameters, {4 * count / 1e9:.2f} GB in float32", flush=True)
    run = run_of(folder, 1)
    weights = Weights(version=0, kind="current", tensors=run.policy.load("cpu").weights())
    collect = LocalCollect(run)
    return collect.gather(collect.order(run.prompts.units(run.seed, 1, run.plan), weights))


def run_of(folder: Path, workers: int) -> Any:
    from rlalign.config import parse_run

    return parse_run(
        {
            "name": "memory",
            "rounds": 1,
            "policy": {"name": "flux", "path": str(folder / "model"), "text_tokens": 16},
            "plan": {"steps": 2, "rule": "flow_sde", "eta": 0.7, "height": 16, "width": 16},
            "prompts": {
                "name": "list",
                "prompts": ["red", "blue", "a square", "two circles"],
                "per_round": 4,
                "per_unit": 1,
                "samples_per_prompt": 2,
            },
            "rewards": [{"name": "jpeg"}],
            "algorithm": {"name": "grpo", "kl_weight": 0.1},
            "learner": {"shard": "all", "shards": 4, "updates_per_round": 1, "ema_decay": 0.9},
            "runtime": {"rollout": {"workers": 1}, "learner": {"workers": workers}},
        }
    )


def learn(rank: int, count: int, folder: Path, scored: Any) -> None:
    """One process of a group."""
    from rlalign.algorithms.base import Memory
    from rlalign.alignment.assemble import build_learner
    from rlalign.cli.check.memory import live_tensors

    torch.set_num_threads(1)
    if count > 1:
        os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        group.init_process_group(
            "gloo", f"file://{folder}/store-{count}", rank=rank, world_size=count
        )
    run = run_of(folder, count)
    learner = build_learner(run)
    line = learner.update(run.algorithm.make_batch(scored, Memory()), round=1)
    told = {
        "tensors": sum(live_tensors().values()),
        "now": psutil.Process().memory_info().rss,
        "most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "line": line,
    }
    (folder / f"{count}-{rank}.json").write_text(json.dumps(told))
    if count > 1:
        group.barrier()
        group.destroy_process_group()


def tell(count: int, told: list[Mapping[str, Any]], first: Mapping[str, Any]) -> None:
    tensors, now, most = (max(one[n] for one in told) / 1e9 for n in ("tensors", "now", "most"))
    mine, its = (one["line"]["grad_norm"] for one in (told[0], first))
    print(
        f"{count} processes: tensors {tensors:.2f} GB, memory {now:.2f} GB, at most {most:.2f} GB;"
        f" grad_norm {mine:.6g}, {abs(mine / its - 1):.1e} from the first",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
