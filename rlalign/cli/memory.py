"""How much memory a run's workers hold: what loading leaves behind, what learning adds to it, and
whether there is so much.

An estimate, for ``rlalign check``. Activations, which depend on kernels more than on settings, come
on top.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from rlalign.runtime.roles import ENCODER, LEARNER, ROLLOUT, Role

if TYPE_CHECKING:
    from rlalign.config import Run, RuntimeSettings
    from rlalign.policies.base import Policy
    from rlalign.runtime.placement import Bundle, Node

Loaded = TypeVar("Loaded")

LIBRARIES = 900_000_000
"""Bytes of a worker's process beside its tensors: torch, diffusers and their like (measured on
Linux, torch 2.15)."""

WORTH_LEAVING_OUT = 10**8
"""Bytes of text encoders that are worth a hint."""


def measure_load(load: Callable[[], Loaded]) -> tuple[Loaded, int]:
    """(what was loaded, bytes of the tensors that this has left in memory, whatever holds them)."""
    before = _tensors()
    found = load()
    return found, sum(size for place, size in _tensors().items() if place not in before)


def _tensors() -> dict[int, int]:
    """Address -> bytes of what every tensor in this process stands on."""
    import torch

    # a process has a million objects of some thousand types
    gc.collect()
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, torch.Tensor)}
    found: dict[int, int] = {}
    for thing in (one for one in objects if type(one) in kinds):
        if thing.layout == torch.strided and not thing.is_meta:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes that a worker of each role holds."""

    rollout: int
    rewards: Mapping[str, int]
    """Title -> bytes."""
    learner: int = 0
    """0 where there is none."""
    encoder: int = 0
    """0 where no process encodes for others."""
    round: int = 0
    """Of a round's samples at the learner, in the memory of its machine."""
    on_gpu: frozenset[str] = field(default_factory=frozenset)
    """Roles whose tensors are on a GPU; ``reward`` is all rewards."""

    def of(self, role: Role) -> int:
        """A worker's tensors."""
        if role.reward:
            return self.rewards.get(role.reward, 0)
        held = {LEARNER: self.learner, ROLLOUT: self.rollout, ENCODER: self.encoder}
        return held.get(role, 0)

    def computes_on_gpu(self, role: Role) -> bool:
        """Whether a worker's tensors are on a GPU."""
        return ("reward" if role.reward else role.label) in self.on_gpu

    def in_machine(self, roles: Iterable[Role]) -> int:
        """Memory of a machine that these workers take, a process each: tensors that are not on a
        GPU, and the libraries."""
        found = 0
        for role in roles:
            found += LIBRARIES + (self.round if role == LEARNER else 0)
            found += 0 if self.computes_on_gpu(role) else self.of(role)
        return found


def needs_of(
    run: Run, policy: Policy, loaded: int, rewards: Mapping[str, int], encoder: int = 0
) -> Needs:
    """The needs of a run, of what its policy, its rewards and its ``encoder`` hold once they are
    loaded."""
    # a differentiable reward is loaded by the learner too
    own = sum(rewards[r.title] for r in run.rewards) if run.algorithm.eats.sampled_by_loss else 0
    return Needs(
        learner=loaded - bytes_without(policy, run.learner_parts) + own + learning(run, policy),
        rollout=loaded + trained(policy),  # weights come as a copy of their own
        rewards=rewards,
        encoder=encoder,
        round=of_a_round(run, policy),
        on_gpu=on_gpu(run.runtime),
    )


def bytes_without(policy: Policy, roles: Container[str]) -> int:
    """Bytes of a policy's parts that a process lacks which has these roles alone."""
    family = policy.family
    lacking = [part for name, part in family.parts().items() if family.role_of(name) not in roles]
    return sum(t.nbytes for part in lacking for t in part.state_dict().values())


def on_gpu(runtime: RuntimeSettings) -> frozenset[str]:
    """The roles that compute on a GPU."""
    policies = {"learner", "rollout"} if runtime.device != "cpu" else set[str]()
    rewards = {"reward"} if runtime.reward_device != "cpu" else set[str]()
    encoders = {"encoder"} if runtime.encoder_device != "cpu" else set[str]()
    return frozenset(policies | rewards | encoders)


def trained(policy: Policy) -> int:
    """Bytes of the trained weights."""
    return sum(p.numel() * p.element_size() for p in policy.trainable().values())


