"""What follows from a Run: the JSON Schema of a run file, and the numbers that ``rlalign check``
prints."""

from __future__ import annotations

from typing import Any

from rlalign.config.settings import PLUGINS, Run
from rlalign.core.registry import load_class, names

_REF = "#/$defs/{model}"


def schema() -> dict[str, Any]:
    """The JSON Schema of a run file, with every plug-in's settings, for completion in an editor."""
    whole = Run.model_json_schema(ref_template=_REF)
    defs: dict[str, Any] = whole.pop("$defs", {})
    for field, shelf in PLUGINS.items():
        whole["properties"][field] = _one_of(shelf, defs)
    rewards = {"type": "array", "items": _one_of("rewards", defs)}
    whole["properties"]["rewards"] = {**rewards, "minItems": 1}
    defs["EvaluateSettings"]["properties"]["rewards"] = rewards
    limits = {"type": "array", "items": _one_of("limits", defs)}
    defs["GuardSettings"]["properties"]["limits"] = limits
    defs["LearnerSettings"]["properties"]["optimizer"] = _one_of("optimizers", defs)
    whole["properties"]["log"] = {"type": "array", "items": _one_of("sinks", defs)}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, "$defs": defs}


def _one_of(shelf: str, defs: dict[str, Any]) -> dict[str, Any]:
    """A plug-in of the shelf by its name, or one kept elsewhere, of which nothing is known; adds
    what they use to ``defs``."""
    options: list[dict[str, Any]] = []
    for name in names(shelf):
        one = load_class(shelf, name).model_json_schema(ref_template=_REF)
        defs.update(one.pop("$defs", {}))
        one["properties"]["name"] = {"const": name, "description": f"a plug-in of rlalign/{shelf}"}
        one["required"] = sorted({*one.get("required", []), "name"})
        options.append(one)
    kept = {
        "type": "string",
        "pattern": ":",
        "description": "package.module:Class of a plug-in kept elsewhere",
    }
    return {
        "oneOf": [*options, {"type": "object", "properties": {"name": kept}, "required": ["name"]}]
    }


def summarise_run(run: Run) -> dict[str, str]:
    """What follows from the settings alone, in words."""
    evaluations = 2 + ((run.rounds - 1) // run.evaluate.every if run.evaluate.every else 0)
    of_rounds = _of_samples(run) if run.preferences is None else _of_pairs(run)
    return {
        **of_rounds,
        **_of_fits(run),
        "evaluations": f"{evaluations:,} of {run.evaluate.prompts} samples",
    }


def _of_fits(run: Run) -> dict[str, str]:
    """What a reward comes to that is fitted anew."""
    refit = run.refit
    if refit is None:
        return {}
    each = "round" if refit.every == 1 else f"{refit.every:,} rounds"
    return {
        f"fits of {refit.reward}": (
            f"one before each {each}, of {refit.fit.updates:,} updates of"
            f" {refit.preferences.pairs_per_round:,} pairs: {refit.preferences.source}"
        )
    }


def _of_pairs(run: Run) -> dict[str, str]:
    """What a run comes to that learns from a set of preferences."""
    preferences = run.preferences
    assert preferences is not None
    pairs = preferences.pairs_per_round
    updates = run.learner.updates_per_round * run.learner.epochs
    passes = f"{preferences.pairs_per_pass:,} in a pass"
    if preferences.resize == "buckets":
        passes = f"at most {passes}, of one bucket"
    return {
        "pairs per round": f"{pairs:,} of {preferences.source}, {passes}",
        "updates per round": f"{updates:,}",
        "in all": (
            f"{run.rounds:,} rounds, {pairs * run.rounds:,} pairs, {updates * run.rounds:,}"
            " updates; no sampling"
        ),
    }


def _of_samples(run: Run) -> dict[str, str]:
    """What a run comes to that learns from samples of its own."""
    learner = run.learner
    prompts = run.prompts
    samples = run.samples_per_round
    updates = learner.updates_per_round * learner.epochs
    calls = samples * run.plan.steps

    # an algorithm of steps takes a unit's steps a few at a time, the others take it as often as
    # they use it
    by_steps = run.algorithm.eats.per_step
    uses = 1 if run.algorithm.eats.sampled_by_loss else run.algorithm.times_noised
    if by_steps:
        uses = -(-run.plan.steps // learner.steps_per_pass)
    passes = run.units_per_round // learner.updates_per_round * uses
    rows = run.samples_per_unit * (learner.steps_per_pass if by_steps else 1)

    guided = run.policy.calls_per_look(run.plan) > 1
    twice = ", each for the caption and for the empty one (guidance)" if guided else ""
    return {
        "samples per round": (
            f"{samples:,} = {prompts.per_round} prompts x {prompts.samples_per_prompt}"
        ),
        "units per round": f"{run.units_per_round:,} of {run.samples_per_unit} samples",
        "denoiser calls per round": f"{calls:,}{twice}",
        "updates per round": f"{updates:,} of {samples // learner.updates_per_round} samples each",
        "passes per update": (
            f"at most {passes:,} of {rows} samples{' and steps' if by_steps else ''}, "
            f"in {learner.shards} shard{'s' if learner.shards > 1 else ''}"
        ),
        "in all": (
            f"{run.rounds:,} rounds, {samples * run.rounds:,} samples,"
            f" {calls * run.rounds:,} denoiser calls,"
            f" {samples * run.rounds * len(run.rewards):,} reward queries, {updates * run.rounds:,}"
            " updates"
        ),
    }
