"""How much memory a run's workers hold, part by part.

Counted for ``rlalign check``. A worker's process has libraries beside its tensors, and kernels take
scratch memory while they work.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rlalign.core.records import kept_latents, moved_latents
from rlalign.diffusion.noise import noise_masks
from rlalign.networks.sharding import bytes_of_share, largest_block, share_of
from rlalign.policies.base import WHOLE
from rlalign.runtime.roles import ENCODER, LEARNER, ROLLOUT, Role

if TYPE_CHECKING:
    from rlalign.config import Run, RuntimeSettings
    from rlalign.policies.base import Policy

Loaded = TypeVar("Loaded")
Parts = Mapping[str, int]
"""Name -> bytes, in the order in which they are told."""

LIBRARIES = 900_000_000
"""Bytes of a worker's process beside its tensors: torch, diffusers and their like (measured on
Linux, torch 2.15)."""
START = "start weights"
GATHERED = "gathered blocks"
SUMMED = "a block's gradients"
ASIDE = "weights set aside"
PASS = "a pass"
STEP = "the optimiser's step"


def measure_load(load: Callable[[], Loaded]) -> tuple[Loaded, int]:
    """(what was loaded, bytes of the tensors that this has left in memory, whatever holds them)."""
    before = live_tensors()
    found = load()
    return found, sum(size for place, size in live_tensors().items() if place not in before)


def live_tensors() -> dict[int, int]:
    """Address -> bytes of what every tensor in this process stands on."""
    # a process has a million objects of some thousand types
    gc.collect()
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, torch.Tensor)}
    found: dict[int, int] = {}
    for thing in (one for one in objects if type(one) in kinds):
        if thing.layout == torch.strided and not thing.is_meta:
            storage = thing.untyped_storage()
            with contextlib.suppress(RuntimeError):  # a compiler's stand-ins lie nowhere
                found[storage.data_ptr()] = storage.nbytes()
    return found


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes that a worker of each role holds, by part."""

    rollout: Parts
    rewards: Mapping[str, int]
    """Title -> bytes."""
    learner: Parts = field(default_factory=dict)
    """Empty where there is none."""
    encoder: Parts = field(default_factory=dict)
    """Empty where no process encodes for others."""
    round: int = 0
    """Of a round's samples at the learner, in the memory of its machine."""
    on_gpu: frozenset[str] = field(default_factory=frozenset)
    """Roles whose tensors are on a GPU; ``reward`` is all rewards."""
    processes: int = 1
    """Of a rollout worker; ``rollout`` is one's."""

    def parts_of(self, role: Role) -> Parts:
        """A worker's tensors by part; of a reward its own name alone."""
        if role.reward:
            return {role.reward: self.rewards.get(role.reward, 0)}
        held = {LEARNER: self.learner, ROLLOUT: self.rollout, ENCODER: self.encoder}
        return held.get(role, {})

    def of(self, role: Role) -> int:
        """A worker's tensors."""
        return sum(self.parts_of(role).values())

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


@dataclass(frozen=True, kw_only=True)
class Passes:
    """The most bytes that passes take beside the weights; 0 where they are not counted."""

    learner: int = 0
    """Of a pass forward and backward."""
    rollout: int = 0
    """Of the larger of a look and of decoding."""


def loaded_parts(role: Role, run: Run, policy: Policy) -> list[str]:
    """Names of the family's parts that a worker of this role loads."""
    family = policy.family
    roles = {ROLLOUT: WHOLE, ENCODER: {"words"}, LEARNER: run.learner_parts}[role]
    wanted = set(roles)
    if role != ENCODER and getattr(run.policy, "embeddings", ""):
        wanted.discard("words")
    return [name for name in family.parts() if family.role_of(name) in wanted]


def weights_of(policy: Policy, names: Iterable[str] | None = None) -> dict[str, int]:
    """Part -> bytes of its weights, of these parts or of all that are loaded."""
    modules = policy.family.parts()
    return {name: _bytes_of(modules[name]) for name in (modules if names is None else names)}


