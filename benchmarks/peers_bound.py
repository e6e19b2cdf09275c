"""What bounds the contestants of `benchmarks/peers.py`: the machine's matrix product, and the
denoiser's work.

    python benchmarks/peers_bound.py product|flops
"""

from __future__ import annotations

import json
import sys
import time

import torch

SIDE = 1024
SECONDS = 4.0


def product() -> dict[str, float]:
    """GFLOP in a CPU second, of float32 matrices of side 1024 on one thread."""
    torch.set_num_threads(1)
    one, other = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    torch.mm(one, other)
    count = 0
    start = time.process_time()
    while time.process_time() - start < SECONDS:
        torch.mm(one, other)
        count += 1
    return {"rate": 2 * SIDE**3 * count / (time.process_time() - start) / 1e9}


def flops() -> dict[str, float]:
    """Operations of one row that the shipped UNet is asked about: ``forward``, and ``backward``."""
    from torch.utils.flop_counter import FlopCounterMode

    from rlalign.core.records import Plan
    from rlalign.policies.tiny import Tiny

    policy = Tiny().load("cpu")
    condition = policy.encode(["a red circle"])
    x = torch.zeros(1, *policy.latent_shape(Plan()))
    counted = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            answer = policy.answer(x, torch.tensor([500]), condition.caption)
            if grad:
                answer.sum().backward()
        counted.append(counter.get_total_flops())
    forward, both = counted
    return {"forward": forward, "backward": both - forward}


if __name__ == "__main__":
    print(json.dumps({"product": product, "flops": flops}[sys.argv[1]]()))
