"""One optimiser and one update(): shard, accumulate, clip, step, average. Knows no algorithm by
name.

An update's passes are dealt to a fixed number of *shards*. Each shard's gradient is summed on its
own, then the shards are added in order. Shards may run on threads of one process or on several
learner processes: the sum is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import numpy as np
import torch

from rlalign.core.batches import Batch, Pass
from rlalign.core.copies import AtRoundStart, Copy, Decay, Every
from rlalign.core.finite import refuse_update
from rlalign.core.progress import Tell, tell_nobody
from rlalign.core.records import Scored, Weights
from rlalign.core.registry import UserError
from rlalign.diffusion.noise import generator
from rlalign.learning.evaluate import kl_of_unit, mean_kl
from rlalign.learning.gradients import (
    ShardSum,
    are_finite,
    clip_norm,
    take_back,
    take_gradients,
)
from rlalign.learning.lanes import Lane, PassLoss
from rlalign.learning.optimizers.base import pack_state, unpack_state
from rlalign.learning.settings import LearnerSettings
from rlalign.networks.precision import explained, here, start_thread
from rlalign.networks.shares import equal, is_share, own_part, read_like
from rlalign.policies.base import Policy


def _refuse_uneven(shards: int, world: int) -> None:
    """Raises UserError where the learners cannot share the shards out evenly."""
    if shards % world:
        raise UserError(
            f"learner.shards must be a multiple of runtime.learner.workers ({world}), got {shards}"
        )


def _start_weights(policy: Policy) -> Mapping[str, torch.Tensor]:
    """A copy of the trainable weights: the one that the policy keeps as its reference, where they
    are the same."""
    own = policy.trainable()
    kept = policy.reference
    is_kept = own.keys() == kept.keys() and all(equal(kept[n], p) for n, p in own.items())
    return kept if is_kept else policy.weights()


class Learner:
    """The live learner; the same object with one process and with many."""

    def __init__(
        self,
        policy: Policy,
        loss: PassLoss,
        settings: LearnerSettings,
        *,
        seed: int,
        threads: int = 1,
        copies: Mapping[str, Copy] = MappingProxyType({}),
        critic: tuple[torch.nn.Module, float] | None = None,
    ) -> None:
        """``copies`` are kept as an algorithm declares them; ``critic`` is a value network, which
        the loss is given as ``critic``, and its learning rate."""
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=policy.device == "cpu")
        self.policy = policy
        self.loss = loss
        self.settings = settings
        self.seed = seed
        self.copies = copies
        self.version = 0
        self._base = _start_weights(policy)
        self._average = policy.weights() if settings.ema_decay else None
        network, critic_lr = critic or (None, settings.lr)
        slow = [kind for kind, copy in copies.items() if isinstance(copy, Decay)]
        self._snapshots = {kind: policy.weights() for kind in slow}
        policy.snapshots = self._snapshots  # the replicas' too
        first = Lane(policy, network)
        self._own = policy.trainable()
        self._parameters = first.parameters()
        others = [p for n, p in self._parameters.items() if n not in self._own]
        settings.optimizer.refuse_device(policy.device)
        settings.optimizer.refuse_missing()
        groups = [{"params": list(self._own.values())}, {"params": others, "lr": critic_lr}]
        self.optimiser = settings.optimizer.build(groups, settings.lr)
        self._rates = (settings.lr, critic_lr)
        world = self.accelerator.num_processes
        rank = self.accelerator.process_index
        _refuse_uneven(settings.shards, world)
        self._own_shards = range(rank, settings.shards, world)
        # processes that share a denoiser gather its weights, one pass at a time
        lanes = len(self._own_shards) if policy.device == "cpu" and not policy.is_spread else 1
        self._lanes = [first, *(first.replica() for _ in range(lanes - 1))]
        begin = (threads, here(policy.device))
        self._pool = ThreadPoolExecutor(lanes, "lane", initializer=start_thread, initargs=begin)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and publishes weights."""
        return self.accelerator.is_main_process

    def update(self, batch: Batch, *, round: int, tell: Tell = tell_nobody) -> dict[str, float]:
        """All updates of one round; tells how many are done.

        Returns its metrics: loss, grad_norm, the algorithm's own, and ``ratio/first_update``.

        ``update_calls`` is the number of samples that the denoiser was asked about per update.
        """
        collected: list[dict[str, float]] = []

        # some snapshots are of the weights at the start of a round
        for kind, copy in self.copies.items():
            if isinstance(copy, AtRoundStart):
                self._snapshots[kind] = self.policy.weights()

        # each update takes its part of the batch, in a new order each epoch
        parts = min(self.settings.updates_per_round, batch.parts)
        for epoch in range(self.settings.epochs):
            order = generator("shuffle", self.seed, round, epoch).permutation(batch.parts)
            for part in np.array_split(order, self.settings.updates_per_round):
                # a batch may have fewer parts than updates, where samples were dropped
                if len(part):
                    collected.append(self._optimise(batch.pick(part.tolist()), (round, epoch)))
                    tell(len(collected), self.settings.epochs * parts)

        # the other snapshots follow after the updates
        self._move_snapshots(round)
        if not collected:
            return {"grad_norm": 0.0, "loss": 0.0}

        # metrics that every update has, over all updates
        names = sorted(set.intersection(*map(set, collected)))
        fold = {n: max if n in self._maxima else np.mean for n in names}
        metrics = {n: float(fold[n]([c[n] for c in collected])) for n in names}
        if "ratio/max_deviation" in metrics:
            metrics["ratio/first_update"] = collected[0]["ratio/max_deviation"]
        return metrics

    def _optimise(self, part: Batch, draw: tuple[int, int]) -> dict[str, float]:
        """One optimiser update over all passes of ``part``."""
        # the gradient is the same whatever the number of lanes
        passes = list(part.passes(self.settings.steps_per_pass, draw))
        gradient, measured = self._gradient(passes)
        if not are_finite(gradient):
            first = self._lanes[0]
            refuse_update(self.version, (first.loss_of(one, self.loss) for one in passes))

        # the step of the optimiser
        self._place(gradient)
        norm = clip_norm(list(self._own.values()), self.settings.max_grad_norm)
        self._set_rates()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.version += 1
        self._track_average()

        # what all processes measured
        means = self._reduced([m for m, _ in measured], "sum")
        maxima = self._reduced([m for _, m in measured], "max")
        self._maxima = frozenset(maxima)
        return {**means, **maxima, "grad_norm": norm}

    _maxima: frozenset[str] = frozenset()

    def _gradient(
        self, passes: Sequence[Pass]
    ) -> tuple[list[torch.Tensor], list[tuple[dict[str, float], dict[str, float]]]]:
        """The gradient of each parameter over all shards, and what the own shards measured."""
        # each lane takes a shard at a time: the gradients of one a lane are held beside the sum
        total = ShardSum(self.settings.shards, self.accelerator)
        measured = []
        lanes = len(self._lanes)
        for start in range(0, len(self._own_shards), lanes):
            measured += self._add_shards(self._own_shards[start : start + lanes], passes, total)
        return total.result(), measured

    def _add_shards(
        self, shards: Sequence[int], passes: Sequence[Pass], total: ShardSum
    ) -> list[tuple[dict[str, float], dict[str, float]]]:
        """Adds the gradients of a shard a lane, computed side by side; returns what they
        measured."""
        own = [passes[shard :: self.settings.shards] for shard in shards]
        extra = self._extra(shards, passes)
        done = list(self._pool.map(lambda p, lane: self._shard(p, lane, extra), own, self._lanes))
        for shard, (gradients, _, _) in zip(shards, done, strict=True):
            total.add(shard, gradients)
        return [(means, maxima) for _, means, maxima in done]

    def _shard(
        self, passes: Sequence[Pass], lane: Lane, extra: Sequence[Pass] = ()
    ) -> tuple[list[torch.Tensor], dict[str, float], dict[str, float]]:
        """The summed gradient of one shard, a tensor for each parameter, with its weighted means
        and its maxima."""
        # the sums start anew with each shard
        parameters = list(lane.parameters().values())
        calls = lane.policy.meter.calls
        means: dict[str, float] = {}
        maxima: dict[str, float] = {}

        # gradients add up over the passes
        for one in passes:
            with explained():
                loss = lane.loss_of(one, self.loss)
                # processes that share a denoiser go through it together
                via = None if self.policy.is_spread else loss.via
                take_back(loss.value * one.weight, via)
            measured = lane.policy.meter.take_means()
            for name, value in {"loss": loss.value, **loss.means, **measured}.items():
                means[name] = means.get(name, 0.0) + float(value.detach()) * one.weight
            for name, value in loss.maxima.items():
                maxima[name] = max(maxima.get(name, 0.0), float(value))

        means["update_calls"] = float(lane.policy.meter.calls - calls)
        gradients = take_gradients(parameters)
        for one in extra:
            self._keep_step(one, lane, gradients)
        return gradients, means, maxima

    def _extra(self, shards: Sequence[int], passes: Sequence[Pass]) -> Sequence[Pass]:
        """A pass to ask a denoiser with that is spread over processes, where others' shards have a
        pass more: all ask it equally often."""
        count = self.settings.shards
        first = shards[0] - self.accelerator.process_index
        is_shorter = len(passes[first::count]) > len(passes[shards[0] :: count])
        return passes[:1] if self.policy.is_spread and is_shorter else ()

    def _keep_step(self, one: Pass, lane: Lane, gradients: Sequence[torch.Tensor]) -> None:
        """Asks with a pass of which nothing is kept but what it brings of the other processes'
        gradients."""
        (lane.loss_of(one, self.loss).value * 0.0).backward()
        lane.policy.meter.take_means()
        for mine, others in zip(
            gradients, take_gradients(list(lane.parameters().values())), strict=True
        ):
            if is_share(mine):
                own_part(mine).add_(own_part(others))

    def _place(self, gradient: Sequence[torch.Tensor]) -> None:
        for parameter, one in zip(self._parameters.values(), gradient, strict=True):
            parameter.grad = one

    def _reduced(self, own: Sequence[Mapping[str, float]], how: str) -> dict[str, float]:
        from accelerate.utils import gather_object

        numbered = [(shard, dict(o)) for shard, o in zip(self._own_shards, own, strict=True)]
        if self.accelerator.num_processes > 1:
            # shard order, as in one process
            numbered = sorted(gather_object(numbered), key=lambda pair: pair[0])
        merged = [o for _, o in numbered]
        names = sorted(set().union(*merged))
        fold = max if how == "max" else sum
        return {name: float(fold([o[name] for o in merged if name in o])) for name in names}

    @torch.no_grad()
    def _track_average(self) -> None:
        if self._average is None:
            return
        for name, parameter in self._own.items():
            self._average[name].lerp_(parameter, 1.0 - self.settings.ema_decay)

    @torch.no_grad()
    def _move_snapshots(self, round: int) -> None:
        """After a round: slow copies follow the weights, others are taken anew where that is
        due."""
        for kind, copy in self.copies.items():
            if isinstance(copy, Decay):
                for name, parameter in self._own.items():
                    self._snapshots[kind][name].lerp_(parameter, 1.0 - copy.of_round(round))
            elif isinstance(copy, Every) and round % copy.rounds == 0:
                self._snapshots[kind] = self.policy.weights()

    def scale_rate(self, factor: float) -> None:
        """The policy's learning rate becomes ``factor`` times its setting, whatever warm-up makes
        of it."""
        self._rates = (self.settings.lr * factor, self._rates[1])

    def _set_rates(self) -> None:
        """The rates of the coming update: the policy's and the critic's, warmed up."""
        share = self.settings.share_of_rate(self.version)
        for group, rate in zip(self.optimiser.param_groups, self._rates, strict=False):
            group["lr"] = rate * share

    def weights(self) -> Weights:
        """What rollouts use: the current weights, or the slow copy of them where the algorithm
        keeps one."""
        slow = self._snapshots.get("behaviour")
        if slow is not None:
            return Weights(
                version=self.version,
                kind="behaviour",
                tensors={n: t.clone() for n, t in slow.items()},
            )
        return Weights(version=self.version, kind="current", tensors=self.policy.weights())

    def weights_to_show(self) -> Weights:
        """What is evaluated and exported: the average where there is one, else the current
        weights."""
        if self._average is None:
            return Weights(version=self.version, kind="current", tensors=self.policy.weights())
        return Weights(
            version=self.version,
            kind="average",
            tensors={n: t.clone() for n, t in self._average.items()},
        )

    def base_weights(self) -> Weights:
        """The weights before the first update of the run."""
        return Weights(version=0, kind="base", tensors=self._base)

    def kl_to_pretrained(self, weights: Weights, scored: Sequence[Scored]) -> float:
        """``evaluate.kl_to_reference`` of a policy with these weights, units side by side on the
        lanes. 0 of the weights that the reference is."""
        if weights.tensors is self.policy.reference:
            return 0.0

        def measure(lane: Lane, units: Sequence[Scored]) -> list[list[torch.Tensor]]:
            with torch.no_grad(), lane.policy.holding(weights.tensors):
                return [kl_of_unit(lane.policy, one) for one in units]

        # each lane measures some of the units, whose values are put into their order
        lanes = len(self._lanes)
        found = list(self._pool.map(measure, self._lanes, (scored[i::lanes] for i in range(lanes))))
        return mean_kl([found[i % lanes][i // lanes] for i in range(len(scored))])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that an update depends on, as named tensors: weights, the optimiser's state,
        the copies."""
        tensors = {
            n if n not in self._own else f"policy/{n}": p.detach()
            for n, p in self._parameters.items()
        }
        state = pack_state(self.optimiser, self._parameters)
        tensors.update({f"optimiser/{name}": tensor for name, tensor in state.items()})
        tensors.update({f"average/{n}": t for n, t in (self._average or {}).items()})
        for kind in self._snapshots:
            if isinstance(self.copies[kind], AtRoundStart):
                continue
            tensors.update({f"snapshot/{kind}/{n}": t for n, t in self._snapshots[kind].items()})
        tensors["version"] = torch.tensor(self.version)
        return tensors

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of ``state_dict``; raises KeyError when a tensor is missing."""
        # the weights that are trained
        self.policy.set_weights(self._read(tensors, "policy/"))
        with torch.no_grad():
            for name in self._parameters.keys() - self._own.keys():
                self._parameters[name].copy_(tensors[name])

        # the other copies of the policy
        for kind in {k.split("/")[1] for k in tensors if k.startswith("snapshot/")}:
            self._snapshots[kind] = self._read(tensors, f"snapshot/{kind}/")

        # the state of the optimiser
        unpack_state(self.optimiser, self._parameters, tensors, "optimiser/")

        # the average and the version
        if self._average is not None:
            self._average = self._read(tensors, "average/")
        self.version = int(tensors["version"])

    def _read(self, tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        """A tensor like each trained weight, under a prefix of its name."""
        return {n: read_like(tensors, f"{prefix}{n}", p) for n, p in self._own.items()}