def _bytes_of(module: torch.nn.Module) -> int:
    """Of parameters and buffers; one that stands in two places counts once."""
    tensors = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def needs_of(
    run: Run,
    policy: Policy,
    rewards: Mapping[str, int],
    passes: Passes,
    *,
    other: int = 0,
    encoder: Parts = MappingProxyType({}),
) -> Needs:
    """The needs of a run, of its policy, of what its rewards hold, and of the process that encodes
    for all others; ``other`` are bytes that loading the policy has left beside its parts."""
    gpu = on_gpu(run.runtime)

    # the learner's worst moment is in a pass, or in the optimiser's step
    learner = {**learner_weights(run, policy), **_own("other tensors", other)}
    if run.algorithm.eats.sampled_by_loss:
        learner |= {f"reward {r.title}": rewards[r.title] for r in run.rewards}
    learner |= learning(run, policy)
    step = step_scratch(run, policy)
    lanes = _lanes(run)
    learner |= _own(*max((PASS, passes.learner * lanes), (STEP, step), key=lambda one: one[1]))

    # new weights come as a copy of their own, in the machine's memory
    held = weights_of(policy, loaded_parts(ROLLOUT, run, policy))
    rollout = spread_over(run.runtime.rollout.shard, held, policy) | _own("other tensors", other)
    rollout |= _own(START, trained(policy) if policy.reference else 0)
    rollout |= _own("new weights", 0 if "rollout" in gpu else trained(policy))
    rollout |= _own(PASS, passes.rollout)
    return Needs(
        learner=learner,
        rollout=rollout,
        rewards=rewards,
        encoder=encoder,
        round=of_a_round(run, policy),
        on_gpu=gpu,
        processes=run.runtime.rollout.shard,
    )


def needs_of_sample(
    runtime: RuntimeSettings, policy: Policy, rewards: Mapping[str, int], loaded: int
) -> Needs:
    """The needs of a sampling whose policy has left so many bytes in memory, loaded whole."""
    parts = weights_of(policy)
    parts["other tensors"] = loaded - sum(parts.values())
    shard = runtime.rollout.shard
    held = spread_over(shard, parts, policy)
    return Needs(rollout=held, rewards=rewards, on_gpu=on_gpu(runtime), processes=shard)


def shares_denoiser(run: Run) -> bool:
    """Whether a learner holds a part of the denoiser, and others hold the rest."""
    return run.learner.shard != "none" and run.runtime.learner.workers > 1


def shares_trained(run: Run) -> bool:
    """Whether that is so of the trained weights too, and of all that is kept for each of them."""
    return run.learner.shard == "all" and shares_denoiser(run)


def learner_weights(run: Run, policy: Policy) -> dict[str, int]:
    """Part -> bytes of a learner's weights; of a denoiser that learners share its part, and what it
    gathers of the others' while it computes."""
    found = weights_of(policy, loaded_parts(LEARNER, run, policy))
    if not shares_denoiser(run):
        return found
    held = spread_over(run.runtime.learner.workers, found, policy)
    if not shares_trained(run):
        return held

    # a block's gradients, sorted by who gets them, and those that come from the others
    family: Any = policy.family
    return held | _own(SUMMED, 3 * max(map(largest_block, family.denoisers.values())))


def spread_over(processes: int, weights: Mapping[str, int], policy: Policy) -> dict[str, int]:
    """Part -> bytes, of a process that holds a part of the denoiser and gathers the others' while
    it computes; the weights as they are where there is one."""
    if processes == 1:
        return dict(weights)
    family: Any = policy.family
    shares = {part: bytes_of_share(net, processes) for part, net in family.denoisers.items()}
    own = {part: kept for part, (kept, _) in shares.items()}
    return {**weights, **own, GATHERED: max(gathered for _, gathered in shares.values())}


