"""What is rounded and what is not, what checkpointing keeps, and what a missing kernel says. On a
CPU, which has bfloat16 too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlalign.core import registry
from rlalign.core.records import Plan
from rlalign.diffusion.rollout import denoise_unit
from rlalign.networks import lora, precision
from rlalign.policies.base import Policy
from tests.toy import make_units


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


class Layers(torch.nn.Module):
    """One of each kind, some of which may be rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.convolution = torch.nn.Conv2d(4, 4, 1, bias=False)
        self.norm = torch.nn.LayerNorm(4)
        self.words = torch.nn.Embedding(4, 4)
        self.tied = torch.nn.Linear(4, 4)
        self.tied.weight = self.words.weight
        self.special = torch.nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)
        self.changed = torch.nn.Linear(4, 4)
        self.changed.forward = self.norm.forward  # type: ignore[method-assign]
        self.exact = torch.nn.Linear(4, 4).double()
        self.scale = torch.nn.Parameter(torch.ones(()))


def test_weights_that_may_be_sent_rounded() -> None:
    """Only those whose every use is one that autocast rounds them for."""
    wanted = {"linear.weight", "linear.bias", "convolution.weight", "tied.bias"}
    assert precision.rounded_names(Layers(), "bfloat16") == wanted
    assert precision.rounded_names(Layers(), "float32") == frozenset()
    assert precision.rounded_names(Layers(), "tf32") == frozenset()


@pytest.mark.parametrize("kind", precision.ROUNDED_MODULES)
def test_autocast_rounds_weight_and_bias_first(kind: Any) -> None:
    layer = kind(4, 4) if kind is torch.nn.Linear else kind(4, 4, 3)
    x = torch.randn(2, 4, *[5] * (layer.weight.ndim - 2))
    with torch.no_grad(), precision.autocast("cpu", "bfloat16"):
        exact = layer(x)
        for weight in layer.parameters():
            rounded = weight.bfloat16().float()
            assert not torch.equal(rounded, weight)
            weight.copy_(rounded)
        assert torch.equal(layer(x), exact)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_rounded_weights_make_the_same_trajectory(lora_rank: int) -> None:
    """Latents and log-probs bit for bit, in bfloat16; others in float32."""
    (unit,) = make_units(1, plan=Plan(steps=3, eta=1.0, guidance=3.0))
    made = {}
    for kind in ("float32", "bfloat16"):
        policy = loaded(lora_rank=lora_rank, precision=kind)
        for weight in policy.trainable().values():
            weight.data.add_(0.02 * torch.randn_like(weight))
        names = precision.rounded_names(policy.network, "bfloat16")
        exact = denoise_unit(policy, unit, 0)[0]
        policy.set_weights(
            {n: t.bfloat16().float() if n in names else t for n, t in policy.weights().items()}
        )
        made[kind] = (exact, denoise_unit(policy, unit, 0)[0])
    for name in ("latents_BK1", "log_prob_BK"):
        exact, rounded = (getattr(one, name) for one in made["bfloat16"])
        np.testing.assert_array_equal(rounded, exact)
        exact, rounded = (getattr(one, name) for one in made["float32"])
        assert not np.array_equal(rounded, exact)


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
