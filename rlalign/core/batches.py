"""The four batches that algorithms eat. A batch is a list of parts, which the learner shuffles and
deals to updates, and cuts into passes: one forward and backward each, with weights that sum to 1
over the batch.

Letters: B samples, K denoising steps, C H W. Random draws of a loss come from the pass's ``key``
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from threading import Lock
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from rlalign.core.records import Plan, Space, Unit, moved_latents

Key = tuple[int | str, ...]


class Pass(Protocol):
    """One forward and backward pass of a batch."""

    @property
    def weight(self) -> float:
        """The pass's share of its batch's mean."""
        ...


class Batch(Protocol):
    """What the learner asks of a batch; ``len`` is its number of samples.

    What a run has to know of an algorithm's kind of learning is said by the class of its batch.
    """

    per_step: ClassVar[bool]
    """Whether a pass is one of denoising steps, whose trajectories are kept."""
    of_pairs: ClassVar[bool]
    """Whether it may be made of a set of preferences in place of a round's samples."""
    sampled_by_loss: ClassVar[bool]
    """Whether the loss samples by itself, with the rewards' gradients: nothing is rolled out."""

    def __len__(self) -> int: ...

    @property
    def parts(self) -> int:
        """Units (or bundles of pairs) that the batch is made of."""
        ...

    def pick(self, indices: Sequence[int], /) -> Batch:
        """The batch of these parts, in this order."""
        ...

    def passes(self, steps_per_pass: int, draw: Key = (), /) -> Iterator[Pass]:
        """The passes of one use of the batch; ``draw`` (round, epoch) enters the passes' keys."""
        ...


class DifferentiableScorer(Protocol):
    """Samples and prompts -> reward title -> (B,) scores, and "total", with gradients."""

    @property
    def spaces(self) -> frozenset[Space]:
        """Where the rewards see samples."""
        ...

    def __call__(
        self, samples: Mapping[Space, torch.Tensor], prompts: Sequence[str], /
    ) -> Mapping[str, torch.Tensor]:
        """Of media (B, F, 3, H, W) in [0, 1], of clean latents (B, *latent)."""
        ...


Dataclass = TypeVar("Dataclass")
Item = TypeVar("Item")


def moved(one: Dataclass, device: str) -> Dataclass:
    """The same pass with its tensors on ``device``."""
    if device == "cpu":
        return one
    given: Any = one
    own = {f.name: getattr(one, f.name) for f in fields(given)}
    there = {n: v.to(device) for n, v in own.items() if isinstance(v, torch.Tensor)}
    return replace(given, **there)


def _pick(values: Sequence[Item], indices: Sequence[int]) -> tuple[Item, ...]:
    return tuple(values[i] for i in indices)


