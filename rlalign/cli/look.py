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
from rlalign.cli.columns import say
from rlalign.registry import SHELVES, Description, UserError, describe, nearest, shared_settings

if TYPE_CHECKING:
    from rich.table import Table

    from rlalign.config import Run, RuntimeSettings
    from rlalign.policies.base import Policy
    from rlalign.runtime.placement import Bundle
    from rlalign.sample import Sample

_WIDE = 1000
"""Columns where nobody looks at a terminal: one line per plug-in."""


def list_plugins(
    shelf: Annotated[
        str | None,
        typer.Argument(
            metavar=f"[{'|'.join(SHELVES)}|jobs]", help="One shelf, all when left out; or a cluster's jobs."
        ),
    ] = None,
    address: Annotated[
        str, typer.Option(metavar="URL", help="With jobs: the cluster's dashboard, as http://127.0.0.1:8265.")
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
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _WIDE
    for one in [shelf] if shelf else SHELVES:
        plugins = describe(one)
        with console.capture() as text:
            console.print(one, style="bold")
            if plugins:
                console.print(_table(plugins))
                common = ", ".join(f"{name}={value}" for name, value in shared_settings(one).items())
                console.print(f"each also takes {common}" if common else "", soft_wrap=True)
            else:
                console.print("nothing here yet")
        print("\n".join(line.rstrip() for line in text.get().splitlines()) + "\n")


def _table(plugins: Sequence[Description]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "what", "settings", "source"):
        table.add_column(column, no_wrap=column == "name", overflow="fold", header_style="dim")
    for found in plugins:
        settings = [name if value == "required" else f"{name}={value}" for name, value in found.settings.items()]
        table.add_row(found.name, found.summary, ", ".join(settings) or "-", found.source)
    return table


def check(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file, or a sample file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override it.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="A", help="Also: which node of the cluster there would get what.")
    ] = None,
) -> None:
    """Validate a run file or a sample file; start nothing.

    Prints what follows from it. Loads the policy, the rewards and the prompts once, so that what they lack shows here and
    not in the run.
    """
    from rlalign.assemble import check_plan, differentiable_scorer
    from rlalign.config import derived, load_mapping, parse_run
    from rlalign.runtime.placement import bundles

    data = load_mapping(config, overrides or [])
    if "sampler" in data:
        say(sample_facts(data, address))
        print("ok")
        return
    run = parse_run(data)
    run.prompts.units(run.seed, 1, run.plan)
    run.prompts.held_out(run.evaluate.prompts)
    rewards = {r.title: memory.held(partial(r.load, "cpu"))[1] for r in run.rewards_for("evaluate")}
    policy, loaded = memory.held(partial(run.policy.load, "cpu"))
    check_plan(run, policy)
    if run.algorithm.eats == "prompts":
        differentiable_scorer(run, "cpu")
    if run.preferences is not None:
        from rlalign.data.preferences import PairReader

        PairReader(run.preferences, run.seed)
    runtime, needs = run.runtime, memory.needs_of(run, policy, loaded, rewards)
    serving = (runtime.reward_workers + runtime.reward_spares) * len(rewards)
    rows = {
        "run": f"{run.name}: {run.policy.name} with {run.algorithm.name} on "
        + ", ".join(f"{reward.weight:g} x {reward.title}" for reward in run.rewards),
        **derived(run),
        "parameters": parameters(policy),
        **memory.rows(needs),
        "workers": f"{runtime.rollout_workers} rollout, {serving} reward, {runtime.learner_workers} learner; "
        f"{on_which_devices(runtime)}",
        "Ray reserves": reserved(bundles(run)),
        "run folder": str(Path("runs") / run.name),
        **(places(run, needs, address) if address else on_this_machine(run, needs)),
    }
    say(rows)
    print("ok")


def reserved(wanted: Sequence[Bundle]) -> str:
    """What every role reserves for each of its workers, and the sum."""
    count = Counter(bundle.role for bundle in wanted)
    each = {bundle.role: str(bundle) for bundle in wanted}
    names = dict.fromkeys(name for bundle in wanted for name in bundle.needs)
    total = ", ".join(f"{sum(b.needs.get(name, 0.0) for b in wanted):g} {name}" for name in names)
    return "; ".join(f"{n} {role} of {each[role]}" for role, n in count.items()) + f"; in all {total}"


