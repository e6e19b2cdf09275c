"""Processes over which a denoiser is spread, and which ask it unequally often: a pass of one of
them is a gathering of all.

    process 0    ask: compute    ask: compute    rest: gather     rest
    process 1    ask: compute    rest: gather    (gets work) ask: compute    rest

Before each pass all agree which network it is of. Who asks for it computes, on numbers of its own;
the others gather the same blocks in the same order and let them go. So a pass is what it is on a
whole network, whatever the others do, and no process waits for more than the slowest pass of each
turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as group

from rlalign.networks import sharding


class OutOfStep(RuntimeError):
    """A process can gather no more with the others: one of them is gone, or it failed amid a
    gathering. All of them have to begin anew."""


class Lockstep:
    """This process among those that share networks; every one of them has its own. One thread uses
    it.

    A pass under gradients is not supported: the others would have to gather for its way back.
    """

    def __init__(self, networks: Sequence[torch.nn.Module], try_out: Callable[[], object]) -> None:
        """``networks`` are spread, and ``try_out`` asks each of them, once or more: every process
        does it now, and as it gathers blocks then every pass has to."""
        self._networks = tuple(networks)
        self._orders: list[list[Any]] = [[] for _ in networks]
        """Of each network, itself and its blocks, as they are gathered."""
        self._asked: int | None = None
        """The network of a pass that is under way here."""
        self._begun = self._done = 0
        """Of its modules, how many were about to be gathered, and were."""
        seen = self._note_order()
        try_out()
        for handle in seen:
            handle.remove()
        assert all(self._orders), "a network was not tried out"
        for number, network in enumerate(self._networks):
            self._watch(number, network)

    def _note_order(self) -> list[Any]:
        """Hooks that note which module is gathered after which."""

        def note(order: list[Any], module: Any, _: Any) -> None:
            if not any(module is other for other in order):
                order.append(module)

        return [
            module.register_forward_pre_hook(partial(note, self._orders[number]), prepend=True)
            for number, network in enumerate(self._networks)
            for module in _gathered_modules(network)
        ]

    def _watch(self, number: int, network: Any) -> None:
        """Lets a pass of a network begin in its turn, and see how far it is. Hooks that are put in
        front run before the gathering, others after it."""
        for module in self._orders[number]:
            module.register_forward_pre_hook(self._before, prepend=True)
            module.register_forward_pre_hook(self._after)
        network.register_forward_pre_hook(partial(self._begin, number), prepend=True)
        network.register_forward_hook(self._end)

    # --- a pass ----------------------------------------------------------------------------------

    def _begin(self, number: int, network: Any, _: Any) -> None:
        assert not torch.is_grad_enabled(), "networks that are in step are asked without gradients"
        while (turn := self._agree(number)) != number:
            self._gather(self._orders[turn])
        self._asked = number
        self._begun = self._done = 0

    def _before(self, module: Any, _: Any) -> None:
        if self._asked is None:
            return
        order = self._orders[self._asked]
        assert self._begun < len(order) and order[self._begun] is module, (
            f"{type(module).__name__} was asked out of its order"
        )
        self._begun += 1

    def _after(self, module: Any, _: Any) -> None:
        self._done = self._begun

    def _end(self, network: Any, _: Any, answer: Any) -> None:
        self._asked = None

    # --- the others' passes ----------------------------------------------------------------------

    def rest(self) -> None:
        """Gathers with the others until none of them asks any more. Raises OutOfStep."""
        while (turn := self._agree(len(self._networks))) < len(self._networks):
            self._gather(self._orders[turn])
        for network in self._networks:
            _forget(network)

    def recover(self) -> None:
        """After an error in work of this process: gathers what is left of a pass that it has ended,
        so that the others go on. Raises OutOfStep where it ended a gathering."""
        if self._asked is None:
            return
        number = self._asked
        self._asked = None
        if self._done < self._begun:
            raise OutOfStep("a pass ended amid a gathering")
        _forget(self._networks[number])
        self._gather(self._orders[number][self._done :])

    def _agree(self, wanted: int) -> int:
        """The network of the next pass: of those that are wanted by some process the first, or
        their number where none is wanted."""
        try:
            number = torch.tensor(wanted, dtype=torch.int32, device=sharding.device_of_group())
            group.all_reduce(number, op=group.ReduceOp.MIN)
            return int(number)
        except RuntimeError as error:
            raise OutOfStep(f"the processes of a group cannot agree: {error}") from error

    def _gather(self, modules: Sequence[Any]) -> None:
        try:
            for module in modules:
                module.unshard()
                module.reshard()
        except RuntimeError as error:
            raise OutOfStep(f"the processes of a group cannot gather: {error}") from error


def _gathered_modules(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of a network that is spread which are gathered each by itself."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def _forget(network: Any) -> None:
    """Clears what FSDP notes of passes for their way back, which they have none of here, and what
    a pass that has failed left gathered."""
    network.reset_iter_state()
