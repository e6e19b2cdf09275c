"""The Python API: a policy and a reward by their names, pictures in one call."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rlalign
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.data.prompts.base import prompt_id
from rlalign.diffusion.rollout import rollout
from rlalign.sampling import parse_sample, sample_local
from tests.runs import final_tensors, two_rounds_of_points
from tests.toy import save_pipeline

PROMPTS = ["a red circle", "a blue square", "two green triangles"]
POINTS = two_rounds_of_points(
    samples_per_prompt=2,
    rewards=[{"name": "jpeg"}],
    algorithm={"name": "ddpo", "advantage": "group"},
    evaluate={"prompts": 2, "grid": 2},
)


@pytest.fixture(scope="module")
def tiny() -> rlalign.Policy:
    return rlalign.load_policy("tiny")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds on points."""
    import yaml

    folder = tmp_path_factory.mktemp("api")
    (folder / "run.yaml").write_text(yaml.safe_dump(POINTS))
    rlalign.train_local(
        rlalign.load_run(folder / "run.yaml"),
        folder / "run",
        resume=False,
        on_record=lambda record: None,
    )
    return folder / "run"


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_deterministic_sample_is_that_of_diffusers(
    tiny: rlalign.Policy, guidance: float
) -> None:
    """Ten steps of the shipped model from given latents: latents within 1e-4 of their largest,
    pictures within one grey level."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from rlalign.policies.tiny import ASSET

    pipeline = StableDiffusionPipeline.from_pretrained(ASSET, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(len(PROMPTS), *tiny.latent_shape(Plan()))
    told = {"num_inference_steps": 10, "guidance_scale": guidance}

    wanted = pipeline(PROMPTS, latents=start.clone(), output_type="latent", **told).images
    latents = tiny.sample(PROMPTS, steps=10, guidance=guidance, latents=start, output="latents")
    assert latents.dtype == torch.float32
    assert (latents - wanted).abs().max() < 1e-4 * wanted.abs().max()

    wanted = pipeline(PROMPTS, latents=start.clone(), output_type="np", **told).images
    media = tiny.sample(PROMPTS, steps=10, guidance=guidance, latents=start)
    assert (media.shape, media.dtype) == ((3, 1, 3, 32, 32), torch.uint8)
    assert np.abs(media[:, 0].numpy() - wanted.transpose(0, 3, 1, 2) * 255.0).max() < 1.0


def test_a_sample_is_a_rollout(tiny: rlalign.Policy) -> None:
    """With noise, bit for bit: the same unit, rolled out."""
    unit = Unit(
        key=UnitKey("sample", 0, 0),
        prompts=tuple(PROMPTS),
        prompt_ids=tuple(prompt_id(prompt) for prompt in PROMPTS),
        sample_ids=(0, 1, 2),
        seed=7,
        plan=Plan(steps=4, eta=1.0, guidance=2.0),
    )
    trajectory, media = rollout(tiny, unit, 0)
    told = {"steps": 4, "eta": 1.0, "guidance": 2.0, "seed": 7}
    assert np.array_equal(tiny.sample(PROMPTS, **told), media)
    found = tiny.sample(PROMPTS, **told, output="latents")
    assert np.array_equal(found, trajectory.latents_BK1[:, -1])


def test_a_sample_is_what_the_sample_command_draws(tiny: rlalign.Policy, tmp_path: Path) -> None:
    """``rlalign sample`` with the plain sampler, the same list of prompts and the same seed."""
    settings = parse_sample(
        {
            "name": "plain",
            "seed": 3,
            "policy": {"name": "tiny"},
            "plan": {"steps": 3, "eta": 1.0},
            "prompts": {"name": "list", "prompts": PROMPTS},
            "pictures": len(PROMPTS),
            "rewards": [{"name": "shapes"}],
            "sampler": {"name": "plain"},
            "compare": False,
        }
    )
    sample_local(settings, tmp_path / "out", lambda record: None)
    files = sorted((tmp_path / "out" / "pictures").rglob("*.png"))
    drawn = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    media = tiny.sample(PROMPTS, steps=3, eta=1.0, seed=3)
    assert np.array_equal(drawn.transpose(0, 3, 1, 2), media[:, 0])


def test_seeds_repeat_and_latents_are_used(tiny: rlalign.Policy) -> None:
    first = tiny.sample(PROMPTS, steps=3, seed=1)
    assert torch.equal(tiny.sample(PROMPTS, steps=3, seed=1), first)
    assert not torch.equal(tiny.sample(PROMPTS, steps=3, seed=2), first)
    start = torch.randn(1, *tiny.latent_shape(Plan())).expand(2, -1, -1, -1)
    same = tiny.sample(["a red circle"] * 2, steps=3, latents=start, seed=5)
    assert torch.equal(same[0], same[1]), "the seed's noise was used in place of the given one"
    again = tiny.sample(["a red circle"] * 2, steps=3, latents=start.numpy(), seed=6)
    assert torch.equal(again, same)


def test_sizes_are_the_plans(tmp_path: Path) -> None:
    policy = rlalign.load_policy(save_pipeline(tmp_path / "pipeline"))
    assert policy.sample(["a"], steps=2, height=24, width=32).shape == (1, 1, 3, 24, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"sample: steps must be >= 1, got 0"),
        ({"steps": 2000}, r"steps must be <= 1000, got 2000"),
        ({"steps": 3, "eta": -1.0}, r"eta must be >= 0, got -1.0"),
        ({"steps": 3, "guidance": float("nan")}, r"guidance must be a finite number"),
        ({"steps": 3, "frames": 2}, r"frames must be 1"),
        ({"steps": 3, "height": 33}, r"multiples of \d+, got 33 x 32"),
        ({"steps": 3, "seed": -1}, r"seed must be a whole number >= 0, got -1"),
        ({"steps": 3, "output": "pixels"}, r"output must be media or latents, got 'pixels'"),
        ({"steps": 3, "latents": torch.zeros(3, 4, 8, 9)}, r"of shape \(3, 4, .*\(3, 4, 8, 9\)"),
        ({"steps": 3, "latents": torch.zeros(3, 4, 8, 8).int()}, r"floating-point .*torch.int32"),
    ],
)
def test_what_cannot_be_sampled_is_a_users_error(
    tiny: rlalign.Policy, settings: dict, message: str
) -> None:
    with pytest.raises(rlalign.UserError, match=message):
        tiny.sample(PROMPTS, **settings)


@pytest.mark.parametrize("prompts", ["a red circle", [], [3]])
def test_prompts_are_a_list_of_texts(tiny: rlalign.Policy, prompts: object) -> None:
    with pytest.raises(rlalign.UserError, match="prompts must be a list of at least one text"):
        tiny.sample(prompts, steps=3)


def test_a_policy_by_its_name(tmp_path: Path) -> None:
    """A plug-in's name with settings, a class kept elsewhere, and a pipeline folder."""
    assert rlalign.load_policy("points", lora_rank=2).reference == {}
    assert rlalign.load_policy("points", hidden=7).network.inner.out_features == 7
    assert type(rlalign.load_policy("tests.toy:Toy").family).__name__ == "ToyFamily"
    folder = save_pipeline(tmp_path / "pipeline")
    by_folder = rlalign.load_policy(folder, lora_rank=2)
    assert all("lora" in name for name in by_folder.trainable())
    by_name = rlalign.load_policy("stable_diffusion", path=str(folder))
    told = {"steps": 3, "guidance": 3.0}
    assert torch.equal(by_folder.sample(["a"], **told), by_name.sample(["a"], **told))


