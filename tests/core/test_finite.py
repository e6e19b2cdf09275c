"""What is not finite is refused where it arises: every part of a model, in every command that
draws, learns or reads pictures."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.alignment.environment import Denoising
from rlalign.cli import main
from rlalign.core.finite import Diverged, NotFinite, all_finite, watched_place, watching
from rlalign.core.media import as_uint8
from rlalign.core.records import Plan
from rlalign.core.registry import UserError, build
from rlalign.diffusion.rollout import rollout
from rlalign.engine import NoScore
from rlalign.learning.learner import Learner
from rlalign.learning.settings import LearnerSettings
from rlalign.policies.base import Policy
from rlalign.policies.sd3 import StableDiffusion3
from rlalign.policies.stable_diffusion import StableDiffusion
from rlalign.samplers.base import Sampler
from rlalign.sampling import LiveRewards, LocalEngine
from tests.pipelines import LARGE, spoil, write_sound
from tests.samplers.helpers import engine_of
from tests.samplers.test_every_sampler import SMALL, toy
from tests.toy import ToyPolicy, make_units

PARTS = {
    "unet": ("conv_out.weight", "the policy's denoiser gives values that are not finite"),
    "text_encoder": (
        "text_model.final_layer_norm.weight",
        "the policy's text encoder gives values",
    ),
    "vae": ("decoder.conv_out.weight", r"the policy's autoencoder \(its decoder\) gives values"),
}
"""Part of a Stable Diffusion pipeline -> a weight that spoils its answer, and what is said then."""
FLOW_PARTS = {
    "transformer": ("proj_out.weight", "the policy's denoiser gives values that are not finite"),
    "text_encoder_2": ("text_projection.weight", "the policy's text encoder gives values"),
    "vae": ("decoder.conv_out.weight", r"the policy's autoencoder \(its decoder\) gives values"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sound(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def damaged(sound: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """(part, weight, value) -> a copy of one of the pipelines with that weight."""

    def make(part: str, name: str, value: float, *, whole: bool = True, flow: bool = False) -> Path:
        copy = Path(shutil.copytree(sound["sd3" if flow else "sd"], tmp_path / "damaged"))
        return spoil(copy, part, name, value, whole=whole)

    return make


@pytest.fixture(scope="module")
def damaged_policy(
    sound: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Policy]:
    """Part of a Stable Diffusion pipeline -> the policy with its weight that spoils the answer,
    loaded once, for those that change nothing in it."""

    @functools.cache
    def load(part: str) -> Policy:
        folder = shutil.copytree(sound["sd"], tmp_path_factory.mktemp("damaged") / "sd")
        spoil(folder, part, PARTS[part][0], LARGE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rlalign.policies._pipeline.try_out", lambda *given: None)
            return StableDiffusion(path=str(folder)).load("cpu")

    return load


@pytest.fixture
def without_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads without the pass that tries a checkpoint out, which would refuse a weight too large
    before anything is drawn."""
    monkeypatch.setattr("rlalign.policies._pipeline.try_out", lambda *given: None)


# --- on load -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", PARTS)
def test_a_weight_that_is_not_finite_is_refused_on_load(
    damaged: Any, part: str, value: float
) -> None:
    folder = damaged(part, PARTS[part][0], value, whole=False)
    name = PARTS[part][0].removeprefix("text_model.")
    with pytest.raises(
        NotFinite,
        match=rf"the weights of its {part} must be finite, and .*{name} holds NaN or infinity",
    ):
        StableDiffusion(path=str(folder)).load("cpu")