def _wide(log_prob: torch.Tensor) -> None:
    """Refuses log-probs that are coarser than a clip range: float16 near |log p| = 1.4 has a
    spacing of 9.8e-4."""
    if log_prob.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"log_prob must be float32 or float64, got {log_prob.dtype}; take it in float32 and"
            " keep it so"
        )


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """Denoising steps with advantages: what policy-gradient algorithms eat. Whole units, so that a
    replay can use the rollout's own batch shape."""

    per_step: ClassVar[bool] = True
    of_pairs: ClassVar[bool] = False
    sampled_by_loss: ClassVar[bool] = False

    units: tuple[Unit, ...]
    latents: tuple[torch.Tensor, ...]
    """Per unit (B, K+1, ...) float32, or (B, N, ...) those alone that its steps start from and go
    to."""
    log_prob: tuple[torch.Tensor, ...]
    """Per unit (B, K) float32 behaviour log-probs, nats per element."""
    stochastic: tuple[torch.Tensor, ...]
    """Per unit (K,) bool: the steps that are learned from."""
    advantage: tuple[torch.Tensor, ...]
    """Per unit (B,) float32; 0 for a dropped sample."""
    reward: tuple[torch.Tensor, ...]
    """Per unit (B,) float32 weighted totals; NaN for a dropped sample."""
    side: tuple[torch.Tensor, ...] = ()
    """Per unit (B,) float32: 1 for the preferred of a pair, -1 for the other, 0 for what is in no
    pair; empty where nothing is compared."""

    def __post_init__(self) -> None:
        for one in self.log_prob:
            _wide(one)

    def __len__(self) -> int:
        return sum(len(u.prompts) for u in self.units)

    @property
    def parts(self) -> int:
        return len(self.units)

    def pick(self, indices: Sequence[int], /) -> StepBatch:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen = {name: _pick(values, indices) for name, values in own.items() if values}
        return StepBatch(**chosen)

    def _places(self, unit: int) -> dict[int, int]:
        """Number of a latent of a unit -> where it lies."""
        count = len(self.stochastic[unit]) + 1
        numbers: Sequence[int] = range(count)
        if self.latents[unit].shape[1] < count:
            numbers = moved_latents(self.stochastic[unit].tolist())
        return {number: place for place, number in enumerate(numbers)}

    def passes(self, steps_per_pass: int, draw: Key = (), /) -> Iterator[StepPass]:
        """Slices of one unit and up to ``steps_per_pass`` of its steps.

        A weight is the slice's share of all (sample, step) pairs, so the weighted sum of slice
        means is the mean over pairs, whatever the slicing.
        """
        pairs = sum(
            len(u.prompts) * int(s.sum()) for u, s in zip(self.units, self.stochastic, strict=True)
        )
        for i, unit in enumerate(self.units):
            steps = torch.nonzero(self.stochastic[i]).flatten().tolist()
            place = self._places(i)
            for start in range(0, len(steps), steps_per_pass):
                chosen = tuple(steps[start : start + steps_per_pass])
                yield StepPass(
                    unit=unit,
                    steps=chosen,
                    learned=len(steps),
                    before_BS=self.latents[i][:, [place[k] for k in chosen]],
                    after_BS=self.latents[i][:, [place[k + 1] for k in chosen]],
                    log_prob_BS=self.log_prob[i][:, list(chosen)],
                    advantage_B=self.advantage[i],
                    reward_B=self.reward[i],
                    side_B=self.side[i] if self.side else None,
                    weight=len(unit.prompts) * len(chosen) / pairs,
                )


@dataclass(frozen=True, kw_only=True)
class StepPass:
    """One forward pass of a StepBatch: the steps ``steps`` of one unit."""

    unit: Unit
    steps: tuple[int, ...]
    learned: int
    """Steps of the unit that are learned from, over all its passes."""
    before_BS: torch.Tensor
    """(B, S, ...) float32 latents that the steps started from."""
    after_BS: torch.Tensor
    """(B, S, ...) float32 latents that they went to."""
    log_prob_BS: torch.Tensor
    """(B, S) float32 behaviour log-probs, nats per element."""
    advantage_B: torch.Tensor
    reward_B: torch.Tensor
    weight: float
    side_B: torch.Tensor | None = None
    """(B,) float32 as in StepBatch; None where nothing is compared."""

    def __post_init__(self) -> None:
        _wide(self.log_prob_BS)


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Clean latents with weights: what weighted denoising eats (reward-weighted regression,
    DiffusionNFT)."""

    per_step: ClassVar[bool] = False
    of_pairs: ClassVar[bool] = False
    sampled_by_loss: ClassVar[bool] = False

    units: tuple[Unit, ...]
    clean: tuple[torch.Tensor, ...]
    """Per unit (B, C, H, W) float32."""
    weight: tuple[torch.Tensor, ...]
    """Per unit (B,) float32; its meaning is the algorithm's."""
    draws: int
    """Times that each sample is noised."""

    def __len__(self) -> int:
        return sum(len(u.prompts) for u in self.units)

    @property
    def parts(self) -> int:
        return len(self.units)

    def pick(self, indices: Sequence[int], /) -> ImageBatch:
        return replace(
            self,
            units=_pick(self.units, indices),
            clean=_pick(self.clean, indices),
            weight=_pick(self.weight, indices),
        )

    def passes(self, steps_per_pass: int, draw: Key = (), /) -> Iterator[ImagePass]:
        """``draws`` passes of each unit, of equal weight per sample. ``steps_per_pass`` has no say
        here."""
        for unit, clean, weight in zip(self.units, self.clean, self.weight, strict=True):
            for number in range(self.draws):
                yield ImagePass(
                    unit=unit,
                    clean_BCHW=clean,
                    weight_B=weight,
                    number=number,
                    draws=self.draws,
                    key=("draw", unit.seed, *draw, *unit.key, number),
                    weight=len(unit.prompts) / (len(self) * self.draws),
                )


