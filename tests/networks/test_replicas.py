"""Modules on the same weights."""

from __future__ import annotations

import torch

from rlalign.networks.replicas import replicate


def test_weights_are_shared_and_gradients_are_not() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    twin = replicate(module)
    twin(torch.ones(2, 3)).sum().backward()
    assert all(p.grad is None for p in module.parameters())
    with torch.no_grad():
        module[0].weight.mul_(2.0)
    assert twin[0].weight.data_ptr() == module[0].weight.data_ptr()
    assert torch.equal(twin(torch.ones(2, 3)), module(torch.ones(2, 3)))
