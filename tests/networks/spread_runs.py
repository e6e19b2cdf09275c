"""Updates of learners that share one denoiser: of small random models, in groups of one, two and
four processes over gloo.

``python -m tests.networks.spread_runs FOLDER NAME...`` writes what every process of every group
ends with. One process imports the libraries and forks the learners: each would take seconds to do
so by itself.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlalign.algorithms._memory import Memory
from rlalign.alignment.assemble import build_learner
from rlalign.alignment.collect import LocalCollect
from rlalign.config import Run
from rlalign.core.records import Scored, Weights
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.networks.sharding import NotLoaded, bytes_of_share, load_together
from tests.policies.family_runs import ODE, PATHS, SETTINGS, policy_of, run_of

GROUPS = (1, 2, 4)
"""Learner processes."""
SHARDS = 4
"""More than the passes of an update, which are three, or no divisor of them: some process has fewer
than others."""
NARROW = {"precision": "bfloat16", "gradient_checkpointing": True}
REFERENCE = {"name": "grpo", "kl_weight": 0.1}
BEHAVIOUR = {"name": "diffusion_nft", "draws": 1}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flux": (NARROW, REFERENCE),
    "qwen_image": ({}, REFERENCE),
    "sd35": ({}, BEHAVIOUR),
    "wan": ({"text_tokens": 24, **NARROW}, REFERENCE),
    "wan22": (NARROW, REFERENCE),
    # exported with its adapter merged
    "pixart": ({}, {"name": "ddpo"}),
}
"""Random model -> what its policy and its algorithm are told."""
ADAPTED = "sd35"
"""The one whose training starts from a saved adapter."""


def run_with(name: str, folder: Path, **learner: Any) -> Run:
    """A run of three units a round, whose learners share the denoiser."""
    policy, algorithm = RUNS[name]
    base = {"name": name, "path": str(folder)}
    if name in SETTINGS:
        base = policy_of(name, folder)
    if name == ADAPTED:
        base["adapter"] = str(folder / "adapter")
    plan = {**ODE["flow"], "guidance": 1.0} if algorithm is BEHAVIOUR else PATHS["flow"]
    if name == "pixart":
        plan = PATHS["epsilon"]
    # the last step has no density; of two experts each is asked at one of the others
    steps = 3 if name == "wan22" else 2
    run = run_of({**base, **policy}, {"steps": steps, **plan}, algorithm)
    told = {"shards": SHARDS, "shard": "base", "updates_per_round": 1, "ema_decay": 0.9, **learner}
    return run.model_copy(
        update={
            "prompts": run.prompts.model_copy(update={"per_round": 3}),
            "learner": run.learner.model_copy(update=told),
        }
    )


def collect(run: Run) -> list[Scored]:
    """The samples of the first round; what it takes to load the policy is imported then."""
    weights = Weights(version=0, kind="current", tensors=run.policy.load("cpu").weights())
    collected = LocalCollect(run)
    return collected.gather(collected.order(run.prompts.units(run.seed, 1, run.plan), weights))


def learn(run: Run, scored: Sequence[Scored], export: Path | None) -> dict[str, torch.Tensor]:
    """What a learner ends with after a round: weights and all other state, metrics, how far the
    weights have gone; and the bytes of the denoiser that it holds, counted and as foretold. The
    policy is exported to ``export``."""
    learner = build_learner(run)
    line = learner.update(run.algorithm.make_batch(scored, Memory()), round=1)
    found = {f"metrics/{name}": number(value) for name, value in line.items()}
    found["kl"] = number(learner.kl_to_pretrained(learner.weights(), scored[:1]))
    found |= {name: tensor.clone() for name, tensor in learner.state_dict().items()}

    if export is not None:
        learner.policy.save(export)
    network = learner.policy.network
    weights: list[Any] = [*network.parameters(), *network.buffers()]
    own = [one.to_local() if hasattr(one, "to_local") else one for one in weights]
    found["held"] = torch.tensor(sum(one.untyped_storage().nbytes() for one in own))
    count = learner.accelerator.num_processes
    whole = bytes_of_share(run.policy.load("cpu").network, count)[0]
    return {**found, "foretold": torch.tensor(whole)}


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def join(rank: int, count: int, store: Path) -> None:
    """Makes this process the learner ``rank`` of ``count``."""
    os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": str(count)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count
    )


def fork_group(count: int, work: Callable[[int], None], folder: Path) -> list[int]:
    """Lets ``count`` processes work together; their exit codes."""
    folder.mkdir(exist_ok=True)
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            status = 1
            try:
                if count > 1:
                    join(rank, count, folder / f"store-{count}")
                work(rank)
                status = 0
            except BaseException:  # noqa: BLE001 -- this process ends here, whatever it was
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(folder: Path, names: Sequence[str]) -> int:
    torch.set_num_threads(1)
    runs = {}
    for name in names:
        write_pipeline(folder / name, FAMILIES[name], seed=1)
        if name == ADAPTED:
            recipe = run_of(policy_of(name, folder / name), PATHS["flow"], REFERENCE).policy
            recipe.load("cpu").save(folder / name / "adapter")
        runs[name] = run_with(name, folder / name)
    samples = {name: collect(run) for name, run in runs.items()}
    for count in GROUPS:

        def work(rank: int, count: int = count) -> None:
            for name, run in runs.items():
                export = folder / f"{name}-{count}-exported" if rank == 0 else None
                found = learn(run, samples[name], export)
                save_file(found, folder / f"{name}-{count}-{rank}.safetensors")

        if any(fork_group(count, work, folder)):
            return 1

    # one of two cannot read what they share
    def fail(rank: int) -> None:
        try:
            load_together(lambda: 1 / rank)
        except NotLoaded as error:
            (folder / f"said-{rank}").write_text(str(error), encoding="utf-8")

    return max(fork_group(2, fail, folder / "failing"))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
