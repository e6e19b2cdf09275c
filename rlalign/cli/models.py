"""``rlalign evaluate`` and ``rlalign export``: any model by folder or name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlalign.cli.train import refuse_what_is_there
from rlalign.models import Model, find_model

if TYPE_CHECKING:
    from rlalign.config import Run
    from rlalign.records import Scored

MODEL_HELP = "A run folder, a diffusers pipeline folder, or the name of a policy (tiny)."


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the run file, such as evaluate.prompts=256."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Compare with this one; a run's base model when left out.", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG",
            help="Whose prompts, plan and rewards are used; the run folder's own, or the shapes task, when left out.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where to write; runs/evaluation, or -2 and so on, when left out.", show_default=False
        ),
    ] = None,
) -> None:
    """Measure a model on fixed prompts and noise.

    Writes evaluation.json and evaluation.html: rewards, held-out rewards, diversity, and win rates against another model.
    """
    from rlalign import evaluate as measure
    from rlalign.checkpoint import disk_errors
    from rlalign.cli.page import write_page

    mine = find_model(model)
    other = find_model(against) if against is not None else _base_of(mine)
    run = _run_for(mine, config, overrides or [])
    folder = out or _free(Path("runs") / "evaluation")
    refuse_what_is_there(folder, "name another with --out DIR")
    trained, held_out = [r.title for r in run.rewards], [r.title for r in run.evaluate.rewards]
    aligned, distance = sample(mine, run)
    if other is None:
        result = {"plan": run.plan.model_dump(), **_alone(aligned, trained, held_out)}
        base: list[Scored] = []
    else:
        base, _ = sample(other, run)
        result = measure.compare(base, aligned, trained, held_out)
        result["against"] = other.title if other.title != mine.title else f"the base model of {mine.title}"
    result = {"model": mine.title, **result}
    if distance is not None:
        result["kl/per_step_gaussian"] = distance
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        measure.write_json(folder / "evaluation.json", result)
        write_page(folder / "evaluation.html", result, base, aligned, run.evaluate.grid)
    _say(result)
    print(f"report: {folder / 'evaluation.html'}")


def _base_of(model: Model) -> Model | None:
    """What a run started from; None for a model that is not a run's."""
    return Model(title=model.title, recipe=model.recipe) if model.run_folder is not None else None


def _run_for(model: Model, config: Path | None, overrides: Sequence[str]) -> Run:
    """The run whose prompts, plan, rewards and device an evaluation uses."""
    from rlalign.config import override, parse_run, read_yaml

    data: dict[str, Any] = {"name": "evaluation", "prompts": {"name": "shapes"}, "rewards": [{"name": "shapes"}]}
    data["algorithm"] = {"name": "ddpo"}  # unused, and a run file needs one
    if config is not None:
        data = read_yaml(config)
    elif model.run_folder is not None:
        data = read_yaml(model.run_folder / "config.yaml")
    for assignment in overrides:
        override(data, assignment)
    return parse_run({**data, "policy": model.recipe})


def sample(model: Model, run: Run) -> tuple[list[Scored], float | None]:
    """The evaluation's prompts and noise under a model, scored; and a trained model's distance from where it started."""
    from rlalign.assemble import check_plan
    from rlalign.collect import LocalCollect
    from rlalign.devices import usable
    from rlalign.evaluate import evaluation_units, kl_to_reference
    from rlalign.records import Weights

    run = run.model_copy(update={"policy": model.recipe})
    policy = model.load(usable(run.runtime.device, "runtime.device"))
    check_plan(run, policy, learns=False)
    prompts = run.prompts.held_out(run.evaluate.prompts)
    units = evaluation_units(prompts, run.plan, run.evaluate.seed, run.samples_per_unit)
    collect = LocalCollect(run)
    scored = collect.gather(collect.order(units, Weights(version=0, kind="current", tensors=policy.weights())))
    return scored, kl_to_reference(policy, scored) if model.run_folder is not None else None


def _alone(scored: Sequence[Scored], trained: Sequence[str], held_out: Sequence[str]) -> dict[str, Any]:
    """What ``compare`` says, of one model."""
    from rlalign.evaluate import joined, summarise

    titles = ["total", *trained, *held_out]
    words = [p for s in scored for p in s.unit.prompts]
    scores = {t: joined(scored, t) for t in titles}
    samples = [{"prompt": w, "aligned": {t: float(scores[t][i]) for t in titles}} for i, w in enumerate(words)]
    return {"prompts": len(words), "aligned": summarise(scored, trained, held_out), "samples": samples}


def _say(result: Mapping[str, Any]) -> None:
    """The metrics as lines."""
    for key, value in result["aligned"].items():
        line = f"{key:<28} {value:.4f}"
        if "base" in result:
            line += f"   against {result['base'][key]:.4f}   gain {result['gain'][key]:+.4f}"
        print(line)
    for title, rate in result.get("win_rate", {}).items():
        print(f"{'win rate ' + title:<28} {100 * rate:.1f} % of {result['prompts']}")


def _free(folder: Path) -> Path:
    """The first of DIR, DIR-2, DIR-3 that is not there."""
    number, found = 1, folder
    while found.exists():
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help=MODEL_HELP, show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write.", show_default=False)],
    merged: Annotated[bool, typer.Option("--merged", help="Merge a LoRA and write the whole pipeline.")] = False,
) -> None:
    """Write a folder that plain diffusers loads.

    A pipeline folder where all weights were trained, else the file of a LoRA (with --merged the pipeline too).
    """
    from rlalign.checkpoint import disk_errors

    refuse_what_is_there(folder, "name another folder")
    policy = find_model(run).load("cpu")
    if merged:
        policy = policy.merged()
    with disk_errors(folder):
        policy.save(folder)
    print(f"{folder}: {_loader(folder)} loads it")


def _loader(folder: Path) -> str:
    """The call of diffusers that loads an exported folder; parts that a pipeline lacks must be named to it."""
    if not (folder / "model_index.json").is_file():
        return f"pipeline.load_lora_weights({str(folder)!r})"
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    lacks = [f", {name}=None" for name, kind in index.items() if kind == [None, None] and name.endswith("_3")]
    return f"DiffusionPipeline.from_pretrained({str(folder)!r}{''.join(lacks)})"
