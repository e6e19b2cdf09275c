"""Every test-time method on both embedded models at three budgets, and on a trained policy:
rewards, diversity, cost.

    python benchmarks/test_time.py [pictures] [seeds] [--aligned RUN] [--jobs N]

A budget is denoiser calls a picture, a gradient back through one counted as two more. Black-box
methods follow the shapes verifier, the others the fitted reward; both are measured for all. Results
are kept in runs/test_time/, one file each; what is there is not sampled again. Then it writes
docs/test-time-results.md and docs/images/test-time.png. About an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from test_time_page import write_page

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "test_time"
BUDGETS = (40, 80, 160)
VERIFIER = [{"name": "shapes"}]
FITTED = [{"name": "bradley_terry", "label": "fitted"}]
NOISY = {
    "tiny": {"steps": 10, "eta": 1.0},
    "tiny_flow": {"steps": 10, "rule": "flow_sde", "eta": 0.7},
}
FAST = {"tiny_flow": {"t5_tokens": 0}}
"""Settings of an embedded model: without the rows of zeros in T5's place the flow model takes a
fifth of the time."""
QUIET = {"tiny": {"steps": 10, "eta": 0.0}, "tiny_flow": {"steps": 10, "rule": "flow_ode"}}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A sampler as configured here."""

    title: str
    sampler: dict[str, Any]
    gradient: bool = False
    quiet: bool = False
    """Whether its chain takes no noise."""
    fixed: bool = False
    """Whether no budget decides its width: it is done once."""


METHODS = (
    Method(title="plain", sampler={"name": "plain"}, fixed=True),
    Method(title="best-of-N", sampler={"name": "best_of_n"}),
    Method(title="best-of-N, pruned", sampler={"name": "best_of_n", "prune": True}),
    Method(title="Demon, tanh", sampler={"name": "demon"}),
    Method(title="Demon, Boltzmann", sampler={"name": "demon", "weights": "boltzmann"}),
    Method(title="SVDD", sampler={"name": "svdd"}),
    Method(title="FK steering", sampler={"name": "fk_steering"}),
    Method(title="LiDAR", sampler={"name": "lidar", "strength": 20.0}),
    Method(
        title="classifier guidance", sampler={"name": "classifier_guidance"}, quiet=True, fixed=True
    ),
    Method(title="best-of-N on the fitted reward", sampler={"name": "best_of_n"}, gradient=True),
    Method(
        title="training-free guidance",
        sampler={"name": "training_free", "rho": 0.1, "mu": 0.1},
        gradient=True,
    ),
    Method(title="twisted SMC", sampler={"name": "twisted_smc", "strength": 0.5}, gradient=True),
    Method(
        title="DOODL", sampler={"name": "doodl", "by": "checkpointing"}, gradient=True, quiet=True
    ),
    Method(title="ReNO", sampler={"name": "reno"}, gradient=True, quiet=True),
    Method(title="DNO", sampler={"name": "dno"}, gradient=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="?", type=int, default=32)
    parser.add_argument("seeds", nargs="?", type=int, default=3)
    parser.add_argument(
        "--aligned",
        type=Path,
        default=ROOT / "runs" / "quickstart",
        help="a run folder on the tiny model",
    )
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    if not (given.aligned / "config.yaml").is_file():
        sys.exit(
            f"{given.aligned} is not a run folder; make one with: rlalign train"
            " configs/quickstart.yaml"
        )
    jobs = [
        (model, method, budget, seed)
        for seed in range(given.seeds)
        for model in ("tiny", "tiny_flow", "aligned")
        for method in METHODS
        for budget in ((0,) if method.fixed else BUDGETS)
        if model != "aligned" or not method.gradient
    ]
    # spawned, so that each has threads of its own; imports are paid once for all of a process's
    # samplings
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(sample, *job, given.pictures, given.aligned) for job in jobs]
        results = [one.result() for one in waiting]
    write_page(ROOT / "docs", [r for r in results if r is not None], given.pictures, given.seeds)


def sample(
    model: str, method: Method, budget: int, seed: int, pictures: int, aligned: Path
) -> dict[str, Any] | None:
    """One sampling on one core; None where the budget is too small for the method."""
    import torch

    from rlalign.core.registry import UserError
    from rlalign.sampling import sample_local
    from rlalign.sampling.settings import parse_sample

    torch.set_num_threads(1)
    name = "-".join(
        [model, method.title.replace(" ", "_").replace(",", ""), str(budget), str(seed)]
    )
    folder = RUNS / name
    if not (folder / "sample.json").is_file():
        plans = QUIET if method.quiet else NOISY
        settings: dict[str, Any] = {
            "name": name,
            "seed": seed,
            "policy": (
                str(aligned) if model == "aligned" else {"name": model, **FAST.get(model, {})}
            ),
            "plan": plans["tiny" if model == "aligned" else model],
            "prompts": {"name": "shapes"},
            "pictures": pictures,
            "rewards": FITTED if method.gradient else VERIFIER,
            "held_out": VERIFIER if method.gradient else FITTED,
            "sampler": method.sampler,
            "compare": False,
            "runtime": {"rollout": {"workers": 1}},
        }
        if budget:
            settings["budget"] = {"denoiser_calls": budget}
        try:
            sample_local(parse_sample(settings), folder, lambda record: None)
        except UserError as error:
            if "budget.denoiser_calls must be >=" in str(error):
                return None
            raise
        print(name, flush=True)
    found = json.loads((folder / "sample.json").read_text(encoding="utf-8"))["methods"][0]
    return {
        "model": model,
        "method": method.title,
        "budget": budget,
        "seed": seed,
        "gradient": method.gradient,
        "shapes": found.get("reward/shapes/mean", found.get("held_out/shapes/mean")),
        "fitted": found.get("reward/fitted/mean", found.get("held_out/fitted/mean")),
        "diversity": found["diversity/pixel_rms"],
        **{key: value / pictures for key, value in found["cost"].items()},
    }


if __name__ == "__main__":
    main()
