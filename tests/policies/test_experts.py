"""Two denoisers, each for a part of the noise levels: which one is asked, and which one learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlalign.algorithms._advantages import PromptStatistics
from rlalign.algorithms.ddpo import DDPO
from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.networks import lora
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.base import Policy
from rlalign.policies.wan import Wan
from tests.policies.acceptance import PROMPTS
from tests.policies.family_runs import run_of_pair, train_two_rounds
from tests.runs import metrics
from tests.toy import collect, make_units

TIMES = torch.tensor([900.0, 200.0, 875.2, 874.9, 1000.0])
"""Of the boundary 875 three are above."""
HIGH = [True, False, True, False, True]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("experts") / "pipeline"
    write_pipeline(found, FAMILIES["wan22"], seed=3)
    return found


def load(folder: Path, **settings: Any) -> Any:
    return Wan(path=str(folder), text_tokens=16, **settings).load("cpu")


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return load(folder)


def asked(policy: Policy, rows: int) -> tuple[torch.Tensor, Any]:
    shape = policy.latent_shape(Plan(height=16, width=16, frames=5))
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))
    return x, policy.encode([f"{n}" for n in range(rows)]).caption


def test_a_row_asks_the_expert_of_its_level(policy: Policy) -> None:
    """As that expert alone answers, in whatever company and order."""
    x, words = asked(policy, len(TIMES))
    family: Any = policy.family
    experts = policy.network
    with torch.no_grad():
        found = family.predict(x, TIMES, words)
        for high, expert in ((True, experts.transformer), (False, experts.transformer_2)):
            alone = expert(x, TIMES, words["embeds_BLD"], return_dict=False)[0]
            for row, is_high in enumerate(HIGH):
                difference = (found[row] - alone[row]).abs().max()
                assert difference < 1e-5 if is_high == high else difference > 1e-2


@pytest.mark.parametrize(
    ("shift", "steps", "high"),
    [
        (3.0, 10, 4),
        (3.0, 20, 7),
        (3.0, 50, 16),
        (5.0, 10, 5),
        (5.0, 20, 9),
        (5.0, 50, 21),
        (12.0, 10, 7),
        (12.0, 20, 13),
        (12.0, 50, 32),
    ],
)
def test_the_boundary_is_the_pipelines(
    policy: Policy, folder: Path, shift: float, steps: int, high: int
) -> None:
    """Which compares timesteps that the shipped solver has cut to whole numbers."""
    from diffusers import UniPCMultistepScheduler

    from rlalign.diffusion.paths import Tokens
    from rlalign.networks.pipelines.schedulers import read_flow

    loaded: Any = UniPCMultistepScheduler.from_pretrained(
        folder, subfolder="scheduler", flow_shift=shift
    )
    loaded.set_timesteps(steps)
    wanted = (loaded.timesteps >= 0.875 * loaded.config.num_train_timesteps).tolist()
    path = read_flow(loaded, "", Tokens(side=16))
    family: Any = policy.family
    found = family.is_high(path.timestep(path.levels(steps)[:-1])).tolist()
    assert found == wanted
    assert sum(found) == high


def test_each_expert_has_a_guidance(folder: Path) -> None:
    family: Any = load(folder, guidance_low=2.0).family
    found = family.guidance_at(TIMES, 4.0)
    assert found.shape == (5, 1, 1, 1, 1)
    assert found.flatten().tolist() == [4.0, 2.0, 4.0, 2.0, 4.0]
    plain: Any = load(folder).family
    assert plain.guidance_at(TIMES, 4.0) == 4.0


def test_what_each_step_trained_is_measured(folder: Path) -> None:
    """The share of rows of the first expert, of those that are learned from; a rollout measures
    nothing."""
    policy = load(folder, lora_rank=2)
    plan = Plan(steps=4, rule="flow_sde", eta=0.7, guidance=3.0, height=16, width=16, frames=5)
    scored = collect(policy, make_units(1, per_unit=2, plan=plan))
    assert policy.meter.take_means() == {}
    algorithm = DDPO(advantage="global")
    batch = algorithm.make_batch(scored, PromptStatistics())
    shares = []
    for one in batch.passes(1):
        algorithm.loss(one, policy)
        (share,) = policy.meter.take_means().values()
        high = policy.path.levels(4)[one.steps[0]] >= 0.875
        assert share.item() == float(high)
        shares.append(share.item())
    assert sorted(shares) == [0.0, 0.0, 1.0, 1.0]
    (mixed,) = batch.passes(4)
    algorithm.loss(mixed, policy)
    assert policy.meter.take_means()["expert/high_share"].item() == 0.5


@pytest.mark.parametrize("trained", ["high", "low", "both"])
def test_one_expert_may_be_trained_alone(folder: Path, tmp_path: Path, trained: str) -> None:
    """The other has no adapter, and a loss of its rows has a gradient of 0; each that is trained
    has a file, which a run can start from."""
    policy = load(folder, lora_rank=2, trained_experts=trained)
    for parameter in policy.trainable().values():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    names = {name.split(".")[0] for name in policy.trainable()}
    parts = {"high": {"transformer"}, "low": {"transformer_2"}}
    assert names == parts.get(trained, {"transformer", "transformer_2"})
    x, words = asked(policy, 2)
    for timestep, part in ((900.0, "transformer"), (200.0, "transformer_2")):
        policy.network.zero_grad(set_to_none=True)
        policy.answer(x, torch.full((2,), timestep), words).square().mean().backward()
        for name, parameter in policy.trainable().items():
            heard = parameter.grad is not None and bool(parameter.grad.any())
            assert heard == name.startswith(f"{part}.")

    policy.save(tmp_path)
    files = {"transformer": lora.FILE, "transformer_2": "pytorch_lora_weights_2.safetensors"}
    assert {f.name for f in tmp_path.iterdir()} == {files[name] for name in names}
    again = load(folder, adapter=str(tmp_path), trained_experts=trained)
    said = [one.answer(x, torch.tensor([900.0, 200.0]), words).detach() for one in (policy, again)]
    assert torch.equal(*said)
    if trained != "both":
        (file,) = tmp_path.iterdir()
        alone = load(folder, adapter=str(file), trained_experts=trained)
        assert torch.equal(alone.answer(x, torch.tensor([900.0, 200.0]), words), said[0])


def test_all_weights_of_one_expert(folder: Path, tmp_path: Path) -> None:
    """The pipeline that is saved has both."""
    policy = load(folder, trained_experts="low")
    assert {name.split(".")[0] for name in policy.trainable()} == {"transformer_2"}
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(1.0)
    policy.save(tmp_path)
    for part, moved in (("transformer", 0.0), ("transformer_2", 1.0)):
        old, new = (
            load_file(place / part / "diffusion_pytorch_model.safetensors")
            for place in (folder, tmp_path)
        )
        assert all(torch.equal(new[name], tensor + moved) for name, tensor in old.items())


def test_both_adapters_are_asked_for(folder: Path, tmp_path: Path) -> None:
    policy = load(folder, lora_rank=2)
    policy.save(tmp_path)
    both = r"pytorch_lora_weights\.safetensors and pytorch_lora_weights_2\.safetensors"
    with pytest.raises(UserError, match=f"must be a folder with {both} where both .*, got"):
        load(folder, adapter=str(tmp_path / lora.FILE))
    (tmp_path / "pytorch_lora_weights_2.safetensors").unlink()
    rule = r"policy\.adapter must be a folder with pytorch_lora_weights_2\.safetensors, or a"
    with pytest.raises(UserError, match=rule):
        load(folder, adapter=str(tmp_path))


def test_settings_of_two_are_refused_for_one(tmp_path: Path) -> None:
    write_pipeline(tmp_path, FAMILIES["wan"])
    for settings in ({"guidance_low": 3.0}, {"trained_experts": "low"}):
        with pytest.raises(UserError, match=r"which has one denoiser, got"):
            load(tmp_path, **settings)


@pytest.mark.parametrize("ratio", [1.5, 0.0])
def test_a_boundary_is_a_share(tmp_path: Path, ratio: float) -> None:
    write_pipeline(tmp_path, FAMILIES["wan22"])
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"boundary_ratio": ratio}))
    with pytest.raises(UserError, match=rf"boundary_ratio in model_index\.json .*, got {ratio}"):
        load(tmp_path)


def test_a_boundary_needs_two(tmp_path: Path) -> None:
    write_pipeline(tmp_path, FAMILIES["wan"])
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"boundary_ratio": 0.9}))
    with pytest.raises(UserError, match=r"got 0\.9 and no transformer_2$"):
        load(tmp_path)


def test_bfloat16_keeps_the_same_parts_in_both(folder: Path) -> None:
    policy = load(folder, lora_rank=2, precision="bfloat16")
    kinds: dict[str, dict[str, torch.dtype]] = {"transformer": {}, "transformer_2": {}}
    for name, parameter in policy.network.named_parameters():
        part, rest = name.split(".", 1)
        kinds[part][rest] = parameter.dtype
    assert kinds["transformer"] == kinds["transformer_2"]
    assert {*kinds["transformer"].values()} == {torch.float32, torch.bfloat16}
    assert policy.encode(PROMPTS).caption["embeds_BLD"].isfinite().all()


@pytest.mark.promise
def test_a_run_says_which_expert_it_trained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each round's metrics: of two steps the first is learned from, which is the first
    expert's; of DiffusionNFT's levels some are of either."""
    monkeypatch.setattr("rlalign.report.write_report", lambda *_, **__: None)
    shares = {}
    for algorithm in ("grpo", "nft"):
        train_two_rounds(run_of_pair("wan22", algorithm, folder), tmp_path / algorithm)
        shares[algorithm] = [line["expert/high_share"] for line in metrics(tmp_path / algorithm)]
    assert shares["grpo"] == [1.0, 1.0]
    assert all(0.0 < share < 1.0 for share in shares["nft"])
