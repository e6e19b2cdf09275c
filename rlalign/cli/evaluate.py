"""``rlalign evaluate``: any model by folder or name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlalign.alignment.models import Model, find_model
from rlalign.cli.common import folder_option, override_argument

if TYPE_CHECKING:
    from rlalign.config import Run
    from rlalign.core.records import Scored, Weights

MODEL_HELP = (
    "A run folder or the URL of one, a diffusers pipeline folder, or the name of a policy (tiny)."
)

ModelOverrides = Annotated[
    list[str] | None,
    override_argument(
        "Settings of the run file, such as evaluate.prompts=256; those of MODEL as policy.KEY."
    ),
]


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    overrides: ModelOverrides = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Compare with this one; a run's base model when left out.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG",
            help=(
                "Whose prompts, plan and rewards are used; the run folder's own, or the shapes"
                " task, when left out."
            ),
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        folder_option("Where to write; runs/evaluation, or -2 and so on, when left out."),
    ] = None,
) -> None:
    """Measure a model on fixed prompts and noise.

    Writes evaluation.json and evaluation.html: rewards, held-out rewards, diversity, and win rates
    against another model. A setting of MODEL itself is policy.KEY=VALUE.
    """
    from rlalign.learning.checkpoint import disk_errors
    from rlalign.learning.evaluate import write_json
    from rlalign.learning.folders import all_or_nothing, refuse_what_is_there
    from rlalign.report.evaluation import write_page

    # the models, the run that says how to measure them, and the folder
    mine = _with_settings(find_model(model), overrides or [])
    other = find_model(against) if against is not None else _base_of(mine)
    run = _run_for(mine, config, overrides or [])
    reward = None if config is not None else _refitted(mine, run, overrides or [])
    folder = out or _first_free(Path("runs") / "evaluation")
    refuse_what_is_there(folder, "name another with --out DIR")
    base, aligned, result = _compare(mine, other, run, reward)
    with disk_errors(folder), all_or_nothing(folder) as unfinished:
        write_json(unfinished / "evaluation.json", result)
        write_page(unfinished / "evaluation.html", result, base, aligned, run.evaluate.grid)
    _print_metrics(result)
    print(f"report: {folder / 'evaluation.html'}")


def _compare(
    mine: Model, other: Model | None, run: Run, reward: Weights | None
) -> tuple[list[Scored], list[Scored], dict[str, Any]]:
    """The samples of the other model (none where there is none), those of this one, and what
    evaluation.json holds. Both are scored by ``reward`` where a run has fitted one anew."""
    from rlalign.learning.evaluate import compare

    trained = [r.title for r in run.rewards]
    held_out = [r.title for r in run.evaluate.rewards]
    aligned, distance = sample(mine, run, reward)
    base: list[Scored] = []
    if other is None:
        found = _summarise(aligned, trained, held_out, run.evaluate.by)
        result = {"plan": run.plan.model_dump(), **found}
    else:
        base, _ = sample(other, run, reward)
        result = compare(base, aligned, trained, held_out, run.evaluate.by)
        own_base = other.title == mine.title
        result["against"] = f"the base model of {mine.title}" if own_base else other.title
    result = {"model": mine.title, **result}
    if distance is not None:
        result["kl/per_step_gaussian"] = distance
    if run.refit is not None:
        result["refit"] = _tell_of_refit(run.refit.reward, reward)
    return base, aligned, result


def _refitted(model: Model, run: Run, overrides: Sequence[str]) -> Weights | None:
    """The weights of the reward that a run has fitted anew on votes, where its folder has them and
    nobody asks for other rewards."""
    if run.refit is None or model.run_folder is None:
        return None
    if any(one.strip().startswith(("rewards", "refit")) for one in overrides):
        return None
    from rlalign.alignment.refit import last_weights

    return last_weights(run, model.run_folder)


def _tell_of_refit(title: str, reward: Weights | None) -> str:
    """By which weights a reward that a run fits anew has scored."""
    if reward is None:
        return f"{title} is the reward at its path, as it was before any fit on votes"
    return f"{title} is the run's last fit, on votes up to number {reward.version}"


def _with_settings(model: Model, overrides: Sequence[str]) -> Model:
    """The model with other settings of its policy, such as an adapter: the overrides that read
    policy.KEY=VALUE."""
    from rlalign.config import override
    from rlalign.core.registry import build

    data: dict[str, Any] = {"policy": model.recipe.model_dump()}
    own = [one for one in overrides if one.strip().startswith("policy.")]
    for assignment in own:
        override(data, assignment)
    return replace(model, recipe=build("policies", data["policy"], "policy")) if own else model


def _base_of(model: Model) -> Model | None:
    """What a run started from; None for a model that is not a run's."""
    return Model(title=model.title, recipe=model.recipe) if model.run_folder is not None else None


