"""One actor that encodes prompts for a run: each once, for every process that asks.

    rollout or learner worker --text--> encoder: words into the object store, once a text
                  ^------ reference ------'

Who has a reference reads the words from the store of its node. The actor holds nothing of the run's
state: one that dies is started again, with it go the words that it owned, and who asks next gets
the same numbers anew.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions
import torch
from ray.actor import ActorHandle

from rlalign.config import RuntimeSettings
from rlalign.networks.devices import usable
from rlalign.runtime.actors import actor_class, actor_name
from rlalign.runtime.gauges import shown
from rlalign.runtime.reservation import bundle_of
from rlalign.runtime.roles import ENCODER
from rlalign.runtime.workers import Worker, naming_the_node

PAUSE_SECONDS = 0.2
"""Between two questions to an actor that is away."""


class EncoderWorker(Worker):
    """Holds text encoders, and the words of every text that it was asked for."""

    def __init__(self, recipe: Any, runtime: RuntimeSettings, label: str) -> None:
        torch.set_num_threads(runtime.rollout.threads)
        self.label = label
        self._refs: dict[str, ray.ObjectRef] = {}
        with naming_the_node():
            device = usable(runtime.encoder_device, "runtime.device")
            self._family = recipe.load_encoder(device)
        self.ready_at = time.time()

    def words(self, text: str) -> list[ray.ObjectRef]:
        """Where the words of a text are: one reference, in a list, so that it travels and not what
        it stands for."""
        self.ping()
        if text not in self._refs:
            with shown("words"):
                row = self._family.words([text]).tensors
                self._refs[text] = ray.put({name: t.cpu().numpy() for name, t in row.items()})
        return [self._refs[text]]


def create_encoder(owner: str, recipe: Any, runtime: RuntimeSettings) -> ActorHandle | None:
    """The actor that encodes for a run or a sampling; None where its processes have the words from
    elsewhere."""
    if not recipe.encodes_in_actor:
        return None
    kind = actor_class(EncoderWorker, bundle_of(ENCODER, runtime.encoder))
    name = actor_name(owner, ENCODER, 0)
    return kind.options(name=name).remote(recipe, runtime, str(ENCODER))


class RemoteReader:
    """Words of texts by the encoder of a run: a ``Reader`` that pickles."""

    def __init__(self, encoder: ActorHandle, runtime: RuntimeSettings) -> None:
        self._encoder = encoder
        self._seconds = runtime.start_seconds + runtime.unit_timeout_seconds
        self._patience = runtime.start_seconds

    def __call__(self, text: str) -> Mapping[str, torch.Tensor]:
        """The words of a text, on the CPU. Waits for an encoder that is started again, for
        ``start_seconds``; raises what Ray raises where it does not come back, and what the
        encoder raised."""
        deadline: float | None = None
        while True:
            try:
                found = self._ask(text)
                return {name: torch.from_numpy(array.copy()) for name, array in found.items()}
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
                now = time.monotonic()
                deadline = deadline or now + self._patience
                if now > deadline:
                    raise
                time.sleep(PAUSE_SECONDS)

    def _ask(self, text: str) -> Any:
        try:
            (ref,) = ray.get(self._encoder.words.remote(text), timeout=self._seconds)
            return ray.get(ref, timeout=self._seconds)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error


def reader_of(encoder: ActorHandle | None, runtime: RuntimeSettings) -> RemoteReader | None:
    """A reader by an encoder, where there is one."""
    return None if encoder is None else RemoteReader(encoder, runtime)
