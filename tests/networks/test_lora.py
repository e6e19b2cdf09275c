"""Adapters on a small Stable Diffusion unet (random weights): what they change, and what plain
diffusers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from rlalign.core.registry import UserError
from rlalign.networks import lora, merging
from rlalign.policies.base import ATTENTION_TARGETS, Policy
from rlalign.policies.stable_diffusion import StableDiffusion
from tests.toy import ToyPolicy, save_pipeline

FILE = "pytorch_lora_weights.safetensors"

PROMPTS = ["a red circle", "blue"]
X, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([901, 401])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline") / "small")


def load(folder: Path, *, rank: int = 0, alpha: float = 0.0) -> Policy:
    return StableDiffusion(path=str(folder), lora_rank=rank, lora_alpha=alpha).load("cpu")


def trained(folder: Path, *, alpha: float = 0.0) -> Policy:
    """Rank 4, with adapters as large as training might make them."""
    policy = load(folder, rank=4, alpha=alpha)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(
                0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            )
    return policy


@torch.no_grad()
def prediction(policy: Policy) -> torch.Tensor:
    return policy.family.predict(X, T, policy.encode(PROMPTS).caption)


def test_attaching_changes_no_output_and_trains_adapters_alone(folder: Path) -> None:
    plain, adapted = load(folder), load(folder, rank=4)
    assert torch.equal(prediction(adapted), prediction(plain))
    assert not lora.is_attached(plain.network)
    assert lora.is_attached(adapted.network)
    names = list(adapted.trainable())
    assert all("lora_" in n for n in names)
    layers = [
        n
        for n, m in plain.network.named_modules()
        if isinstance(m, torch.nn.Linear) and n.endswith(ATTENTION_TARGETS)
    ]
    assert len(names) == 2 * len(layers) > 0
    assert all(p.dtype == torch.float32 for p in adapted.trainable().values())
    assert adapted.reference == {}


def test_initial_adapters_depend_on_the_seed_alone() -> None:
    one = ToyPolicy(lora_rank=2)
    torch.manual_seed(1234)
    state = torch.random.get_rng_state()
    other = ToyPolicy(lora_rank=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(t, other.weights()[n]) for n, t in one.weights().items())
    assert any(t.abs().sum() > 0 for t in one.weights().values())


def test_the_scale_is_alpha_over_rank() -> None:
    """With the same adapters, alpha 8 at rank 2 moves the output 4 times as far as alpha 2
    (1e-5)."""
    x, t = torch.randn(3, 2, 1, 1), torch.tensor([10, 500, 900])
    outputs = {}
    for alpha in (2.0, 8.0):
        policy = ToyPolicy(lora_rank=2, lora_alpha=alpha)
        with torch.no_grad():
            policy.network.outer.lora_B["default"].weight.fill_(0.3)  # type: ignore[index, union-attr]
            outputs[alpha] = policy.family.predict(x, t, policy.encode(["a", "b", "c"]).caption)
    base = ToyPolicy()
    with torch.no_grad():
        plain = base.family.predict(x, t, base.encode(["a", "b", "c"]).caption)
    assert torch.allclose(outputs[8.0] - plain, 4 * (outputs[2.0] - plain), rtol=1e-4, atol=1e-5)


def test_disabled_is_the_pretrained_network_to_the_last_bit(folder: Path) -> None:
    plain, policy = load(folder), trained(folder)
    before = prediction(policy)
    assert (before - prediction(plain)).abs().max() > 1e-2
    with policy.as_reference():
        assert torch.equal(prediction(policy), prediction(plain))
    assert torch.equal(prediction(policy), before)
    assert policy.trainable().keys() == load(folder, rank=4).trainable().keys()


def test_the_reference_ends_even_when_something_fails(folder: Path) -> None:
    policy = trained(folder)
    before = prediction(policy)
    with pytest.raises(RuntimeError, match="inside"), policy.as_reference():
        raise RuntimeError("inside")
    assert torch.equal(prediction(policy), before)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_leaves_a_built_graph_alone(rank: int) -> None:
    """Forward, look at the reference, backward: the gradient is that without the look, bit for
    bit."""
    x, t = torch.randn(3, 2, 1, 1), torch.tensor([10, 500, 900])

    def gradients(look: bool) -> list[torch.Tensor]:
        policy = ToyPolicy(lora_rank=rank)
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.add_(0.5)
        words = policy.encode(["a", "b", "c"]).caption
        value = policy.family.predict(x, t, words).square().sum()
        if look:
            with torch.no_grad(), policy.as_reference():
                assert not torch.equal(policy.family.predict(x, t, words).square().sum(), value)
        value.backward()
        return [p.grad for p in policy.trainable().values() if p.grad is not None]

    plain, looked = gradients(False), gradients(True)
    assert len(plain) == len(looked) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, looked, strict=True))


def test_full_fine_tuning_keeps_a_reference(folder: Path) -> None:
    """The kept copy is the checkpoint's weights; updates in place do not touch it."""
    policy = load(folder)
    before = prediction(policy)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.05)
    after = prediction(policy)
    assert not torch.equal(after, before)
    for _ in range(2):
        with policy.as_reference():
            assert torch.equal(prediction(policy), before)
        assert torch.equal(prediction(policy), after)