def test_a_policy_by_its_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, from a cache as the hub's client lays it out: the family is read from the index."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--mine--small" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(save_pipeline(tmp_path / "pipeline"), snapshot)
    (tmp_path / "models--mine--small" / "refs").mkdir()
    (tmp_path / "models--mine--small" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    by_id = rlalign.load_policy("mine/small")
    by_folder = rlalign.load_policy(tmp_path / "pipeline")
    assert torch.equal(by_id.sample(["a"], steps=2), by_folder.sample(["a"], steps=2))


def test_a_policy_by_its_run_folder(run_folder: Path) -> None:
    """The weights are those of the newest checkpoint, which training has changed."""
    policy = rlalign.load_policy(run_folder)
    kept = final_tensors(run_folder)
    for name, weight in policy.weights().items():
        assert torch.equal(weight, kept[f"policy/{name}"])
    base = rlalign.load_policy("points").weights()
    assert any(not torch.equal(base[name], weight) for name, weight in policy.weights().items())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("tyni", {}, r"a model must be a run folder .* or one of cogvideox, .*got 'tyni'"),
        ("mine/nowhere", {}, r"the hub id of one, .*got 'mine/nowhere', and looked at /"),
        ("points", {"lora_rnk": 2}, r"load_policy\.lora_rnk: unknown setting; did you mean 'lora_"),
        ("points", {"lora_rank": -1}, r"load_policy\.lora_rank must be >= 0, got -1"),
        ("stable_diffusion", {}, r"load_policy\.path is required"),
        ("tests.toy:Tyo", {}, r"module 'tests.toy' has no class 'Tyo'"),
        ("tiny", {"device": "cuda:99"}, r"load_policy\.device must be"),
    ],
)
def test_a_policy_that_is_not_there_is_a_users_error(
    name: str, settings: dict, message: str
) -> None:
    with pytest.raises(rlalign.UserError, match=message):
        rlalign.load_policy(name, **settings)


