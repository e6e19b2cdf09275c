"""What a run file and a sample file come to, in rows of names and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.cli.check import cards, empty, memory, room, rounds, work
from rlalign.core.registry import UserError
from rlalign.runtime.roles import ENCODER

if TYPE_CHECKING:
    from rlalign.config import Run, RuntimeSettings
    from rlalign.policies.base import Policy
    from rlalign.runtime.placement import Bundle
    from rlalign.sampling import Sample

SMALL = 1_000_000
"""Bytes beside a policy's parts that are not worth a row."""
NOT_READ = "not read"
"""The row that says what was counted and not loaded."""


def describe_run(data: Mapping[str, Any], address: str | None) -> dict[str, str]:
    """What a run file comes to. Raises UserError for what its parts lack, once they are loaded;
    where the policy's weights are not at hand its sizes are counted, and nothing is loaded."""
    from rlalign.config import locate_run, parse_run, summarise_run
    from rlalign.learning.log import check_sinks
    from rlalign.runtime.reservation import run_bundles

    # the parts of the run, loaded or counted
    run = parse_run(data)
    if address is None:
        check_sinks(run.log)
    source = empty.find_source(run.policy)
    if source is None:
        run = locate_run(run, begun=False, here=address is None)
        parts = load_parts(run)
    else:
        parts = count_parts(run, source, here=address is None)

    # say what they come to
    runtime = run.runtime
    policy = parts.policy
    bundles = run_bundles(run)
    serving = (runtime.reward.workers + runtime.reward.spares) * len(run.rewards_for("evaluate"))
    needs = memory.needs_of(
        run, policy, parts.rewards, parts.passes, other=parts.other, encoder=parts.encoder
    )
    return {
        "run": f"{run.name}: {run.policy.name} with {run.algorithm.name} on {weighted_sum(run)}",
        **summarise_run(run),
        **parts.told,
        "parameters": parameters(policy),
        **room.rows(needs),
        **room.encoder_rows(run, policy),
        **cards.card_rows(run, needs),
        **advice(run, policy, needs),
        **rounds.round_rows(run, policy, parts.flops),
        "workers": (
            f"{rollouts(runtime)}, {serving} reward, {runtime.learner.workers}"
            f" learner; {on_which_devices(runtime)}"
        ),
        "Ray reserves": reserved(bundles),
        "run folder": str(Path("runs") / run.name),
        **where(bundles, runtime.device, needs, address),
    }


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What a run is made of, as far as it is read."""

    policy: Policy
    rewards: Mapping[str, int]
    """Title -> bytes."""
    passes: memory.Passes
    flops: rounds.Arithmetic | None
    told: Mapping[str, str]
    """Rows on what was read, and what was not."""
    other: int = 0
    """Bytes that loading the policy has left beside its parts."""
    encoder: memory.Parts = field(default_factory=dict)
    """Of the process that encodes for all others, by part."""


def load_parts(run: Run) -> RunParts:
    """Loads every part of a run once. Raises UserError for what is missing or does not fit."""
    from rlalign.alignment.assemble import check_plan, differentiable_scorer
    from rlalign.alignment.words import encoding_reader

    told = read_prompts_and_pairs(run)
    rewards = load_rewards(run)
    on_cpu = run.runtime.model_copy(update={"device": "cpu"})
    reader, encoder = memory.measure_load(partial(encoding_reader, run.policy, on_cpu))
    policy, loaded = memory.measure_load(partial(run.policy.load, "cpu", reader=reader))
    check_plan(run, policy)
    if run.algorithm.eats.sampled_by_loss:
        differentiable_scorer(run, "cpu")

    # its passes are counted without weights, where its folder says the sizes
    source = empty.folder_source(run.policy)
    passes, flops = memory.Passes(), None
    if source is not None and not run.policy.adapter:
        passes, flops = work.count_passes(run, empty.load_empty(run.policy, source))
    kept = sum(memory.weights_of(policy).values())
    kept += memory.trained(policy) if policy.reference else 0
    other = loaded - kept if loaded - kept > max(SMALL, 0.01 * loaded) else 0
    return RunParts(
        policy=policy,
        rewards=rewards,
        passes=passes,
        flops=flops,
        told=told,
        other=other,
        encoder={"text encoders": encoder} if encoder else {},
    )


def count_parts(run: Run, source: empty.Source, *, here: bool) -> RunParts:
    """The same of a run whose policy's weights are not at hand: sizes alone. What else is not at
    hand is told. Raises UserError for a plan that the policy cannot follow."""
    from rlalign.alignment.assemble import check_plan
    from rlalign.config import locate_run

    policy = empty.load_empty(run.policy, source)
    policy.latent_shape(run.plan)
    passes, flops = work.count_passes(run, policy)
    rewards, unread = count_rewards(run)
    unread.insert(0, f"weights of the policy: its sizes are those of {source.sizes}")

    # what algorithm and plan are checked with
    told: Mapping[str, str] = {}
    try:
        located = locate_run(run, begun=False, here=here)
        told = read_prompts_and_pairs(located)
    except UserError as error:
        unread.append(f"what a run would be refused for ({error})")
    else:
        check_plan(located, policy)
    return RunParts(
        policy=policy,
        rewards=rewards,
        passes=passes,
        flops=flops,
        told={**told, NOT_READ: "; ".join(unread)},
        encoder=memory.weights_of(policy, memory.loaded_parts(ENCODER, run, policy))
        if run.policy.encodes_in_actor
        else {},
    )


def count_rewards(run: Run) -> tuple[dict[str, int], list[str]]:
    """Reward title -> bytes, of those that load here or whose architecture says it; and in words
    what was not loaded."""
    sizes: dict[str, int] = {}
    unread = []
    for reward in run.rewards_for("evaluate"):
        architecture = getattr(reward, "architecture", "")
        architecture = architecture or ARCHITECTURES.get(reward.name, "")
        if architecture:
            sizes[reward.title] = size_of_towers(architecture)
            unread.append(f"{reward.title}, counted as a {architecture} in float32")
            continue
        try:
            sizes[reward.title] = memory.measure_load(partial(reward.load, "cpu"))[1]
        except UserError as error:
            sizes[reward.title] = 0
            unread.append(f"{reward.title}, which is not counted ({error})")
    return sizes, unread


ARCHITECTURES = {"pickscore": "ViT-H-14"}
"""Reward -> its architecture by open_clip's name, where no setting says it."""


