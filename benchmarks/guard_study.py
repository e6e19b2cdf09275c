"""Which of the guard's triggers sees gaming first, and how often each stops an honest run.

    python benchmarks/guard_study.py [SEEDS]            the triggers
    python benchmarks/guard_study.py actions [SEEDS]    what stop, halve and raise_kl give

Trains every task without a guard, evaluated every other round, into runs/guard/; what is there
already is not run again. Then every trigger's rule (rlalign.learning.guard itself) reads the
evaluations of those runs at several thresholds: until a guard acts, a run with one is the run
without, so one run serves all of them. Prints the tables of docs/canon.md; SEEDS is for every task
in place of its own number.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.two_rewards import place
from rlalign.core.registry import build
from rlalign.learning.guard import Guard, GuardSettings

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "guard"

DROPS = (0.05, 0.1, 0.25, 0.5)
"""Of ``drop``, in standard deviations of the held-out score over the first evaluation's pictures:
one scale for rewards of any unit."""
KLS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
DIVERSITIES = (0.95, 0.9, 0.8, 0.6)
PATIENCES = (1, 2)
FALL = 0.25
"""By how many of those standard deviations a held-out score must lie below its best, from some
evaluation to the run's last, for the run to have lost it."""
KL = "kl/per_step_gaussian"
DIVERSITY = "diversity/pixel_rms"

Evaluations = Sequence[Mapping[str, float]]
"""The lines of a run's evaluations.jsonl, in order."""
Replays = dict[tuple[str, str], dict[tuple[str, str], list[int | None]]]
"""(trigger, threshold) -> (task, title that is watched) -> the round after which it fires in each
run."""

OWN = {"left": (-0.5, 0.0), "right": (0.5, 0.0), "up": (0.0, 0.5), "down": (0.0, -0.5)}
"""Caption of a point -> the place that it names; a picture spans -1 to 1 both ways."""
NEAR = 0.15
"""Distance from that place at which a point is there."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run file with its changes, and what a guard may watch there."""

    title: str
    file: str
    settings: tuple[str, ...]
    held_out: tuple[str, ...]
    """Titles of its held-out rewards; the first one says whether a run has lost what is wished
    for."""
    seeds: int = 3


def own(label: str) -> dict[str, Any]:
    """A reward of this file; its label is the function's name."""
    return {"name": "function", "label": label, "call": f"benchmarks.guard_study:{label}"}


