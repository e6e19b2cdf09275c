"""What is rounded and what is not, what checkpointing keeps, and what a missing kernel says. On a
CPU, which has bfloat16 too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlalign.core import registry
from rlalign.core.records import Plan
from rlalign.networks import lora, precision
from rlalign.policies.base import Policy


def loaded(name: str = "tiny", **settings: Any) -> Policy:
    recipe: Any = registry.build("policies", {"name": name, **settings})
    return recipe.load("cpu")


def seen(policy: Policy, *, guidance: float = 1.0) -> torch.Tensor:
    """The noise that a policy sees in a fixed latent."""
    x = torch.randn(2, *policy.latent_shape(Plan()), generator=torch.Generator().manual_seed(0))
    condition = policy.encode(["a red circle above a blue square"] * 2)
    return policy.denoise(x, policy.path.levels(10)[4], condition, guidance)[1]


@pytest.mark.parametrize("name", ["tiny", "tiny_flow", "points"])
def test_bfloat16_is_near_float32_and_comes_back_as_float32(name: str) -> None:
    with torch.no_grad():
        exact, rounded = seen(loaded(name)), seen(loaded(name, precision="bfloat16"))
    assert rounded.dtype == torch.float32
    error = float((rounded - exact).norm() / exact.norm())
    assert error < 2e-2
    if name != "points":  # its untrained network adds nothing to the exact denoiser
        assert error > 1e-5, "nothing was rounded"


def test_frozen_weights_are_kept_rounded_and_trained_ones_are_not() -> None:
    policy = loaded(lora_rank=2, precision="bfloat16")
    kinds = {p.requires_grad: set[torch.dtype]() for p in policy.network.parameters()}
    for parameter in policy.network.parameters():
        kinds[parameter.requires_grad].add(parameter.dtype)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}
    assert {p.dtype for p in loaded(precision="bfloat16").network.parameters()} == {torch.float32}


def test_gradients_reach_the_trained_weights_in_float32() -> None:
    policy = loaded(lora_rank=2, precision="bfloat16")
    seen(policy, guidance=3.0).square().mean().backward()
    gradients = [p.grad for p in policy.trainable().values()]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)
    assert sum(float(g.norm()) for g in gradients if g is not None) > 0


def kept_and_gradient(policy: Policy) -> tuple[int, torch.Tensor]:
    """Bytes that the forward pass keeps for the backward pass, and the gradient."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    weights = {p.data_ptr() for p in policy.network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = seen(policy).square().mean()
        before = sum(size for at, size in kept.items() if at not in weights)
    value.backward()
    return before, torch.cat(
        [p.grad.flatten() for p in policy.trainable().values() if p.grad is not None]
    )


@pytest.mark.parametrize("name", ["tiny", "tiny_flow"])
def test_checkpointing_keeps_less_and_gives_the_same_gradient(name: str) -> None:
    all_kept, exact = kept_and_gradient(loaded(name))
    few_kept, again = kept_and_gradient(loaded(name, gradient_checkpointing=True))
    assert few_kept < 0.6 * all_kept
    torch.testing.assert_close(again, exact, rtol=1e-6, atol=1e-9)


def test_a_policy_that_cannot_checkpoint_says_so() -> None:
    with pytest.raises(
        registry.UserError, match=r"policy\.gradient_checkpointing must be false for PointsFamily"
    ):
        loaded("points", gradient_checkpointing=True)


def test_a_merged_export_keeps_what_bfloat16_could_not_hold() -> None:
    """The checkpoint's own weights bit for bit where no adapter is, and an adapter far below the
    spacing of bfloat16 numbers."""
    policy = loaded(lora_rank=2, precision="bfloat16")
    for name, parameter in policy.trainable().items():
        if "lora_B" in name:
            parameter.data.fill_(1e-5)
    merged = policy.merged()
    found = merged.network.state_dict()
    assert {p.dtype for p in merged.network.parameters()} == {torch.float32}
    exact = loaded().network.state_dict()
    assert found.keys() == exact.keys()
    assert any(not torch.equal(t, t.bfloat16().float()) for t in exact.values())
    adapted = {f"{name}.weight": layer for name, layer in lora.layers(policy.network).items()}
    for name, weight in exact.items():
        layer = adapted.get(name)
        expected = weight if layer is None else weight + layer.up @ layer.down * layer.scale
        assert torch.equal(found[name], expected)
        assert layer is None or not torch.equal(found[name], weight)


def test_a_copy_in_float64_computes_in_float64() -> None:
    rounded = loaded(precision="bfloat16").in_precision(torch.float64)
    exact = loaded().in_precision(torch.float64)
    x = torch.randn(1, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    time_B, words = (
        torch.tensor([500]),
        exact.encode(["a red circle"]).caption.to(dtype=torch.float64),
    )
    with torch.no_grad():
        assert torch.equal(rounded.answer(x, time_B, words), exact.answer(x, time_B, words))


def test_a_cpu_is_left_as_it_is() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    precision.settle("cpu", "tf32", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() == before
    assert precision.here("cpu") == "cpu"


def test_an_operation_without_a_repeating_kernel_names_the_way_out() -> None:
    words = "some_backward_cuda does not have a deterministic implementation, but you set ..."
    with (
        pytest.raises(
            registry.UserError,
            match=r"policy\.deterministic must be false here: some_backward_cuda has no",
        ),
        precision.explained(),
    ):
        raise RuntimeError(words)
    assert precision.unrepeatable(RuntimeError(f"in a worker:\n{words}")).startswith(
        "policy.deterministic must be false"
    )
    with pytest.raises(RuntimeError, match="another"), precision.explained():
        raise RuntimeError("another")