def test_check_refuses_a_damaged_file_too(
    damaged: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged("vae", "encoder.conv_in.weight", float("nan"), whole=False)
    run = {
        "name": "a",
        "policy": {"name": "stable_diffusion", "path": str(folder)},
        "prompts": {"name": "shapes"},
    }
    run |= {"rewards": [{"name": "jpeg"}], "algorithm": {"name": "ddpo", "advantage": "global"}}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    assert main(["check", str(tmp_path / "run.yaml")]) == 2
    assert "the weights of its vae must be finite" in capsys.readouterr().err


# --- where pictures are drawn --------------------------------------------------------------------


def test_what_is_watched_is_so_in_this_thread_alone() -> None:
    """Also inside, where it may be left out; and no policy knows of it."""
    with watching("at the end"):
        assert watched_place() == "at the end"
        with ThreadPoolExecutor(1) as other, watching(""):
            assert watched_place() == other.submit(watched_place).result() == ""
        assert watched_place() == "at the end"
    assert watched_place() == ""


@pytest.mark.parametrize("part", PARTS)
def test_a_rollout_names_the_part(damaged_policy: Callable[[str], Policy], part: str) -> None:
    policy = damaged_policy(part)
    (unit,) = make_units(1, plan=Plan(steps=3, guidance=2.0))
    with pytest.raises(NotFinite, match=PARTS[part][1]) as refusal:
        rollout(policy, unit, 0)
    if part == "unet":
        assert "at step 1 of 3, timestep 667; its weights are damaged" in str(refusal.value)
    assert watched_place() == ""


@pytest.mark.usefixtures("without_trial")
@pytest.mark.parametrize("part", FLOW_PARTS)
def test_a_flow_models_rollout_names_the_part(damaged: Any, part: str) -> None:
    policy = StableDiffusion3(
        path=str(damaged(part, FLOW_PARTS[part][0], LARGE, flow=True)), t5_tokens=0
    ).load("cpu")
    (unit,) = make_units(1, plan=Plan(steps=3, rule="flow_ode", eta=0.0))
    with pytest.raises(NotFinite, match=FLOW_PARTS[part][1]):
        rollout(policy, unit, 0)


def test_the_step_is_the_first_that_is_not_finite() -> None:
    """A network that overflows in the last third of the chain alone."""
    policy, seen = ToyPolicy(), []
    sound = policy.family.predict

    def late(
        x: torch.Tensor, timestep_B: torch.Tensor, *words: torch.Tensor | None
    ) -> torch.Tensor:
        seen.append(int(timestep_B[0]))
        return sound(x, timestep_B, words[0]) * (float("inf") if int(timestep_B[0]) < 300 else 1.0)  # type: ignore[arg-type]

    policy.family.predict = late  # type: ignore[method-assign]
    policy.reference = {}
    (unit,) = make_units(1, plan=Plan(steps=6))
    with pytest.raises(
        NotFinite,
        match=r"the policy's denoiser gives values .* at step 5 of 6, timestep 167; its weights",
    ):
        rollout(policy, unit, 0)
    # the chain, and once more up to the step in question, which is looked at a last time
    assert len(seen) == 6 + 5 + 1


@pytest.mark.promise
@pytest.mark.usefixtures("without_trial")
@pytest.mark.parametrize("command", ["evaluate", "sample"])
@pytest.mark.parametrize("part", PARTS)
def test_evaluate_and_sample_end_with_one_message(
    damaged: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, command: str
) -> None:
    folder = str(damaged(part, PARTS[part][0], LARGE))
    words = {"name": "list", "prompts": ["a red circle", "a blue square"]}
    if command == "evaluate":
        told = [
            f"prompts={json.dumps(words)}",
            "evaluate.prompts=2",
            "rewards=[{name: jpeg}]",
            "plan.steps=2",
        ]
        code = main(["evaluate", folder, *told, "--out", str(tmp_path / "out")])
    else:
        settings = {
            "name": "a",
            "policy": folder,
            "plan": {"steps": 2},
            "prompts": words,
            "pictures": 2,
        }
        settings |= {"rewards": [{"name": "jpeg"}], "sampler": {"name": "best_of_n", "n": 2}}
        (tmp_path / "sample.yaml").write_text(json.dumps(settings))
        code = main(
            ["sample", str(tmp_path / "sample.yaml"), "--local", "--out", str(tmp_path / "out")]
        )
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert said[-1].startswith("error: the policy's ")
    assert "not finite" in said[-1]
    assert not list(tmp_path.glob("out/*.json"))


@pytest.mark.promise
@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_sampler_names_the_part(
    damaged_policy: Callable[[str], Policy], name: str, part: str
) -> None:
    """On rewards with gradients, also where the result is what a gradient through the damaged part
    is made of."""
    policy = damaged_policy(part)
    rewards = LiveRewards([build("rewards", {"name": "centroid"})])  # type: ignore[list-item]
    engine = LocalEngine(policy, [rewards], rows=2, parallel=False)
    (unit,) = make_units(1, per_unit=2, plan=Plan(steps=3))
    more = {"classifier_guidance": {"of": "reward"}, "edict": {"precision": "float32"}}.get(
        name, {}
    )
    method = build("samplers", {"name": name, **SMALL[name], **more})
    assert isinstance(method, Sampler)

    def end_scored() -> None:
        latents = method.sample(engine, unit).latents
        rewards.scores(policy.show(latents, rewards.spaces()), unit.prompts)

    with pytest.raises(NotFinite, match=PARTS[part][1]):
        end_scored()
    assert watched_place() == ""


def test_an_environment_has_no_reward_for_a_picture_that_is_not_finite(
    damaged_policy: Callable[[str], Policy],
) -> None:
    made = Denoising(
        damaged_policy("vae"),
        lambda media, prompts: np.zeros(1),
        ["a red circle"],
        Plan(steps=2),
        render_mode="rgb_array",
    )
    made.reset(seed=0)
    with pytest.raises(NotFinite, match="its decoder"):
        made.render()


# --- rewards and methods -------------------------------------------------------------------------


def test_a_rewards_gradient_that_is_not_finite_is_named() -> None:
    reward: Any = build("rewards", {"name": "centroid", "label": "steep"})

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, value_B: torch.Tensor) -> torch.Tensor:
            return value_B.clone()

        @staticmethod
        def backward(context: Any, pull_B: torch.Tensor) -> torch.Tensor:
            return pull_B * torch.nan

    rewards = LiveRewards(
        [reward], scorers={"steep": lambda media, prompts: Steep.apply(media.flatten(1).mean(1))}
    )
    with pytest.raises(
        NotFinite, match=r"the gradient of rewards\.steep gives values that are not finite"
    ):
        rewards.gradient({"media": torch.rand(2, 1, 3, 8, 8)}, ["a", "b"])