def test_a_run_keeps_the_settings_that_its_weights_have(run_folder: Path) -> None:
    assert rlalign.load_policy(run_folder, precision="bfloat16").precision == "bfloat16"
    with pytest.raises(rlalign.UserError, match=r"load_policy\.lora_rank is the run's own"):
        rlalign.load_policy(run_folder, lora_rank=2)


def test_a_reward_scores_media_of_every_kind(tiny: rlalign.Policy) -> None:
    """uint8 tensors and arrays, and floating point in [0, 1]: the same pictures, the same
    scores."""
    media = tiny.sample(PROMPTS, steps=10, guidance=4.0)
    score = rlalign.load_reward("shapes")
    found = score(media, PROMPTS)
    assert (found.dtype, found.shape) == (torch.float32, (3,))
    assert found.max() > 0.0
    assert torch.equal(score(media.numpy(), PROMPTS), found)
    assert torch.equal(score(media.float() / 255.0, PROMPTS), found)
    # the captions of other pictures fit less well
    assert score(media, [*PROMPTS[1:], PROMPTS[0]]).mean() < found.mean()


def test_gradients_pass_through_a_differentiable_reward() -> None:
    """The slope along a random direction, against finite differences."""
    score = rlalign.load_reward("centroid")
    media = torch.rand(2, 1, 3, 8, 8, requires_grad=True)
    value_B = score(media, ["a", "b"])
    (gradient,) = torch.autograd.grad(value_B.sum(), media)
    direction = torch.randn_like(media)
    step = 1e-3
    with torch.no_grad():
        up = score(media + step * direction, ["a", "b"]).sum()
        down = score(media - step * direction, ["a", "b"]).sum()
    slope = ((up - down) / (2 * step)).item()
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(
    ("media", "prompts", "message"),
    [
        (torch.zeros(1, 3, 8, 8), ["a"], r"of shape \(B, F, 3, H, W\), got float32 of shape"),
        (torch.zeros(1, 1, 3, 8, 8).int(), ["a"], r"got int32 of shape"),
        (torch.zeros(2, 1, 3, 8, 8), ["a"], r"prompts must be a list of 2 texts"),
        (torch.zeros(1, 1, 3, 8, 8), "a", r"prompts must be a list of 1 texts"),
    ],
)
def test_media_that_cannot_be_scored_are_a_users_error(
    media: torch.Tensor, prompts: object, message: str
) -> None:
    with pytest.raises(rlalign.UserError, match=message):
        rlalign.load_reward("jpeg")(media, prompts)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("jpg", {}, r"load_reward\.name: no plug-in 'jpg' on shelf rewards; did you mean 'jpeg'"),
        ("jpeg", {"qualty": 3}, r"load_reward\.qualty: unknown setting"),
        ("jpeg", {"device": "cuda:99"}, r"load_reward\.device must be"),
    ],
)
def test_a_reward_that_is_not_there_is_a_users_error(
    name: str, settings: dict, message: str
) -> None:
    with pytest.raises(rlalign.UserError, match=message):
        rlalign.load_reward(name, **settings)


def test_the_public_names_keep_their_form() -> None:
    """What notebooks and other programs rely on."""
    functions = ("load_policy", "load_reward", "load_run", "train_local", "train_on_ray")
    for name in (*functions, "execute_plans"):
        assert name in rlalign.__all__
        assert callable(getattr(rlalign, name))
    parameters = inspect.signature(rlalign.Policy.sample).parameters
    defaults = {
        name: one.default for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY
    }
    assert defaults == {
        "steps": inspect.Parameter.empty,
        "guidance": 1.0,
        "eta": 0.0,
        "seed": 0,
        "latents": None,
        "height": 0,
        "width": 0,
        "frames": 1,
        "output": "media",
    }