def _run_for(model: Model, config: Path | None, overrides: Sequence[str]) -> Run:
    """The run whose prompts, plan, rewards and device an evaluation uses."""
    from rlalign.config import fill_earlier, load_mapping, locate_run, override, parse_run

    data: dict[str, Any] = {
        "name": "evaluation",
        "prompts": {"name": "shapes"},
        "rewards": [{"name": "shapes"}],
    }
    # unused, and a run file needs one
    data["algorithm"] = {"name": "ddpo"}
    if config is not None:
        data = load_mapping(config)
    elif model.run_folder is not None:
        data = load_mapping(model.run_folder / "config.yaml")
    for assignment in overrides:
        override(data, assignment)
    begun = config is None and model.run_folder is not None
    run = parse_run({**data, "policy": model.recipe})
    return locate_run(fill_earlier(run, {**data, "policy": None}) if begun else run, begun=begun)


def sample(
    model: Model, run: Run, reward: Weights | None = None
) -> tuple[list[Scored], float | None]:
    """The evaluation's prompts and noise under a model, scored, by ``reward`` where a run has
    fitted one anew; and a trained model's distance from where it started."""
    from rlalign.alignment.assemble import check_plan
    from rlalign.alignment.collect import LocalCollect
    from rlalign.core.records import Weights
    from rlalign.learning.evaluate import evaluation_units, kl_to_reference
    from rlalign.networks.devices import usable

    run = run.model_copy(update={"policy": model.recipe})
    policy = model.load(usable(run.runtime.device, "runtime.device"))
    check_plan(run, policy, learns=False)
    prompts = run.prompts.held_out(run.evaluate.prompts)
    units = evaluation_units(prompts, run.plan, run.evaluate.seed, run.samples_per_unit)
    collect = LocalCollect(run)
    weights = Weights(version=0, kind="current", tensors=policy.weights())
    scored = collect.gather(collect.order(units, weights, reward))
    return scored, kl_to_reference(policy, scored) if model.run_folder is not None else None


def _summarise(
    scored: Sequence[Scored], trained: Sequence[str], held_out: Sequence[str], by: str
) -> dict[str, Any]:
    """What ``compare`` says, of one model."""
    from rlalign.learning.evaluate import said_of, scores_by_prompt, summarise

    samples = [
        {**said_of(prompt), "aligned": scores}
        for prompt, scores in scores_by_prompt(scored, ["total", *trained, *held_out])
    ]
    return {
        "prompts": len(samples),
        "aligned": summarise(scored, trained, held_out, by),
        "samples": samples,
    }


def _print_metrics(result: Mapping[str, Any]) -> None:
    """The metrics as lines."""
    for key, value in result["aligned"].items():
        line = f"{key:<28} {value:.4f}"
        if "base" in result:
            line += f"   against {result['base'][key]:.4f}   gain {result['gain'][key]:+.4f}"
        print(line)
    for title, rate in result.get("win_rate", {}).items():
        print(f"{'win rate ' + title:<28} {100 * rate:.1f} % of {result['prompts']}")
    if "refit" in result:
        print(result["refit"])


def _first_free(folder: Path) -> Path:
    """The first of DIR, DIR-2, DIR-3 that is not there."""
    number = 1
    found = folder
    while found.exists():
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found
