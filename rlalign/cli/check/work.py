"""The passes of a run, counted on a policy without weights: a look of the learner with its
gradient, a look of a rollout, and decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from rlalign.cli.check.memory import Passes
from rlalign.cli.check.passes import Taken, count
from rlalign.cli.check.rounds import Arithmetic
from rlalign.diffusion.condition import Condition, Words

if TYPE_CHECKING:
    from rlalign.config import Run
    from rlalign.policies.base import Policy

NOTHING = Taken(peak=0, flops=0)
CONVOLUTIONS = 1.7
"""What an autoencoder took on a GPU, as a multiple of what is counted: convolutions have scratch
memory of their own (10.1 and 11.1 GB for 6.5, eight pictures of 512 x 512, docs/performance.md)."""


def count_passes(run: Run, policy: Policy) -> tuple[Passes, Arithmetic | None]:
    """What the passes of a run take; ``policy`` is on the meta device. Where a network asks for
    numbers, which there are none of, nothing is counted."""
    try:
        return _count(run, policy)
    except (RuntimeError, NotImplementedError, TypeError):
        return Passes(), None


def _count(run: Run, policy: Policy) -> tuple[Passes, Arithmetic]:
    words = _encode(policy, run.plan)
    scratch = 1 if run.runtime.device == "cpu" else CONVOLUTIONS
    learner = _count_learner(run, policy, words, scratch)

    # a rollout looks at a unit, and decodes it
    unit = run.samples_per_unit
    with torch.no_grad():
        rollout = count(lambda: _look(run, policy, words, unit, guided=True), run.policy.precision)
        latents = torch.empty(unit, *policy.latent_shape(run.plan), device="meta")
        decode = count(lambda: policy.decode(latents))
    passes = Passes(learner=learner, rollout=max(rollout.peak, int(scratch * decode.peak)))

    # an update without guidance takes one of a look's passes
    forward = rollout.flops / unit
    calls = 1 if run.algorithm.eats.per_step else run.policy.calls_per_look(run.plan)
    return passes, Arithmetic(rollout=forward, learner=forward / calls, decode=decode.flops / unit)


def _look(run: Run, policy: Policy, words: Condition, rows: int, *, guided: bool) -> torch.Tensor:
    """What the policy sees in so many latents, as one number."""
    plan = run.plan
    x = torch.empty(rows, *policy.latent_shape(plan), device="meta")
    level = policy.path.at(plan).levels(plan.steps)[0]
    guidance = plan.guidance if guided else 1.0
    clean, noise = policy.denoise(x, level, _repeat(words, rows), guidance)
    return clean.mean() + noise.mean()


def _count_learner(run: Run, policy: Policy, words: Condition, scratch: float) -> int:
    """The most bytes that a pass of an update takes: of a unit's steps, or of noised samples
    without guidance, whose pictures are encoded where they come from a set."""
    by_steps = run.algorithm.eats.per_step
    rows = run.samples_per_unit * (run.learner.steps_per_pass if by_steps else 1)
    encode = NOTHING
    if run.preferences is not None:
        rows = 2 * run.preferences.pairs_per_pass
        height, width = policy.drawn_size(run.plan)
        media = torch.empty(rows // 2, 1, 3, height, width, device="meta")
        with torch.no_grad():
            encode = count(lambda: policy.encode_media(media))

    # a loss that samples by itself goes through a chain of its own length
    if run.algorithm.eats.sampled_by_loss:
        return 0
    with _gradients(policy):
        learner = count(
            lambda: _look(run, policy, words, rows, guided=by_steps).backward(),
            run.policy.precision,
            policy.network,
        )
    return max(learner.peak, int(scratch * encode.peak))


@contextlib.contextmanager
def _gradients(policy: Policy) -> Iterator[None]:
    """Inside, gradients are there already, as in every pass of a shard but its first."""
    parameters = policy.trainable().values()
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.grad = None


def _repeat(words: Condition, rows: int) -> Condition:
    """The condition of so many captions, by that of one."""
    return _mapped(words, lambda tensor: tensor.repeat(rows, *[1] * (tensor.ndim - 1)))


def _encode(policy: Policy, plan: Any) -> Condition:
    """The condition of a caption, on the meta device. Encoders that look at their mask are asked
    for the shapes of their answer alone."""
    caption = "a"
    family: Any = policy.family
    try:
        return policy.encode([caption], plan)
    except RuntimeError:
        family.memory.rows.clear()
    with _blank_encoders(family):
        found = policy.encode([caption], plan)
    family.memory.rows.clear()
    return _mapped(found, lambda tensor: tensor.to("meta"))


def _mapped(words: Condition, change: Callable[[torch.Tensor], torch.Tensor]) -> Condition:
    def each(some: Words) -> Words:
        return Words({name: change(tensor) for name, tensor in some.tensors.items()})

    against = None if words.against is None else each(words.against)
    return Condition(caption=each(words.caption), empty=each(words.empty), against=against)


@contextlib.contextmanager
def _blank_encoders(family: Any) -> Iterator[None]:
    """Inside, a family on the CPU whose text encoders answer with zeros."""
    pipeline = family.pipeline
    found = {n: p for n, p in pipeline.components.items() if n.startswith("text_encoder")}
    encoders = {name: part for name, part in found.items() if part is not None}
    device = family.device
    family.device = "cpu"
    for name, part in encoders.items():
        setattr(pipeline, name, BlankEncoder(part.config))
    try:
        yield
    finally:
        family.device = device
        for name, part in encoders.items():
            setattr(pipeline, name, part)


class BlankEncoder(torch.nn.Module):
    """Answers as an encoder of transformers with this config does, with zeros in every hidden
    state."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        inner = config.get_text_config()
        self._width = inner.hidden_size
        self._layers = inner.num_hidden_layers

    def forward(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        state: Any = torch.zeros(()).expand(*input_ids.shape, self._width)
        states: Any = (state,) * (self._layers + 1)
        return BaseModelOutput(last_hidden_state=state, hidden_states=states)