@dataclass(frozen=True, kw_only=True)
class ImagePass:
    """One unit's clean latents, to be noised for the ``number``-th of ``draws`` times."""

    unit: Unit
    clean_BCHW: torch.Tensor
    weight_B: torch.Tensor
    number: int
    draws: int
    key: Key
    weight: float


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of one prompt each: a part of a PairBatch."""

    prompts: tuple[str, ...]
    first: torch.Tensor
    """Clean latents (B, C, H, W) float32, or media (B, F, 3, H, W) uint8 that are yet to be
    encoded."""
    second: torch.Tensor
    """The same for the other of each pair."""
    label_B: torch.Tensor
    """(B,) float32: 1 where the first is preferred, 0 where the second is, 1/2 for a tie."""
    key: Key
    """Tells this part's random draws apart."""
    plan: Plan
    """What the policy that learns of them draws by: its size decides levels and words."""
    crops: tuple[torch.Tensor, torch.Tensor] | None = None
    """Of each side (B, 4) whole numbers: height and width of the pictures as they were, top and
    left of what was cut out of them once resized. None where the policy is told none of it."""

    _encoded: list[tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )
    _lock: Any = field(default_factory=Lock, init=False, repr=False, compare=False)

    def latents(
        self, encode: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents of both sides, by the policy's encoder, which is told the side (0 or 1):
        once, however many passes ask."""
        with self._lock:
            if not self._encoded:
                with torch.no_grad():
                    self._encoded.append((encode(self.first, 0), encode(self.second, 1)))
            return self._encoded[0]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Preferred and rejected pictures: what preference algorithms eat."""

    per_step: ClassVar[bool] = False
    of_pairs: ClassVar[bool] = True
    sampled_by_loss: ClassVar[bool] = False

    pairs: tuple[Pairs, ...]
    draws: int

    def __len__(self) -> int:
        return sum(len(p) for p in self.pairs)

    @property
    def parts(self) -> int:
        return len(self.pairs)

    def pick(self, indices: Sequence[int], /) -> PairBatch:
        return replace(self, pairs=_pick(self.pairs, indices))

    def passes(self, steps_per_pass: int, draw: Key = (), /) -> Iterator[PairPass]:
        """``draws`` passes of each part, of equal weight per pair. ``steps_per_pass`` has no say
        here."""
        for one in self.pairs:
            for number in range(self.draws):
                yield PairPass(
                    pairs=one,
                    label_B=one.label_B,
                    key=("draw", *draw, *one.key, number),
                    weight=len(one) / (len(self) * self.draws),
                )


@dataclass(frozen=True, kw_only=True)
class PairPass:
    """One part of a PairBatch, to be noised once."""

    pairs: Pairs
    label_B: torch.Tensor
    """As in Pairs."""
    key: Key
    weight: float


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts with their noise, nothing sampled yet: what reward backpropagation eats."""

    per_step: ClassVar[bool] = False
    of_pairs: ClassVar[bool] = False
    sampled_by_loss: ClassVar[bool] = True

    units: tuple[Unit, ...]
    scorer: DifferentiableScorer

    def __len__(self) -> int:
        return sum(len(u.prompts) for u in self.units)

    @property
    def parts(self) -> int:
        return len(self.units)

    def pick(self, indices: Sequence[int], /) -> PromptBatch:
        return replace(self, units=_pick(self.units, indices))

    def passes(self, steps_per_pass: int, draw: Key = (), /) -> Iterator[PromptPass]:
        """One pass a unit. ``steps_per_pass`` has no say here."""
        for unit in self.units:
            yield PromptPass(
                unit=unit,
                scorer=self.scorer,
                key=("draw", unit.seed, *draw, *unit.key),
                weight=len(unit.prompts) / len(self),
            )


@dataclass(frozen=True, kw_only=True)
class PromptPass:
    """One unit, to be sampled with gradients."""

    unit: Unit
    scorer: DifferentiableScorer
    key: Key
    weight: float