def _own(name: str, size: int) -> dict[str, int]:
    """A part of its own, where there is something."""
    return {name: size} if size else {}


def on_gpu(runtime: RuntimeSettings) -> frozenset[str]:
    """The roles that compute on a GPU."""
    policies = {"learner", "rollout"} if runtime.device != "cpu" else set[str]()
    rewards = {"reward"} if runtime.reward_device != "cpu" else set[str]()
    encoders = {"encoder"} if runtime.encoder_device != "cpu" else set[str]()
    return frozenset(policies | rewards | encoders)


def trained(policy: Policy) -> int:
    """Bytes of the trained weights."""
    return sum(p.numel() * p.element_size() for p in policy.trainable().values())


def _trained_here(run: Run, policy: Policy) -> list[torch.Tensor]:
    """What a learner holds of the trained weights."""
    own: list[torch.Tensor] = list(policy.trainable().values())
    if not shares_trained(run):
        return own
    return [share_of(weight, run.runtime.learner.workers) for weight in own]


def _critic(run: Run, policy: Policy) -> list[torch.Tensor]:
    """The weights of a value network that the algorithm trains beside the policy."""
    critic = run.algorithm.critic(policy, run.plan)
    return list(critic[0].parameters()) if critic else []


def _lanes(run: Run) -> int:
    """Shards that a learner computes at once."""
    own = run.learner.shards // run.runtime.learner.workers
    if shares_denoiser(run):
        return 1
    return own if run.runtime.device == "cpu" else 1


def learning(run: Run, policy: Policy) -> dict[str, int]:
    """What a learner holds beside its policy in every update: copies, gradients, the optimiser's
    state."""
    algorithm = run.algorithm
    settings = run.learner
    held = _trained_here(run, policy)
    weights = sum(p.numel() * p.element_size() for p in held)
    of_critic = _critic(run, policy)
    values = sum(p.numel() * p.element_size() for p in of_critic)
    state = settings.optimizer.bytes_of_state([*held, *of_critic])

    # one gradient is the sum; others are computed beside it, one a lane. Several learners have a
    # table of all shards, and the sum of all tables, but of gradients that are spread as weights
    lanes = _lanes(run)
    own = settings.shards // run.runtime.learner.workers
    alone = max(lanes, min(2, own))
    together = alone
    if run.runtime.learner.workers > 1:
        together = settings.shards + max(lanes, settings.shards)
    of_policy = alone if shares_trained(run) else together
    return {
        START: weights,  # before the first update: the policy's reference and the run's base
        **{f"copy {kind}": weights for kind in algorithm.copies},
        **_own("average", weights if settings.ema_decay else 0),
        **_own("value network", values),
        "gradients": of_policy * weights + together * values,
        **_own(ASIDE, weights if shares_trained(run) else 0),
        f"{settings.optimizer.name} state": state,
    }


def step_scratch(run: Run, policy: Policy) -> int:
    """What the optimiser takes while it steps."""
    tensors = [*_trained_here(run, policy), *_critic(run, policy)]
    return run.learner.optimizer.bytes_of_step(tensors, run.runtime.device)


def of_a_round(run: Run, policy: Policy) -> int:
    """Latents (float32) and pictures of the larger of a round and an evaluation; a learner of steps
    copies the latents that it learns from, and those of an update's passes again."""
    plan = run.plan
    latent = 4
    for size in policy.latent_shape(plan):
        latent *= size
    noisy = noise_masks(plan)[0]
    kept = len(kept_latents(plan, noisy)) * latent
    copies = 0.0
    if run.algorithm.eats.per_step:
        learned = len(moved_latents(noisy)) if plan.window else plan.steps + 1
        copies = latent * (learned + 2 * sum(noisy) / run.learner.updates_per_round)
    height, width = policy.drawn_size(plan)
    picture = 3 * plan.frames * height * width
    samples = run.samples_per_round if run.rolls_out else 0
    return int(max(samples * (kept + copies + picture), run.evaluate.prompts * (kept + picture)))