def test_merging_equals_the_adapter(folder: Path) -> None:
    """1e-5 in float32; and under plain names the weights fit a network that never had adapters."""
    policy = trained(folder)
    before = prediction(policy)
    lora.merge(policy.network)
    assert torch.allclose(prediction(policy), before, rtol=0, atol=1e-5)
    plain = load(folder)
    plain.network.load_state_dict(lora.plain_state_dict(policy.network))
    assert torch.allclose(prediction(plain), before, rtol=0, atol=1e-5)


def picture(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "eta": 0.0, "output_type": "pt"}
    return pipeline(PROMPTS, latents=X.clone(), **settings).images


def test_the_same_policy_is_the_same_file_whichever_process_saves_it(
    folder: Path, tmp_path: Path
) -> None:
    """peft keeps the names of the adapted layers in a set, whose order differs from process to
    process."""
    policy = load(folder, rank=4)
    names = {
        f"layer{number}" for number in range(12)
    }  # so many that no set has them sorted by chance
    policy.network.peft_config[lora.ADAPTER].target_modules |= names
    contents = set[bytes]()
    for number in range(6):  # the library's order of two metadata differs half of the time
        policy.save(tmp_path / str(number))
        contents.add((tmp_path / str(number) / FILE).read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "0" / FILE, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    saved = json.loads(metadata["lora_adapter_metadata"])
    assert saved["unet.target_modules"] == sorted(saved["unet.target_modules"])


@pytest.mark.parametrize("alpha", [0.0, 4.0, 10.0])
def test_plain_diffusers_loads_the_saved_adapter(
    folder: Path, tmp_path: Path, alpha: float
) -> None:
    """Rank 4, also where alpha is not the rank: same prediction and same picture within 1e-5."""
    from diffusers import StableDiffusionPipeline

    policy = trained(folder, alpha=alpha)
    policy.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    assert all(n.startswith("unet.") for n in load_file(tmp_path / FILE))
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    plain = picture(pipeline)
    pipeline.load_lora_weights(tmp_path)
    with torch.no_grad():
        found = pipeline.unet(
            X, T, encoder_hidden_states=policy.encode(PROMPTS).caption["embeds_BLD"]
        ).sample
    assert torch.allclose(found, prediction(policy), rtol=0, atol=1e-5)
    assert torch.allclose(picture(pipeline), picture(policy.family.pipeline), rtol=0, atol=1e-5)
    assert (picture(pipeline) - plain).abs().max() > 1e-3


def test_plain_diffusers_loads_the_merged_pipeline(folder: Path, tmp_path: Path) -> None:
    """merged() is a policy of plain modules whose folder diffusers loads; prediction within 1e-5 of
    the adapter's."""
    from diffusers import DiffusionPipeline

    policy = trained(folder, alpha=10.0)
    before = prediction(policy)
    merged = policy.merged()
    assert not lora.is_attached(merged.network)
    assert torch.allclose(prediction(merged), before, rtol=0, atol=1e-5)
    merged.save(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    with torch.no_grad():
        found = again.unet(
            X, T, encoder_hidden_states=policy.encode(PROMPTS).caption["embeds_BLD"]
        ).sample
    assert torch.equal(found, prediction(merged))
    assert torch.equal(prediction(policy), before)  # the adapters' owner is as it was
    assert lora.is_attached(policy.family.pipeline.unet)
    plain = load(folder)
    assert plain.merged() is plain


def test_a_policy_that_cannot_merge_its_adapter_says_so() -> None:
    plain = ToyPolicy()
    assert plain.merged() is plain
    with pytest.raises(
        UserError, match="a merged export needs a policy that can merge its LoRA, got ToyFamily"
    ):
        ToyPolicy(lora_rank=2).merged()


def test_replicas_share_adapters(folder: Path) -> None:
    policy = load(folder, rank=4)
    twin = policy.replica()
    weights = {n: torch.full_like(t, 0.1) for n, t in policy.weights().items()}
    policy.set_weights(weights)
    assert torch.equal(prediction(twin), prediction(policy))
    with twin.as_reference():
        assert not torch.equal(prediction(twin), prediction(policy))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_merged_pipeline_is_written_weight_by_weight(
    folder: Path, tmp_path: Path, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one file and in shards, bit for bit what the merged policy holds; of a run in bfloat16 the
    weights are the checkpoint's. No whole network is read again for it."""
    policy = StableDiffusion(path=str(folder), lora_rank=2, precision=precision).load("cpu")
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1)
    wanted = policy.merged().network.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(merging, "read_network", None)
        policy.save_merged(tmp_path / "whole")
        read = policy.family._merged_readers()[policy.family.part]
    (file,) = (tmp_path / "whole" / "unet").glob("*.safetensors")
    (tmp_path / "shards").mkdir()
    merging.write_weights(tmp_path / "shards", policy.network, read, shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    policy.network.save_config(tmp_path / "shards")
    in_shards = UNet2DConditionModel.from_pretrained(tmp_path / "shards").state_dict()
    for found in (load_file(file), in_shards):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