def test_a_picture_without_a_score_has_no_gradient() -> None:
    reward: Any = build("rewards", {"name": "centroid", "label": "some"})

    def some(media: torch.Tensor, prompts: Any) -> torch.Tensor:
        return media.flatten(1).mean(1) * torch.tensor([1.0, torch.nan])

    rewards = LiveRewards([reward], scorers={"some": some})
    media = torch.rand(2, 1, 3, 8, 8)
    value_B, pulls = rewards.gradient({"media": media}, ["a", "b"])
    gradient = pulls["media"]
    assert np.isfinite(value_B).tolist() == [True, False]
    torch.testing.assert_close(gradient[0], torch.full_like(gradient[0], 1.0 / gradient[0].numel()))
    assert not gradient[1].any()


def test_latents_that_a_method_spoilt_are_not_laid_on_the_model() -> None:
    engine = engine_of(toy("vp"), lambda x_BD: x_BD[:, 0])
    (unit,) = make_units(1, per_unit=2, plan=Plan(steps=3))
    method: Any = build("samplers", {"name": "training_free", "rho": 3e38, "mu": 0.0})
    with pytest.raises(
        UserError, match="not finite .*where a method of sampler made them, lower its strength"
    ) as refusal:
        method.sample(engine, unit)
    assert not isinstance(refusal.value, NoScore)
    assert "weights" not in str(refusal.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_conversion_to_bytes_takes_what_is_not_finite(value: float) -> None:
    media = torch.rand(2, 1, 3, 4, 4)
    assert as_uint8(media).tolist() == (media * 255.0).round().to(torch.uint8).tolist()
    assert as_uint8(torch.tensor([-3.0, 0.5, 7.0])).tolist() == [0, 128, 255]
    media[1, 0, 2, 3, 3] = value
    with pytest.raises(NotFinite):
        as_uint8(media)
    jpeg: Any = build("rewards", {"name": "jpeg", "on_error": "drop"})
    with pytest.raises(NotFinite):
        jpeg.load("cpu")(media, ["a", "b"])


def test_scores_may_be_missing_where_latents_may_not() -> None:
    assert all_finite(
        (
            torch.ones(2),
            np.array([np.nan]),
            {"a": torch.ones(1)},
            "text",
            torch.ones(2, dtype=torch.long),
        )
    )
    assert not all_finite((torch.ones(2), (torch.tensor([1.0, torch.inf]),)))


# --- where it learns -----------------------------------------------------------------------------


def settings_of(folder: Path, **more: Any) -> dict[str, Any]:
    run = {
        "name": "a",
        "rounds": 2,
        "policy": {"name": "stable_diffusion", "path": str(folder)},
        "plan": {"steps": 2},
    }
    run |= {
        "prompts": {
            "name": "list",
            "prompts": ["a", "b"],
            "per_round": 2,
            "samples_per_prompt": 2,
            "per_unit": 2,
        }
    }
    run |= {
        "rewards": [{"name": "jpeg"}],
        "algorithm": {"name": "ddpo", "advantage": "global", "clip_range": 0.1},
    }
    run |= {
        "learner": {"updates_per_round": 1},
        "evaluate": {"prompts": 2},
        "runtime": {"rollout": {"workers": 1}},
    }
    return {**run, **more}


def train(run: dict[str, Any], folder: Path) -> int:
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(json.dumps(run))
    return main(["train", str(folder / "run.yaml"), "--local", "--out", str(folder / "run")])


@pytest.mark.usefixtures("without_trial")
@pytest.mark.parametrize("part", PARTS)
def test_a_run_names_the_part_and_not_the_learning_rate(
    damaged: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    assert train(settings_of(damaged(part, PARTS[part][0], LARGE)), tmp_path / "out") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: the policy's ")
    assert "learner.lr" not in said


def test_a_run_that_diverges_still_names_the_learning_rate(
    sound: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of 1e37 after the first update: the next round's pictures are not finite, and the
    first evaluation's were."""
    run = settings_of(sound["sd"], learner={"updates_per_round": 1, "lr": 1e37}, rounds=3)
    assert train(run, tmp_path / "out") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "the policy's denoiser gives values that are not finite (NaN or infinity) at step 1 of 2"
        in said
    )
    assert "its training has diverged" in said
    assert "lower learner.lr, or look at the rewards" in said


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_trained_weights_are_told_from_those_that_it_began_with(lora_rank: int) -> None:
    policy = ToyPolicy(lora_rank=lora_rank)
    (unit,) = make_units(1)
    policy.set_weights({n: torch.full_like(t, 1e38) for n, t in policy.weights().items()})
    with pytest.raises(Diverged, match="its training has diverged"):
        rollout(policy, unit, 3)


@pytest.mark.usefixtures("without_trial")
def test_an_update_that_is_not_finite_names_the_part_that_was_so_before(damaged: Any) -> None:
    """Pairs of given latents: nothing was drawn, so that the update is the first to ask the
    denoiser."""
    from rlalign.core.batches import PairBatch, Pairs

    policy = StableDiffusion(path=str(damaged("unet", PARTS["unet"][0], LARGE))).load("cpu")
    sides = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pairs = Pairs(
        prompts=("a", "b"),
        first=sides[0],
        second=sides[1],
        label_B=torch.ones(2),
        key=("pairs", 0),
        plan=Plan(),
    )
    algorithm: Any = build("algorithms", {"name": "diffusion_dpo", "draws": 2})
    learner = Learner(policy, algorithm.loss, LearnerSettings(updates_per_round=1), seed=0)
    with pytest.raises(
        NotFinite, match=r"the policy's denoiser gives .* in update 1, timestep \d+, \d+"
    ) as refusal:
        learner.update(PairBatch(pairs=(pairs,), draws=2), round=1)
    assert not isinstance(refusal.value, Diverged)


@pytest.mark.usefixtures("without_trial")
def test_pictures_that_are_read_are_refused_by_the_encoders_name(damaged: Any) -> None:
    policy = StableDiffusion(path=str(damaged("vae", "encoder.conv_out.weight", LARGE))).load("cpu")
    with pytest.raises(
        NotFinite,
        match=r"the policy's autoencoder \(its encoder\) gives values that are not finite",
    ):
        policy.as_latents(torch.zeros(1, 1, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.usefixtures("without_trial")
def test_pretraining_on_a_damaged_autoencoder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlalign.policies.tiny import ASSET

    folder = Path(shutil.copytree(ASSET, tmp_path / "tiny"))
    spoil(folder, "vae", "encoder.conv_out.weight", LARGE)
    settings = {
        "images": 4,
        "autoencoder": {"source": str(folder)},
        "denoiser": {"updates": 1, "batch": 2},
    }
    (tmp_path / "pretrain.yaml").write_text(json.dumps(settings))
    assert main(["pretrain", str(tmp_path / "pretrain.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert (
        "the autoencoder (its encoder) gives values that are not finite" in capsys.readouterr().err
    )


def test_a_stage_that_diverges_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "images": 4,
        "autoencoder": {"source": "tiny"},
        "denoiser": {"updates": 9, "batch": 2, "lr": 1e37, "warmup": 0},
    }
    (tmp_path / "pretrain.yaml").write_text(json.dumps(settings))
    assert main(["pretrain", str(tmp_path / "pretrain.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert "denoiser: the gradient is not finite (NaN or infinity) after" in capsys.readouterr().err
    assert not (tmp_path / "out" / "policy").exists()