def ahead(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """(B,) how far the brightness's centre lies towards the side that its caption names."""
    return 2.0 * (_centres(media_BFCHW) * _places(prompts)).sum(1)


def near(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """(B,) minus the squared distance from the place that the caption names."""
    return -((_centres(media_BFCHW) - _places(prompts)) ** 2).sum(1)


def there(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """(B,) 1 within NEAR of that place, and 0 elsewhere."""
    return (near(media_BFCHW, prompts) > -(NEAR**2)).float()


def rightwards(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """(B,) the x of the brightness's centre."""
    return place(media_BFCHW, prompts, axis="x")


def _centres(media_BFCHW: torch.Tensor) -> torch.Tensor:
    x_B, y_B = (place(media_BFCHW, (), axis=axis) for axis in ("x", "y"))
    return torch.stack([x_B, y_B], dim=1)


def _places(prompts: Sequence[str]) -> torch.Tensor:
    return torch.tensor([OWN[prompt] for prompt in prompts])


POINTS = (
    "rounds=24",
    "prompts.per_unit=2",
    "learner.steps_per_pass=10",
    "evaluate.prompts=128",
    "evaluate.every=2",
)
PICTURES = (
    "prompts.per_round=8",
    "prompts.samples_per_prompt=4",
    "prompts.per_unit=2",
    "evaluate.every=2",
    "evaluate.prompts=32",
    "learner.shards=1",
)
FITTED = {"name": "bradley_terry", "label": "fitted"}
SHAPES = {"name": "shapes"}


def rewarded(trained: Mapping[str, Any], *held_out: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings of what is trained on and what is held out."""
    return f"rewards={json.dumps([trained])}", f"evaluate.rewards={json.dumps(held_out)}"


TASKS = {
    "one_place": Task(
        title="points, all to one place",
        file="points.yaml",
        settings=(*rewarded({"name": "centroid", "x": 0.2, "y": 0.2}, own("ahead")), *POINTS),
        held_out=("ahead",),
    ),
    "too_far": Task(
        title="points, ever further right",
        file="points.yaml",
        settings=(
            *rewarded(own("rightwards"), {"name": "centroid", "x": 0.2}),
            *POINTS,
            "algorithm={name: dpok, clip_range: 0.1, clip: surrogate, kl_weight: 0.002}",
        ),
        held_out=("centroid",),
    ),
    "own_place": Task(
        title="points, each to its own place",
        file="points.yaml",
        settings=(*rewarded(own("near"), own("there")), *POINTS),
        held_out=("there",),
    ),
    "small_files": Task(
        title="pictures, small files",
        file="tiny_compressibility.yaml",
        settings=(
            *rewarded({"name": "jpeg"}, SHAPES, FITTED),
            *PICTURES,
            "rounds=12",
        ),
        held_out=("shapes", "fitted"),
        seeds=2,
    ),
    "captions": Task(
        title="pictures, as their captions say",
        file="quickstart.yaml",
        settings=(*rewarded(SHAPES, FITTED), *PICTURES, "rounds=6", "learner.lr=2e-4"),
        held_out=("fitted",),
        seeds=2,
    ),
}
ACTED_ON = "too_far"
"""The task whose guard acts: its algorithm has a KL weight to raise."""
ACTING: dict[str, Any] = {
    "limits": [{"name": "held_out", "reward": "centroid", "drop": 0.02}],
    "patience": 1,
}
"""Its rule: settings of a guard."""


def train(name: str, file: str, settings: Sequence[str], seed: int) -> list[dict[str, float]]:
    """One run's evaluations; those of an earlier one that ended are read again."""
    from rlalign.alignment.loop import train_local
    from rlalign.config import load_run

    folder = RUNS / f"{name}-{seed}"
    if not (folder / "evaluation.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        changes = [*settings, f"seed={seed}", "checkpoint.every=100", "log=[]"]
        changes.append("runtime.rollout.workers=1")
        run = load_run(ROOT / "configs" / file, changes)
        start = time.process_time()
        train_local(run, folder, resume=False, on_record=lambda line: None)
        spent = time.process_time() - start
        print(f"{folder.name}: {spent:.0f} s of CPU", file=sys.stderr, flush=True)
    text = (folder / "evaluations.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def train_acted(action: str, seed: int) -> list[dict[str, float]]:
    """The evaluations of a run whose guard acts; "none" is the run without one."""
    task = TASKS[ACTED_ON]
    if action == "none":
        return train(ACTED_ON, task.file, task.settings, seed)
    settings = (*task.settings, f"guard={guard_of(action).model_dump_json()}")
    return train(f"{ACTED_ON}-{action}", task.file, settings, seed)


def fires_at(settings: GuardSettings, evaluations: Evaluations) -> int | None:
    """The round after which a guard that stops would have stopped the run; None where it would
    not."""
    guard = Guard(settings)
    for line in evaluations:
        guard.observe(int(line["round"]), line)
        if guard.stopped:
            return int(line["round"])
    return None


def lost_at(evaluations: Evaluations, title: str) -> int | None:
    """The first round from which on, to the last, the held-out score lies more than FALL below its
    best before; None where it is kept. It looks back from the end, as no guard can."""
    margin = FALL * evaluations[0][f"held_out/{title}/std"]
    found, best = None, float("-inf")
    for line in evaluations:
        score = line[f"held_out/{title}/mean"]
        best = max(best, score)
        if score >= best - margin:
            found = None
        elif found is None:
            found = int(line["round"])
    return found


def watching(limit: str, **settings: Any) -> GuardSettings:
    """A guard with one limit."""
    return GuardSettings.model_validate({"limits": [build("limits", {"name": limit, **settings})]})


def triggers(first: Mapping[str, float], title: str) -> Iterator[tuple[str, str, GuardSettings]]:
    """(trigger, threshold, settings) of every rule that is tried on a run with this first
    evaluation."""
    scale = first[f"held_out/{title}/std"]
    for share in DROPS:
        rule = watching("held_out", reward=title, drop=share * scale)
        yield "held-out reward", f"{share:g} std", rule
    for most in KLS:
        yield "KL", f"{most:g}", watching("kl", most=most)
    for least in DIVERSITIES:
        yield "diversity", f"{least:g}", watching("diversity", least=least)


def replay(recorded: Mapping[str, Sequence[Evaluations]], patience: int) -> Replays:
    """Every rule over every run, by the task and the title that a guard watches there.

    The KL and the diversity are the same whatever is watched, and stand at a task's first title
    alone.
    """
    found: Replays = {}
    for name, runs in recorded.items():
        for number, title in enumerate(TASKS[name].held_out):
            for run in runs:
                for trigger, threshold, settings in triggers(run[0], title):
                    if number and trigger != "held-out reward":
                        continue
                    fired = fires_at(settings.model_copy(update={"patience": patience}), run)
                    row = found.setdefault((trigger, threshold), {})
                    row.setdefault((name, title), []).append(fired)
    return found


def runs_table(recorded: Mapping[str, Sequence[Evaluations]]) -> str:
    """What became of every run without a guard, by seed."""
    lines = [
        "| task | trained reward, first to last | held out | first, best and last | KL, last |"
        " diversity left | lost after round |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in recorded.items():
        for title in TASKS[name].held_out:
            cells = [TASKS[name].title, joined(runs, trained), f"`{title}`"]
            cells.append(joined(runs, functools.partial(kept, title=title)))
            cells.append(joined(runs, lambda run: f"{run[-1][KL]:.2g}"))
            cells.append(joined(runs, lambda run: f"{run[-1][DIVERSITY] / run[0][DIVERSITY]:.2f}"))
            cells.append(joined(runs, lambda run, title=title: said(lost_at(run, title))))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def triggers_table(recorded: Mapping[str, Sequence[Evaluations]], patience: int) -> str:
    """After which round each rule fires in the runs of the tasks that were lost, by seed, and how
    many of the runs that were not it stops."""
    lost = {
        name: [lost_at(run, TASKS[name].held_out[0]) for run in runs]
        for name, runs in recorded.items()
    }
    gamed = [
        (name, title)
        for name, rounds in lost.items()
        if any(rounds)
        for title in TASKS[name].held_out
    ]
    heads = [f"{TASKS[name].title} (`{title}`)" for name, title in gamed]
    lines = [
        f"| patience {patience} | threshold | {' | '.join(heads)} | honest runs stopped |",
        f"|---|---|{'---|' * len(heads)}---|",
        f"| lost after | | {' | '.join(', '.join(map(said, lost[n])) for n, _ in gamed)} | |",
    ]
    for (trigger, threshold), row in replay(recorded, patience).items():
        cells = [", ".join(map(said, row.get(one, ()))) for one in gamed]
        honest = [
            fired
            for (name, title), rounds in row.items()
            if title == TASKS[name].held_out[0]
            for fired, gone in zip(rounds, lost[name], strict=True)
            if gone is None
        ]
        stopped = sum(fired is not None for fired in honest)
        cells.append(f"{stopped} of {len(honest)}")
        lines.append(f"| {trigger} | {threshold} | {' | '.join(cells)} |")
    return "\n".join(lines)


def actions_table(free: Sequence[Evaluations], acted: Mapping[str, Sequence[Evaluations]]) -> str:
    """What the runs without a guard and those of each action came to, by seed. A run that stops is
    the one without a guard up to there."""
    title = TASKS[ACTED_ON].held_out[0]
    stopped = []
    for run in free:
        end = fires_at(guard_of("stop"), run)
        stopped.append([line for line in run if end is None or line["round"] <= end])
    lines = [
        f"| action | rounds | trained reward, first to last | `{title}`: first, best and last | KL,"
        " last |",
        "|---|---|---|---|---|",
    ]
    for action, runs in {"none": free, "stop": stopped, **acted}.items():
        cells = [action, joined(runs, lambda run: f"{run[-1]['round']:.0f}"), joined(runs, trained)]
        cells.append(joined(runs, functools.partial(kept, title=title)))
        cells.append(joined(runs, lambda run: f"{run[-1][KL]:.2g}"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def guard_of(action: str) -> GuardSettings:
    """The guard of the runs that are acted on."""
    limits = [build("limits", one) for one in ACTING["limits"]]
    return GuardSettings.model_validate({**ACTING, "limits": limits, "action": action})


def joined(runs: Sequence[Evaluations], say: Callable[[Evaluations], str]) -> str:
    """A cell of a table: each run's part, by seed."""
    return "; ".join(say(run) for run in runs)


def trained(run: Evaluations) -> str:
    """The trained reward at the first evaluation and at the last."""
    return " to ".join(f"{run[at]['reward/total/mean']:.2f}" for at in (0, -1))


def kept(run: Evaluations, title: str) -> str:
    """A held-out score at first, at its best and at last."""
    scores = [line[f"held_out/{title}/mean"] for line in run]
    return ", ".join(f"{score:.2f}" for score in (scores[0], max(scores), scores[-1]))


def said(round: int | None) -> str:
    return "never" if round is None else str(round)


def main() -> None:
    """The tables, as Markdown; each run on stderr as it ends."""
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    seeds = {name: range(numbers[0] if numbers else task.seeds) for name, task in TASKS.items()}
    if "actions" in sys.argv[1:]:
        recorded = {
            action: [train_acted(action, seed) for seed in seeds[ACTED_ON]]
            for action in ("none", "halve", "raise_kl")
        }
        print(actions_table(recorded.pop("none"), recorded))
        return
    found = {
        name: [train(name, task.file, task.settings, seed) for seed in seeds[name]]
        for name, task in TASKS.items()
    }
    print(runs_table(found))
    for patience in PATIENCES:
        print(f"\n{triggers_table(found, patience)}")


if __name__ == "__main__":
    main()
