"""Updates of learners that share one denoiser, and samples of processes that ask it in step: of
small random models, in groups of one, two and four processes over gloo.

``python -m tests.networks.spread_runs FOLDER NAME...`` writes what every process of every group
ends with. One process imports the libraries, reads words and forks the learners: each would take
seconds to do so by itself.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from rlalign.algorithms._memory import Memory
from rlalign.alignment.assemble import build_learner
from rlalign.config import Run
from rlalign.core.records import Scored, Unit
from rlalign.data.prompts.file import FilePrompts
from rlalign.diffusion.rollout import denoise_unit
from rlalign.engine.local import LiveRewards, LocalEngine
from rlalign.engine.pieces import Produce
from rlalign.learning.learner import Learner
from rlalign.networks.embeddings import Reader
from rlalign.networks.lockstep import Lockstep
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.networks.sharding import NotLoaded, blocks_of, bytes_of_share, load_together
from rlalign.policies.base import Policy
from tests.policies.family_runs import ODE, PATHS, SETTINGS, policy_of, run_of

GROUPS = (1, 2, 4)
"""Learner processes."""
SHARDS = 4
"""More than the passes of an update, which are three, or no divisor of them: some process has fewer
than others."""
NARROW = {"precision": "bfloat16", "gradient_checkpointing": True}
ROOT = Path(__file__).parents[2]
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
    "flux2_klein": ({"name": "flux2", "text_tokens": 64}, REFERENCE),
    "wan_i2v": ({"text_tokens": 512}, REFERENCE),
}
"""Random model -> what its policy and its algorithm are told."""
ADAPTED = "sd35"
"""The one whose training starts from a saved adapter."""
IN_STEP = ("flux", "wan22", "flux2_klein", "wan_i2v", "pixart")
"""Those that are sampled from too."""
PICTURED = "wan_i2v"
"""The one whose prompts carry pictures."""


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
    if name == PICTURED:
        plan = {**plan, "frames": 5}
    run = run_of({**base, **policy}, {"steps": steps, **plan}, algorithm)
    told = {"shards": SHARDS, "shard": "base", "updates_per_round": 1, "ema_decay": 0.9, **learner}
    prompts: Any = run.prompts.model_copy(update={"per_round": 3})
    if name == PICTURED:
        dealt = prompts.model_dump(include={"per_round", "samples_per_prompt", "per_unit"})
        prompts = FilePrompts(path=str(write_table(folder)), **dealt)
    return run.model_copy(
        update={"prompts": prompts, "learner": run.learner.model_copy(update=told)}
    )


def write_table(folder: Path) -> Path:
    """A table of captions that carry pictures."""
    table = folder / "prompts.jsonl"
    rows = []
    for turn in range(4):
        file = folder / f"{turn}.png"
        Image.linear_gradient("L").rotate(90 * turn).resize((40, 30)).convert("RGB").save(file)
        rows.append({"prompt": f"a {turn}", "image": str(file)})
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return table


def run_alone(program: str, folder: Path, names: Sequence[str]) -> Path:
    """Runs a module in a process of its own, which writes what its groups of processes end with
    into the folder."""
    done = subprocess.run(
        [sys.executable, "-m", program, str(folder), *names],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the processes of every group begin with."""

    run: Run
    reader: Reader | None
    """Gives words in place of text encoders; none where prompts carry more."""
    scored: Sequence[Scored]
    """A round's samples."""
    foretold: dict[int, int]
    """Processes -> bytes of the denoiser that each is to hold."""

    @property
    def units(self) -> list[Unit]:
        """Units of a round, of which the second one takes a step more."""
        found = [one.unit for one in self.scored]
        longer = found[1].plan.model_copy(update={"steps": found[1].plan.steps + 1})
        return [found[0], replace(found[1], plan=longer), *found[2:]]


def start(name: str, run: Run) -> Start:
    """What a whole policy gives to begin with; what it takes to load one is imported then."""
    policy = run.policy.load("cpu")
    family: Any = policy.family
    reader = None if name == PICTURED else lambda text: dict(family.words([text]).tensors)
    run.policy.load("cpu", run.learner_parts, reader)  # as the learners do
    return Start(
        run=run,
        reader=reader,
        scored=collect(run, policy),
        foretold={count: bytes_of_share(policy.network, count)[0] for count in GROUPS},
    )


