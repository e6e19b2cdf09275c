"""How much memory a run's workers hold as ``rlalign check`` tells it, and whether there is so
much."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rlalign.cli.check.memory import (
    LIBRARIES,
    Needs,
    Parts,
    loaded_parts,
    weights_of,
)
from rlalign.runtime.roles import ROLLOUT, Role

if TYPE_CHECKING:
    from rlalign.config import Run
    from rlalign.policies.base import Policy
    from rlalign.runtime.placement import Bundle, Node

WORTH_LEAVING_OUT = 10**8
"""Bytes of text encoders that are worth a hint."""


def rows(needs: Needs) -> dict[str, str]:
    """What each worker holds, by part."""
    found: dict[str, str] = {}
    if needs.learner:
        found |= _role_rows("learner", needs.learner, "at the worst moment of an update")
        found["learner's machine"] = f"{megabytes(needs.round)} of a round's samples"
    each = f"in each of its {needs.processes} processes" if needs.processes > 1 else ""
    found |= _role_rows("rollout worker", needs.rollout, each)
    if needs.encoder:
        found |= _role_rows("encoder", needs.encoder, "")
    for title, size in needs.rewards.items():
        found[f"{title} worker"] = megabytes(size)
    found["beside that"] = (
        f"{megabytes(LIBRARIES)} of libraries a process, and what kernels take while they work"
    )
    return found


def encoder_rows(run: Run, policy: Policy) -> dict[str, str]:
    """What the text encoders in every process hold, where that is worth a setting."""
    family = policy.family
    names = [n for n in loaded_parts(ROLLOUT, run, policy) if family.role_of(n) == "words"]
    held = sum(weights_of(policy, names).values())
    if held < WORTH_LEAVING_OUT or not family.reads_embeddings:
        return {}
    return {
        "text encoders": (
            f"{megabytes(held)} in every worker that encodes prompts; rlalign encode CONFIG FILE"
            " and policy.embeddings=FILE leave them out"
        )
    }


def _role_rows(role: str, parts: Parts, when: str) -> dict[str, str]:
    """A worker's sum, then its parts."""
    found = {role: f"{megabytes(sum(parts.values()))} {when}".strip()}
    return found | {f"  {role}: {name}": megabytes(size) for name, size in parts.items()}


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