def size_of_towers(architecture: str) -> int:
    """Bytes of a CLIP model in float32. Raises UserError for a name that open_clip does not
    know."""
    import open_clip
    import torch

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise UserError(f"architecture must be one that open_clip knows, got {architecture!r}")
    own = {name: config[name] for name in ("embed_dim", "vision_cfg", "text_cfg")}
    quick = {"quick_gelu": config.get("quick_gelu", False)}
    with torch.device("meta"):
        model = open_clip.CLIP(**own, **quick)
    return sum(4 * parameter.numel() for parameter in model.parameters())


def advice(run: Run, policy: Policy, needs: memory.Needs) -> dict[str, str]:
    """What takes less memory, where a role does not fit: on this machine's GPU or, without one, on
    a card of 80 GB."""
    from rlalign.networks import devices

    has = devices.gpu_memory() if devices.gpus() else 80e9
    return cards.advice_rows(run, policy, needs, has)


def read_prompts_and_pairs(run: Run) -> dict[str, str]:
    """Reads the prompts of a round and of an evaluation, and the set of preferences, of which it
    says how many pairs there are, and which prompts are both trained on and held out. Raises
    UserError for what cannot be read."""
    from rlalign.data.pairs.reader import first_pair, open_pairs_of

    run.prompts.units(run.seed, 1, run.plan)
    run.prompts.held_out(run.evaluate.prompts)
    if run.preferences is None:
        overlap = run.prompts.find_overlap()
        return {} if overlap is None else {"held-out prompts": str(overlap)}
    first_pair(run.preferences, run.plan.frames)
    reader = open_pairs_of(run.preferences, run.seed, run.plan.frames)
    return {"preferences": "; ".join(filter(None, [f"{len(reader):,} pairs", reader.note]))}


def load_rewards(run: Run | Sample) -> dict[str, int]:
    """Reward title -> bytes of the tensors that loading it leaves in memory."""
    rewards = run.rewards_for("evaluate")
    return {r.title: memory.measure_load(partial(r.load, "cpu"))[1] for r in rewards}


def weighted_sum(run: Run | Sample) -> str:
    """The rewards that are followed, with their weights and constraints."""
    parts = []
    for reward in run.rewards:
        limit = "" if reward.at_least is None else f" (at least {reward.at_least:g})"
        parts.append(f"{reward.weight:g} x {reward.title}{limit}")
    combine = getattr(run, "combine", "sum")
    return ", ".join(parts) + ("" if combine == "sum" else f", {combine}")


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


def rollouts(runtime: RuntimeSettings) -> str:
    """How many rollout workers there are, and of how many processes."""
    shard = runtime.rollout.shard
    each = f" of {shard} processes each" if shard > 1 else ""
    return f"{runtime.rollout.workers} rollout{each}"


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
    rows = room.here(bundles, needs)
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
        beside = [room.on_node(node, needs) for node in nodes if node.exists or node.holds]
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
    sample.model.refuse_spread(sample.runtime.rollout.shard)
    sample.sampler.check(sample.unit)
    rewards = load_rewards(sample)
    load_policy = partial(ready_policy, sample.model, "cpu", sample.interpolation)
    policy, loaded = memory.measure_load(load_policy)
    check_sample(sample, policy.path)

    # say what they come to
    needs = memory.needs_of_sample(sample.runtime, policy, rewards, loaded)
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
        **room.rows(needs),
        "workers": (
            f"{rollouts(runtime)}, {runtime.reward.workers * len(rewards)} reward;"
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
