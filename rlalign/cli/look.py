"""``rlalign list``, ``rlalign check`` and ``rlalign schema``: what starts nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlalign.cli import memory
from rlalign.cli.common import Overrides, file_argument, print_columns
from rlalign.core.registry import (
    SHELVES,
    Description,
    UserError,
    describe,
    nearest,
    shared_settings,
)

if TYPE_CHECKING:
    from rich.table import Table

    from rlalign.config import Run, RuntimeSettings
    from rlalign.policies.base import Policy
    from rlalign.runtime.placement import Bundle
    from rlalign.sampling import Sample

_WIDE = 1000
"""Columns where nobody looks at a terminal: one line per plug-in."""


def list_plugins(
    shelf: Annotated[
        str | None,
        typer.Argument(
            metavar=f"[{'|'.join(SHELVES)}|jobs]",
            help="One shelf, all when left out; or a cluster's jobs.",
        ),
    ] = None,
    address: Annotated[
        str,
        typer.Option(
            metavar="URL", help="With jobs: the cluster's dashboard, as http://127.0.0.1:8265."
        ),
    ] = "",
) -> None:
    """List the plug-ins with their settings and sources, or with jobs the runs on a cluster."""
    from rich.console import Console

    if shelf == "jobs":
        from rlalign.cli.operate import list_jobs

        list_jobs(address)
        return
    if shelf is not None and shelf not in SHELVES:
        raise UserError(f"there is no shelf {shelf!r}; {nearest(shelf, list(SHELVES))}")
    # one line a plug-in where nobody looks at a terminal
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _WIDE
    for one in [shelf] if shelf else SHELVES:
        plugins = describe(one)
        with console.capture() as text:
            console.print(one, style="bold")
            if plugins:
                console.print(_table(plugins))
                common = ", ".join(
                    f"{name}={value}" for name, value in shared_settings(one).items()
                )
                console.print(f"each also takes {common}" if common else "", soft_wrap=True)
            else:
                console.print("nothing here yet")
        print("\n".join(line.rstrip() for line in text.get().splitlines()) + "\n")


def _table(plugins: Sequence[Description]) -> Table:
    from rich.table import Table

    # where weights come from is a column of shelves that have some to fetch
    columns = ["name", "what", "settings", "source"]
    if any(found.weights for found in plugins):
        columns.append("weights")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column == "name", overflow="fold", header_style="dim")
    for found in plugins:
        settings = [
            name if value == "required" else f"{name}={value}"
            for name, value in found.settings.items()
        ]
        row = [found.name, found.summary, ", ".join(settings) or "-", found.source]
        table.add_row(*row, *([found.weights or "-"] if "weights" in columns else []))
    return table


def check(
    config: Annotated[Path, file_argument("A run file, or a sample file.")],
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="A", help="Also: which node of the cluster there would get what."),
    ] = None,
) -> None:
    """Validate a run file or a sample file; start nothing.

    Prints what follows from it. Loads the policy, the rewards and the prompts once, so that what
    they lack shows here and not in the run.
    """
    from rlalign.config import load_mapping

    data = load_mapping(config, overrides or [])
    if address is not None:
        from rlalign.runtime.cluster import answering

        answering(address)  # before what takes long
    describe_file = describe_sample if "sampler" in data else describe_run
    print_columns(describe_file(data, address))
    print("ok")


def describe_run(data: Mapping[str, Any], address: str | None) -> dict[str, str]:
    """What a run file comes to. Raises UserError for what its parts lack, once they are loaded."""
    from rlalign.alignment.assemble import check_plan, differentiable_scorer
    from rlalign.config import locate_run, parse_run, summarise_run
    from rlalign.runtime.reservation import run_bundles

    # load every part once
    run = locate_run(parse_run(data), begun=False, here=address is None)
    pairs = read_prompts_and_pairs(run)
    rewards = load_rewards(run)
    policy, loaded = memory.measure_load(partial(run.policy.load, "cpu"))
    check_plan(run, policy)
    if run.algorithm.eats.sampled_by_loss:
        differentiable_scorer(run, "cpu")

    # say what they come to
    runtime = run.runtime
    needs = memory.needs_of(run, policy, loaded, rewards)
    bundles = run_bundles(run)
    serving = (runtime.reward.workers + runtime.reward.spares) * len(rewards)
    return {
        "run": f"{run.name}: {run.policy.name} with {run.algorithm.name} on {weighted_sum(run)}",
        **summarise_run(run),
        **pairs,
        "parameters": parameters(policy),
        **memory.rows(needs),
        "workers": (
            f"{runtime.rollout.workers} rollout, {serving} reward, {runtime.learner.workers}"
            f" learner; {on_which_devices(runtime)}"
        ),
        "Ray reserves": reserved(bundles),
        "run folder": str(Path("runs") / run.name),
        **where(bundles, runtime.device, needs, address),
    }


def read_prompts_and_pairs(run: Run) -> dict[str, str]:
    """Reads the prompts of a round and of an evaluation, and the set of preferences, of which it
    says how many pairs there are. Raises UserError for what cannot be read."""
    from rlalign.data.pairs.reader import first_pair, open_pairs_of

    run.prompts.units(run.seed, 1, run.plan)
    run.prompts.held_out(run.evaluate.prompts)
    if run.preferences is None:
        return {}
    first_pair(run.preferences)
    reader = open_pairs_of(run.preferences, run.seed)
    return {"preferences": "; ".join(filter(None, [f"{len(reader):,} pairs", reader.note]))}


def load_rewards(run: Run | Sample) -> dict[str, int]:
    """Reward title -> bytes of the tensors that loading it leaves in memory."""
    rewards = run.rewards_for("evaluate")
    return {r.title: memory.measure_load(partial(r.load, "cpu"))[1] for r in rewards}


def weighted_sum(run: Run | Sample) -> str:
    """The rewards that are followed, with their weights."""
    return ", ".join(f"{reward.weight:g} x {reward.title}" for reward in run.rewards)


def reserved(wanted: Sequence[Bundle]) -> str:
    """What every role reserves for each of its workers, and the sum."""
    count = Counter(bundle.role for bundle in wanted)
    each = {bundle.role: str(bundle) for bundle in wanted}
    total: dict[str, float] = {}
    for bundle in wanted:
        for name, amount in bundle.needs.items():
            total[name] = total.get(name, 0.0) + amount
    roles = "; ".join(f"{n} {role} of {each[role]}" for role, n in count.items())
    return f"{roles}; in all {', '.join(f'{amount:g} {name}' for name, amount in total.items())}"


def on_which_devices(runtime: RuntimeSettings) -> str:
    """Where policies and rewards compute, in words."""
    policies = runtime.device
    rewards = runtime.reward_device
    return (
        f"policies and rewards on {policies}"
        if policies == rewards
        else f"policies on {policies}, rewards on {rewards}"
    )


def where(
    bundles: Sequence[Bundle], device: str, needs: memory.Needs, address: str | None
) -> dict[str, str]:
    """Where workers with these bundles would be: on this machine, or the cluster at ``address``."""
    if address is None:
        return on_this_machine(bundles, device, needs)
    return places(bundles, device, needs, address)


def on_this_machine(bundles: Sequence[Bundle], device: str, needs: memory.Needs) -> dict[str, str]:
    """Memory, and whether it can be run here. Raises UserError with the reason where it can neither
    be run here nor on Ray."""
    from rlalign.networks.devices import gpus, lacking
    from rlalign.runtime import cluster, placement

    local = lacking(device, "runtime.device")
    rows = memory.here(bundles, needs)
    try:
        cluster.refuse_device(device, bundles)
    except UserError as error:
        if local:
            raise UserError(f"{local}; on a cluster {error}") from error
        return {**rows, "on Ray": f"refused: {error}"}
    try:
        cluster.refuse_what_is_not_here(bundles, placement.this_machine(bundles, gpus()))
    except UserError as error:
        return {**rows, "on Ray": f"on a cluster; here it is refused: {error}"}
    return rows


def places(
    bundles: Sequence[Bundle], device: str, needs: memory.Needs, address: str
) -> dict[str, str]:
    """Which node gets what. Raises UserError with what is short; joins the cluster and starts
    nothing there."""
    from rlalign.runtime import placement
    from rlalign.runtime.cluster import connect, leave

    connect(bundles, device, address)
    try:
        nodes = placement.cluster_nodes()
        placement.place(bundles, nodes)
        beside = [memory.on_node(node, needs) for node in nodes if node.exists or node.holds]
        table = placement.table(nodes).items()
        return {
            f"at {title}": f"{told}{more}"
            for (title, told), more in zip(table, beside, strict=True)
        }
    finally:
        leave()


def describe_sample(data: Mapping[str, Any], address: str | None) -> dict[str, str]:
    """What a sample file comes to. Raises UserError for what its parts lack, once they are
    loaded."""
    from rlalign.core.locations import locate
    from rlalign.runtime.reservation import sample_bundles
    from rlalign.sampling import check as check_sample
    from rlalign.sampling import parse_sample, ready_policy

    # load every part once
    sample = locate(parse_sample(data), here=address is None)
    sample.sampler.check(sample.unit)
    rewards = load_rewards(sample)
    load_policy = partial(ready_policy, sample.model, "cpu", sample.interpolation)
    policy, loaded = memory.measure_load(load_policy)
    check_sample(sample, policy.path)

    # say what they come to
    needs = memory.Needs(rollout=loaded, rewards=rewards, on_gpu=memory.on_gpu(sample.runtime))
    bundles = sample_bundles(sample)
    method = sample.method
    runtime = sample.runtime
    plan = sample.plan
    settings = method.model_dump(exclude={"name"}, exclude_defaults=True)
    title = sample.model.title
    each = sample.calls_per_look * method.looks(plan)
    back = sample.calls_per_look * method.looks_back(plan)
    calls = f"{sample.pictures * each:,} denoiser calls"
    more = ", and as much again for best-of-N" if sample.compare else ""
    return {
        "sample": f"{sample.name}: {title} with {method.name} on {weighted_sum(sample)}",
        "method": ", ".join(f"{n} {v}" for n, v in settings.items()) or "as it is by default",
        "plan": f"{plan.steps} steps, {plan.rule}, eta {plan.eta:g}, guidance {plan.guidance:g}",
        "denoiser calls a picture": f"about {each:,}, {back:,} of them with a gradient",
        "in all": f"{sample.pictures:,} pictures, about {calls}{more}",
        "pieces": f"of {sample.rows} rows",
        **memory.rows(needs),
        "workers": (
            f"{runtime.rollout.workers} rollout, {runtime.reward.workers * len(rewards)} reward;"
            f" {on_which_devices(runtime)}"
        ),
        "Ray reserves": reserved(bundles),
        "folder": str(Path("runs") / sample.name),
        **where(bundles, runtime.device, needs, address),
    }


def parameters(policy: Policy) -> str:
    """How many numbers are trained, of how many."""
    count = sum(p.numel() for p in policy.trainable().values())
    return (
        f"{count:,} trained of {sum(p.numel() for p in policy.network.parameters()):,} in the"
        " denoiser"
    )


def schema() -> None:
    """Print the JSON Schema of a run file.

    An editor that knows it completes and checks run files.
    """
    from rlalign.config import schema as json_schema

    print(json.dumps(json_schema(), indent=2))
