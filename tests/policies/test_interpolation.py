"""Between the pretrained and the aligned model at sampling time."""

from __future__ import annotations

import torch

from tests.toy import ToyPolicy


def test_the_weights_zero_and_one_are_the_two_models_and_two_goes_beyond() -> None:
    policy = ToyPolicy(dtype=torch.float64)
    x, level = torch.randn(3, 2, 1, 1).double(), torch.tensor(400.0)
    condition = policy.encode(["a", "b", "c"])
    base = policy.denoise(x, level, condition, 1.0)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter += 0.1
    own = policy.denoise(x, level, condition, 1.0)
    calls = policy.meter.calls
    for w in (0.0, 0.5, 2.0):
        policy.interpolation = w
        found = policy.denoise(x, level, condition, 1.0)
        for got, b, o in zip(found, base, own, strict=True):
            torch.testing.assert_close(got, b + w * (o - b), atol=1e-12, rtol=0)
    assert policy.meter.calls == calls + 3 * 2 * 3  # both models are asked