def on_which_devices(runtime: RuntimeSettings) -> str:
    """Where policies and rewards compute, in words."""
    policies, rewards = runtime.device, runtime.reward_device
    return (
        f"policies and rewards on {policies}"
        if policies == rewards
        else f"policies on {policies}, rewards on {rewards}"
    )


def on_this_machine(run: Run | Sample, needs: memory.Needs) -> dict[str, str]:
    """Memory, and whether it can be run here. Raises UserError with the reason where it can neither be run here nor on Ray."""
    from rlalign.devices import gpus, lacking
    from rlalign.runtime import cluster, placement

    local = lacking(run.runtime.device, "runtime.device")
    try:
        cluster.refuse_device(run)
    except UserError as error:
        if local:
            raise UserError(f"{local}; on a cluster {error}") from error
        return {**memory.here(run, needs), "on Ray": f"refused: {error}"}
    try:
        cluster.refuse_what_is_not_here(run, placement.this_machine(run, gpus()))
    except UserError as error:
        return {**memory.here(run, needs), "on Ray": f"on a cluster; here it is refused: {error}"}
    return memory.here(run, needs)


def places(run: Run | Sample, needs: memory.Needs, address: str) -> dict[str, str]:
    """Which node gets what. Raises UserError with what is short; joins the cluster and starts nothing there."""
    from rlalign.runtime import placement
    from rlalign.runtime.cluster import connect, leave

    connect(run, address)
    try:
        nodes = placement.cluster_nodes()
        placement.place(placement.bundles(run), nodes)
        beside = [memory.on_node(node, needs) for node in nodes if node.exists or node.holds]
        table = placement.table(nodes).items()
        return {f"at {title}": f"{told}{more}" for (title, told), more in zip(table, beside, strict=True)}
    finally:
        leave()


def sample_facts(data: Mapping[str, Any], address: str | None) -> dict[str, str]:
    """What a sample file comes to. Loads the policy and the rewards once, so that what they lack shows here."""
    from rlalign.runtime.placement import bundles
    from rlalign.sample import check as check_sample
    from rlalign.sample import parse_sample, ready_policy

    sample = parse_sample(data)
    rewards = {r.title: memory.held(partial(r.load, "cpu"))[1] for r in sample.rewards_for("evaluate")}
    policy, loaded = memory.held(partial(ready_policy, sample.model, "cpu", sample.interpolation))
    check_sample(sample, policy.path)
    needs = memory.Needs(rollout=loaded, rewards=rewards, on_gpu=memory.on_gpu(sample.runtime))
    method, runtime, plan = sample.method, sample.runtime, sample.plan
    settings = ", ".join(f"{n} {v}" for n, v in method.model_dump(exclude={"name"}, exclude_defaults=True).items())
    return {
        "sample": f"{sample.name}: {sample.model.title} with {method.name} on "
        + ", ".join(f"{reward.weight:g} x {reward.title}" for reward in sample.rewards),
        "method": settings or "as it is by default",
        "plan": f"{plan.steps} steps, {plan.rule}, eta {plan.eta:g}, guidance {plan.guidance:g}",
        "denoiser calls a picture": f"about {method.calls(plan):,}, {method.backward(plan):,} of them with a gradient",
        "in all": f"{sample.pictures:,} pictures, about {sample.pictures * method.calls(plan):,} denoiser calls"
        + (", and as much again for best-of-N" if sample.compare else ""),
        "pieces": f"of {sample.rows} rows",
        **memory.rows(needs),
        "workers": f"{runtime.rollout_workers} rollout, {runtime.reward_workers * len(sample.rewards_for('evaluate'))} reward; "
        f"{on_which_devices(runtime)}",
        "Ray reserves": reserved(bundles(sample)),
        "folder": str(Path("runs") / sample.name),
        **(places(sample, needs, address) if address else on_this_machine(sample, needs)),
    }


def parameters(policy: Policy) -> str:
    """How many numbers are trained, of how many."""
    count = sum(p.numel() for p in policy.trainable().values())
    return f"{count:,} trained of {sum(p.numel() for p in policy.network.parameters()):,} in the denoiser"


def schema() -> None:
    """Print the JSON Schema of a run file.

    An editor that knows it completes and checks run files.
    """
    from rlalign.config import schema as json_schema

    print(json.dumps(json_schema(), indent=2))