def collect(run: Run, policy: Policy) -> list[Scored]:
    """The samples of the first round."""
    rewards = LiveRewards(run.rewards, strict=True)
    engine = LocalEngine(policy, [rewards], rows=run.samples_per_unit, parallel=False)
    works = [Produce(unit=unit, version=0) for unit in run.prompts.units(run.seed, 1, run.plan)]
    return [
        Scored(
            unit=work.unit,
            policy_version=0,
            raw=done.value.scores.raw,
            total_B=done.value.scores.total_B,
            trajectory=done.value.trajectory,
            media_BFCHW=done.value.samples["media"],
            seconds={},
        )
        for work, done in zip(works, engine.perform(works), strict=True)
    ]


def learn(begun: Start, learner: Learner) -> dict[str, torch.Tensor]:
    """What a learner ends with after a round: weights and all other state, metrics, how far the
    weights have gone; and the bytes of the denoiser that it holds, counted and as foretold."""
    batch = begun.run.algorithm.make_batch(begun.scored, Memory())
    line = learner.update(batch, round=1)
    found = {f"metrics/{name}": number(value) for name, value in line.items()}
    found["kl"] = number(learner.kl_to_pretrained(learner.weights(), begun.scored[:1]))
    found |= {name: tensor.clone() for name, tensor in learner.state_dict().items()}

    network = learner.policy.network
    weights: list[Any] = [*network.parameters(), *network.buffers()]
    own = [one.to_local() if hasattr(one, "to_local") else one for one in weights]
    found["held"] = torch.tensor(sum(one.untyped_storage().nbytes() for one in own))
    foretold = begun.foretold[learner.accelerator.num_processes]
    return {**found, "foretold": torch.tensor(foretold)}


@torch.no_grad()
def sample(policy: Policy, units: Sequence[Unit], rank: int, count: int) -> dict[str, torch.Tensor]:
    """The latents of this process's units. Where there are others it asks in step with them, and
    the first one has a pass before that fails in its first block."""
    family: Any = policy.family
    networks = list(family.denoisers.values())
    step = None
    if count > 1:
        family.in_turn = True
        step = Lockstep(networks, partial(family.try_out, policy.precision))
    if step is not None and rank == 0:
        failing = blocks_of(networks[0])[0].register_forward_pre_hook(fail)
        try:
            denoise_unit(policy, units[0], 1)
        except ZeroDivisionError:
            step.recover()
        failing.remove()
    found = {}
    for number in range(rank, len(units), count):
        trajectory, clean = denoise_unit(policy, units[number], 1)
        found[f"{number}/latents"] = torch.from_numpy(trajectory.latents_BK1)
        found[f"{number}/log_prob"] = torch.from_numpy(trajectory.log_prob_BK)
        found[f"{number}/clean"] = clean
    if step is not None:
        step.rest()
    return found


def fail(module: torch.nn.Module, told: Any) -> None:
    raise ZeroDivisionError


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
    gc.disable()  # what is imported stays, in every process
    begun = {}
    for name in names:
        write_pipeline(folder / name, FAMILIES[name], seed=1)
        if name == ADAPTED:
            recipe = run_of(policy_of(name, folder / name), PATHS["flow"], REFERENCE).policy
            recipe.load("cpu").save(folder / name / "adapter")
        begun[name] = start(name, run_with(name, folder / name))
    codes = [fork_group(count, partial(work, folder, begun, count), folder) for count in GROUPS]
    return max(map(max, codes))


def work(folder: Path, begun: dict[str, Start], count: int, rank: int) -> None:
    """What one process of a group does, and writes."""
    for name, one in begun.items():
        learner = build_learner(one.run, one.reader)
        save_file(learn(one, learner), folder / f"{name}-{count}-{rank}.safetensors")
        if rank == 0:
            learner.policy.save(folder / f"{name}-{count}-exported")
        if name in IN_STEP:
            made = sample(learner.policy, one.units, rank, count)
            save_file(made, folder / f"{name}-{count}-{rank}-made.safetensors")

    # one of two cannot read what they share
    if count == 2:
        try:
            load_together(lambda: 1 / rank)
        except NotLoaded as error:
            (folder / f"said-{rank}").write_text(str(error), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