def learning(run: Run, policy: Policy) -> int:
    """What a learner holds beside its policy at the worst moment of an update: copies, the
    optimiser's state, gradients."""
    from rlalign.learning.optimisers import bytes_of_state

    algorithm = run.algorithm
    settings = run.learner
    workers = run.runtime.learner.workers
    weights = trained(policy)
    critic = algorithm.critic(policy, run.plan)
    of_critic = list(critic[0].parameters()) if critic else []
    values = sum(p.numel() * p.element_size() for p in of_critic)
    state = bytes_of_state(settings, [*policy.trainable().values(), *of_critic])
    # the weights before the first update, and what is asked for
    copies = 1 + len(algorithm.copies) + (settings.ema_decay > 0)
    # a flat gradient of every own shard stays until the update; beside them either those being
    # computed, one a lane, or, with several learners, a table of all shards and the copy of it that
    # is summed
    own = settings.shards // workers
    lanes = own if run.runtime.device == "cpu" else 1
    beside = 2 * settings.shards if workers > 1 else max(lanes, min(2, own))
    gradients = own + beside
    return copies * weights + values + state + gradients * (weights + values)


def of_a_round(run: Run, policy: Policy) -> int:
    """Latents (float32) and pictures of the larger of a round and an evaluation; a learner of steps
    has latents twice."""

    latent = 4 * (run.plan.steps + 1)
    for size in policy.latent_shape(run.plan):
        latent *= size
    height, width = policy.drawn_size(run.plan)
    picture = 3 * run.plan.frames * height * width
    samples = run.samples_per_round if run.rolls_out else 0
    copies = 2 if run.algorithm.eats.per_step else 1
    return max(samples * (copies * latent + picture), run.evaluate.prompts * (latent + picture))


def rows(needs: Needs) -> dict[str, str]:
    """What each worker holds, in words."""
    learner = (
        f"learner about {megabytes(needs.learner)} and {megabytes(needs.round)} of a round's"
        " samples, "
    )
    rewards = "".join(
        f", {title} worker about {megabytes(size)}" for title, size in needs.rewards.items()
    )
    encoder = f", encoder about {megabytes(needs.encoder)}" if needs.encoder else ""
    return {
        "memory": (
            f"{learner if needs.learner else ''}rollout worker about"
            f" {megabytes(needs.rollout)}{rewards}{encoder}; activations, and"
            f" {megabytes(LIBRARIES)} of libraries a process, come on top"
        ),
    }


def encoder_rows(policy: Policy) -> dict[str, str]:
    """What the text encoders in every process hold, where that is worth a setting."""
    held = bytes_without(policy, ("denoiser", "vae"))
    if held < WORTH_LEAVING_OUT:
        return {}
    return {
        "text encoders": (
            f"{megabytes(held)} in every rollout and learner worker; rlalign encode CONFIG FILE and"
            " policy.embeddings=FILE leave them out"
        )
    }


def here(bundles: Sequence[Bundle], needs: Needs) -> dict[str, str]:
    """What this machine has, and what it would take: in one process, and with every worker in one
    of its own."""
    import psutil

    roles = [bundle.role for bundle in bundles]
    once = list(dict.fromkeys(roles))
    alone = needs.in_machine(once) - LIBRARIES * (len(once) - 1)
    memory = psutil.virtual_memory()
    found = {
        "this machine": (
            f"{megabytes(memory.total)} of memory, {megabytes(memory.available)} of it free;"
            f" --local takes about {megabytes(alone)}{_short(alone, memory.total)}, Ray about"
            f" {megabytes(needs.in_machine(roles))}{_short(needs.in_machine(roles), memory.total)}"
        )
    }
    return found | _gpu_here(bundles, needs, once)


def _gpu_here(bundles: Sequence[Bundle], needs: Needs, roles: Iterable[Role]) -> dict[str, str]:
    """The same of this machine's GPU, where there is one and something is to be on it; a worker may
    fill its share of one."""
    from rlalign.networks import devices

    used = [role for role in roles if needs.computes_on_gpu(role)]
    if not used or not devices.gpus():
        return {}
    # all of them on one card, and each on its share
    size = devices.gpu_memory()
    alone = sum(needs.of(role) for role in used)
    share = {b.role: b.needs.get("GPU", 0.0) for b in bundles}
    each = [
        f"{r} {megabytes(needs.of(r))}{_short(needs.of(r), min(share[r], 1.0) * size)}"
        for r in used
        if share[r]
    ]
    return {
        "this machine's GPU": (
            f"{megabytes(size)}; --local takes about {megabytes(alone)}{_short(alone, size)}"
            + (f", on Ray {', '.join(each)}" if each else "")
        )
    }


def on_node(node: Node, needs: Needs) -> str:
    """What a node's workers take of its memory, where Ray says how much that is."""
    total = node.total.get("memory", 0.0)
    if not total or not node.holds:
        return ""
    taken = needs.in_machine(bundle.role for bundle in node.holds)
    return f"; about {megabytes(taken)} of {megabytes(total)} of memory{_short(taken, total)}"


def _short(needed: float, has: float) -> str:
    return f" (short by {megabytes(needed - has)})" if needed > has else ""


def megabytes(count: float) -> str:
    """Bytes for people: 1 MB is 10^6."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
