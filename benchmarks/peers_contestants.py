"""The contestants of `benchmarks/peers.py`: one process each, which does a round when it is told
to.

    python benchmarks/peers_contestants.py CONTESTANT JOB

JOB is JSON: ``overrides`` of the quickstart, and ``threads`` inside an operation (0 leaves torch's
own number). Each line of standard input asks for one round, and is answered by a line of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from rlalign.algorithms._memory import Memory
from rlalign.alignment.assemble import build_learner
from rlalign.alignment.collect import LocalCollect
from rlalign.config import Run, load_run
from rlalign.rewards.jpeg import kilobytes

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
BETWEEN_CHECKPOINTS = 10**9


class Contestant(Protocol):
    """What a process of this benchmark runs."""

    def round(self, number: int) -> dict[str, float]:
        """Does one round: samples, scores, updates. Returns its mean ``reward``, the ``rows`` that
        the denoiser was asked about, and how many of them ``learned``, with a backward pass."""
        ...


class Rlalign:
    """rlalign's loop in one process."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._collect = LocalCollect(run)
        self._learner = build_learner(run)
        self._memory = Memory()

    def round(self, number: int) -> dict[str, float]:
        run = self._run
        start = time.monotonic()
        asked = self._collect.cost.denoiser_calls
        units = run.prompts.units(run.seed, number, run.plan)
        scored = self._collect.gather(self._collect.order(units, self._learner.weights()))
        middle = time.monotonic()
        batch = run.algorithm.make_batch(scored, self._memory)
        metrics = self._learner.update(batch, round=number)
        asked = self._collect.cost.denoiser_calls - asked
        learned = metrics["update_calls"] * run.learner.updates_per_round
        return {
            "reward": float(torch.cat([torch.from_numpy(s.total_B) for s in scored]).mean()),
            "rows": asked + learned,
            "learned": learned,
            "rollout": middle - start,
            "update": time.monotonic() - middle,
            "ratio": metrics["ratio/first_update"],
        }


class Trl:
    """TRL's DDPOTrainer on the same pipeline, with the run's numbers in its own settings."""

    def __init__(self, run: Run) -> None:
        from accelerate import PartialState
        from trl import DDPOTrainer, DefaultDDPOStableDiffusionPipeline  # pyright: ignore

        PartialState(cpu=True)  # its trainer writes to Accelerate's log before it has one
        self._run = run
        self._prompts: Iterator[str] = iter(())
        pipeline = DefaultDDPOStableDiffusionPipeline(
            run.policy.location,  # type: ignore[attr-defined]
            use_lora=False,
        )
        self._trainer = DDPOTrainer(
            config_of(run), self._score, lambda: (next(self._prompts), {}), pipeline
        )
        pipeline.set_progress_bar_config(disable=True)
        self._rewards: list[torch.Tensor] = []
        self._counts = {"rows": 0, "learned": 0}
        pipeline.unet.register_forward_pre_hook(self._count)
        self._steps = 0

    def _score(self, images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, Any]:
        reward = -kilobytes(images[:, None], 95)
        self._rewards.append(reward)
        return reward, {}

    def _count(self, unet: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._counts["rows"] += len(inputs[0])
        self._counts["learned"] += len(inputs[0]) if torch.is_grad_enabled() else 0

    def round(self, number: int) -> dict[str, float]:
        run = self._run
        self._rewards.clear()
        self._counts.update(rows=0, learned=0)
        units = run.prompts.units(run.seed, number, run.plan)
        self._prompts = iter([prompt for unit in units for prompt in unit.prompts])
        self._steps = self._trainer.step(number, self._steps)
        return {"reward": float(torch.cat(self._rewards).mean()), **self._counts}


def config_of(run: Run) -> Any:
    """TRL's settings for the same work: batches of a unit's size, as many updates."""
    from trl import DDPOConfig  # pyright: ignore

    rows = run.samples_per_unit
    samples = run.prompts.per_round * run.prompts.samples_per_prompt
    learner = run.learner
    algorithm: Any = run.algorithm
    adam: Any = learner.optimizer
    return DDPOConfig(
        seed=run.seed,
        log_with=None,
        accelerator_kwargs={"cpu": True},
        mixed_precision="no",
        save_freq=BETWEEN_CHECKPOINTS,
        per_prompt_stat_tracking=False,
        sample_num_steps=run.plan.steps,
        sample_eta=run.plan.eta,
        sample_guidance_scale=run.plan.guidance,
        sample_batch_size=rows,
        sample_num_batches_per_epoch=samples // rows,
        train_batch_size=rows,
        train_gradient_accumulation_steps=samples // rows // learner.updates_per_round,
        train_cfg=run.plan.guidance > 1,
        train_learning_rate=learner.lr,
        train_adam_beta1=adam.betas[0],
        train_adam_beta2=adam.betas[1],
        train_adam_weight_decay=adam.weight_decay,
        train_adam_epsilon=adam.eps,
        train_max_grad_norm=learner.max_grad_norm,
        train_clip_range=algorithm.clip_range,
        train_adv_clip_max=algorithm.advantage_clip,
    )


def timed(contestant: Contestant, number: int) -> dict[str, float]:
    """One round with its seconds, CPU seconds of all threads, and page faults."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.monotonic()
    found = contestant.round(number)
    seconds = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "user": after.ru_utime - before.ru_utime,
        "system": after.ru_stime - before.ru_stime,
        "faults": after.ru_minflt - before.ru_minflt,
        **found,
    }


def main() -> None:
    # what libraries print goes to standard error
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, job = sys.argv[1], json.loads(sys.argv[2])
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    run = load_run(CONFIG, job["overrides"])
    contestant: Contestant = {"rlalign": Rlalign, "trl": Trl}[name](run)
    print(json.dumps({"ready": name}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(contestant, int(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
