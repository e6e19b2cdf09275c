"""Runs that start from an adapter: the file's weights, rank and scale; what they are compared with;
and what is refused."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlalign.alignment.models import find_model
from rlalign.cli import main
from rlalign.config import load_run
from rlalign.core.records import Plan
from rlalign.core.registry import UserError, build
from rlalign.diffusion.rollout import rollout
from rlalign.networks import lora
from rlalign.policies.base import Policy
from rlalign.policies.sd3 import StableDiffusion3
from rlalign.policies.stable_diffusion import StableDiffusion
from tests.pipelines import write_sound
from tests.runs import CONFIGS, metrics
from tests.toy import make_units

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([901, 401])
PROMPTS = ["a red circle", "blue"]
FAMILIES = {"sd": StableDiffusion, "sd3": StableDiffusion3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sound(tmp_path_factory.mktemp("pipelines"))


def trained(recipe: Any, folder: Path) -> Policy:
    """A policy with adapters as large as training might make them, saved in ``folder``."""
    policy = recipe.load("cpu")
    with torch.no_grad():
        for number, parameter in enumerate(policy.trainable().values()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.copy_(0.2 * drawn)
    policy.save(folder)
    return policy


@pytest.fixture(scope="module")
def saved(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Policy, Path]]:
    """Family and settings of its LoRA -> a trained policy, which nobody changes, and the folder of
    its adapter; made once."""

    @functools.cache
    def make(family: str, **settings: float) -> tuple[Policy, Path]:
        folder = tmp_path_factory.mktemp("adapter")
        recipe = FAMILIES[family](path=str(folders[family]), **settings)
        return trained(recipe, folder), folder

    return make


@torch.no_grad()
def prediction(policy: Policy) -> torch.Tensor:
    condition = policy.encode(PROMPTS)
    return policy.family.predict(X, T.float(), condition.caption)


# --- what it starts with -------------------------------------------------------------------------


@pytest.mark.promise
@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 10.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_the_policy_that_was_saved(
    folders: dict[str, Path], saved: Any, family: str, alpha: float, as_file: bool
) -> None:
    """Weights, scale and what is trained, bit for bit."""
    recipe, path = FAMILIES[family], str(folders[family])
    policy, adapter = saved(family, lora_rank=4, lora_alpha=alpha)
    found = recipe(path=path, adapter=str(adapter / lora.FILE if as_file else adapter)).load("cpu")
    mine, theirs = found.weights(), policy.weights()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(prediction(found), prediction(policy))
    assert {p.dtype for p in found.trainable().values()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_diffusers_makes_of_the_file(
    folders: dict[str, Path], saved: Any, family: str
) -> None:
    from diffusers import DiffusionPipeline

    recipe, path = FAMILIES[family], str(folders[family])
    _, adapter = saved(family, lora_rank=4, lora_alpha=10.0)
    found = recipe(path=path, adapter=str(adapter)).load("cpu")
    absent = {} if family == "sd" else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = DiffusionPipeline.from_pretrained(
        path, **({"safety_checker": None} if family == "sd" else absent)
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(adapter)
    plan = Plan(steps=4, rule="ddim" if family == "sd" else "flow_ode", eta=0.0, guidance=3.0)
    (unit,) = make_units(1, per_unit=2, plan=plan)
    trajectory, media = rollout(found, unit, 0)
    start = torch.from_numpy(trajectory.latents_BK1[:, 0].copy())
    told = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": start, "output_type": "pt"}
    if family == "sd":
        from diffusers import DDIMScheduler

        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pictures = pipeline(list(unit.prompts), **told).images
    assert (pictures * 255.0 - torch.from_numpy(media[:, 0]).float()).abs().max() < 0.5 + 0.1
    bare = rollout(recipe(path=path).load("cpu"), unit, 0)[1]
    assert (bare.astype(int) - media.astype(int)).max() > 1


def test_a_training_scripts_file_needs_no_metadata(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """As diffusers' scripts for Stable Diffusion save it, in float16 too: alpha is the rank, and
    more layers than ours."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionPipeline.from_pretrained(folders["sd"], safety_checker=None)
    config = LoraConfig(
        r=3,
        lora_alpha=3,
        target_modules=["to_q", "to_v", "ff.net.2", "conv1"],
        init_lora_weights=False,
    )
    pipeline.unet.add_adapter(config)
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.half().float())
    layers = {n: t.half() for n, t in get_peft_model_state_dict(pipeline.unet).items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    found = StableDiffusion(path=str(folders["sd"]), adapter=str(tmp_path), lora_rank=3).load("cpu")
    with torch.no_grad():
        wanted = pipeline.unet(
            X, T, encoder_hidden_states=found.encode(PROMPTS).caption["embeds_BLD"]
        ).sample
    torch.testing.assert_close(prediction(found), wanted, rtol=0, atol=1e-6)
    assert len(found.trainable()) == len(layers)
    found.save(tmp_path / "again")
    again = StableDiffusion(path=str(folders["sd"]), adapter=str(tmp_path / "again")).load("cpu")
    assert torch.equal(prediction(again), prediction(found))
    assert (prediction(found.merged()) - prediction(found)).abs().max() < 1e-5


# --- what it is compared with --------------------------------------------------------------------


def moved(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_adapter_that_training_began_with(
    folders: dict[str, Path], saved: Any, family: str
) -> None:
    """For KL, for interpolation and for replicas; not the model without an adapter."""
    recipe, path = FAMILIES[family], str(folders[family])
    _, adapter = saved(family, lora_rank=2)
    policy = recipe(path=path, adapter=str(adapter)).load("cpu")
    start, bare = prediction(policy), prediction(recipe(path=path).load("cpu"))
    moved(policy)
    now = prediction(policy)
    assert not torch.equal(now, start)
    for one in (policy, policy.replica()):
        for pretrained in (False, True):
            with one.as_reference(pretrained=pretrained):
                assert torch.equal(prediction(one), start)
        assert torch.equal(prediction(one), now)
    assert (start - bare).abs().max() > 1e-3
    policy.interpolation = 0.0
    condition, level = policy.encode(PROMPTS), policy.path.levels(4)[1]
    with torch.no_grad():
        mixed = policy.denoise(X, level, condition, 1.0)
        policy.interpolation = 1.0
        with policy.as_reference(pretrained=True):
            began = policy.denoise(X, level, condition, 1.0)
    torch.testing.assert_close(mixed, began)


def run_file(folder: Path, name: str, policy: dict[str, Any], **more: Any) -> Path:
    run = {"name": name, "rounds": 2, "seed": 3, "policy": policy, "plan": {"steps": 3, "eta": 1.0}}
    run |= {
        "prompts": {
            "name": "list",
            "prompts": ["a", "b"],
            "per_round": 2,
            "samples_per_prompt": 2,
            "per_unit": 1,
        }
    }
    run |= {
        "rewards": [{"name": "jpeg"}],
        "algorithm": {"name": "dpok", "advantage": "group", "clip_range": 0.1},
    }
    run |= {
        "learner": {"lr": 1e-2, "updates_per_round": 2},
        "evaluate": {"prompts": 2, "every": 0, "grid": 2},
    }
    run |= {"runtime": {"rollout": {"workers": 1}, "reward": {"workers": 1}}, **more}
    (folder / f"{name}.yaml").write_text(json.dumps(run))
    return folder / f"{name}.yaml"


def began(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluations.jsonl").read_text().splitlines()[0])


@pytest.mark.slow
def test_a_second_run_goes_on_where_the_first_one_ended(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first evaluation is the first run's last one, its base is that policy, and it resumes,
    exports and evaluates."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    model = {"name": "stable_diffusion", "path": str(folders["sd"])}
    assert (
        main(
            [
                "train",
                str(run_file(tmp_path, "a", {**model, "lora_rank": 2})),
                "--local",
                "--out",
                str(first),
            ]
        )
        == 0
    )
    policy = {**model, "adapter": str(first / "policy")}
    file = run_file(tmp_path, "b", policy)
    assert main(["train", str(file), "--local", "--out", str(second)]) == 0

    # the last policy of the first run, bit for bit: evaluation, first latents, and the distance
    # from it is 0
    ended = json.loads((first / "evaluation.json").read_text())["aligned"]
    assert {
        k: v for k, v in began(second).items() if k.startswith(("reward/", "diversity"))
    } == ended
    assert began(second)["kl/per_step_gaussian"] == 0.0
    assert (
        metrics(second)[0]["kl/per_step_gaussian"] > 0.0
    )  # of two updates, from the adapter and not from the bare model
    whole = json.loads((second / "evaluation.json").read_text())
    assert whole["base"] == ended
    last, start = find_model(str(first)).load("cpu"), load_run(file).policy.load("cpu")
    (unit,) = make_units(1, plan=Plan(steps=3))
    for one, other in zip(
        rollout(last, unit, 0)[0].latents_BK1, rollout(start, unit, 0)[0].latents_BK1, strict=True
    ):
        assert (one == other).all()

    # stopped after one round and resumed: the same weights
    assert main(["train", str(file), "rounds=1", "--local", "--out", str(third)]) == 0
    assert main(["train", "--resume", str(third), "rounds=2", "--local"]) == 0
    weights = [load_file(folder / "policy" / lora.FILE) for folder in (second, third)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())

    # the base of an evaluation is the policy as the run began
    capsys.readouterr()
    out = tmp_path / "evaluation"
    assert main(["evaluate", str(second), "--out", str(out)]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    assert found["base"] == whole["base"]
    assert found["aligned"] == whole["aligned"]

    # the merged pipeline holds both: where it began, and what it learnt
    assert main(["export", str(second), str(tmp_path / "merged"), "--merged"]) == 0
    merged = find_model(str(tmp_path / "merged")).load("cpu")
    trained_policy = find_model(str(second)).load("cpu")
    torch.testing.assert_close(
        prediction_of(merged), prediction_of(trained_policy), rtol=0, atol=1e-5
    )


@torch.no_grad()
def prediction_of(policy: Policy) -> torch.Tensor:
    x = torch.randn(2, *policy.latent_shape(Plan()), generator=torch.Generator().manual_seed(1))
    condition = policy.encode(PROMPTS)
    return policy.family.predict(x, T, condition.caption)


def test_evaluate_takes_an_adapter_beside_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = trained(build("policies", {"name": "tiny", "lora_rank": 2}), tmp_path / "adapter")
    told = ["rewards=[{name: jpeg}]", "evaluate.prompts=2", "plan.steps=2"]
    out = tmp_path / "out"
    given = [
        "evaluate",
        "tiny",
        f"policy.adapter={tmp_path / 'adapter'}",
        *told,
        "--against",
        "tiny",
        "--out",
        str(out),
    ]
    assert main(given) == 0
    found = json.loads((out / "evaluation.json").read_text())
    assert found["aligned"] != found["base"]
    assert policy.reference == {}


# --- what is refused -----------------------------------------------------------------------------


def spoilt(file: Path, kind: str) -> Path:
    """Makes one thing wrong in an adapter's file."""
    tensors = load_file(file)
    first = next(n for n in tensors if "lora" in n)
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-40])
        return file
    if kind == "a tensor more":
        tensors["unet.nowhere.to_q.lora.down.weight"] = torch.zeros(2, 4)
    elif kind == "a tensor less":
        del tensors[first]
    elif kind == "NaN":
        tensors[first].view(-1)[0] = torch.nan
    elif kind == "text encoder":
        tensors["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = (
            torch.zeros(2, 16)
        )
        tensors["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight"] = (
            torch.zeros(16, 2)
        )
    elif kind == "wider":
        tensors = {
            n: torch.cat([t, t], dim=-1) if t.shape[0] == 2 else t for n, t in tensors.items()
        }
    elif kind == "no adapter":
        tensors = {"unet.conv_in.weight": torch.zeros(2, 2)}
    save_file(tensors, file)
    return file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "is damaged, or no adapter of this model"),
        ("a tensor more", "64 of its 65 tensors fit there; is it an adapter of this model"),
        ("a tensor less", "tensors fit there; is it an adapter of this model"),
        ("NaN", "must be finite, and some are not"),
        ("text encoder", "LoRA matrices of the unet alone, and 64 of its 66 tensors fit there"),
        ("wider", "is damaged, or no adapter of this model"),
        ("no adapter", "no adapter of this model"),
    ],
)
def test_a_file_that_does_not_fit_is_one_message(
    folders: dict[str, Path], saved: Any, tmp_path: Path, kind: str, message: str
) -> None:
    shutil.copy(saved("sd", lora_rank=2)[1] / lora.FILE, tmp_path)
    file = spoilt(tmp_path / lora.FILE, kind)
    with pytest.raises(
        UserError, match=r"^policy\.adapter: .*pytorch_lora_weights\.safetensors"
    ) as refusal:
        StableDiffusion(path=str(folders["sd"]), adapter=str(tmp_path)).load("cpu")
    assert message in str(refusal.value)
    assert str(file) in str(refusal.value)


def test_an_adapter_of_another_family_is_refused(folders: dict[str, Path], saved: Any) -> None:
    _, adapter = saved("sd3", lora_rank=2)
    with pytest.raises(
        UserError,
        match=r"^policy\.adapter: .* must hold LoRA matrices of the unet alone, and 0 of its",
    ):
        StableDiffusion(path=str(folders["sd"]), adapter=str(adapter)).load("cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora_rank": 4},
            r"policy\.lora_rank must be 0 \(the adapter's own\) or 2, that of .*safetensors, got 4",
        ),
        (
            {"lora_alpha": 9.0},
            (
                r"policy\.lora_alpha must be 0 \(the adapter's own\) or 3, that of .*safetensors,"
                r" got 9"
            ),
        ),
        ({"lora_rank": 2, "lora_alpha": 3.0}, ""),
    ],
)
def test_rank_and_alpha_are_the_files(
    folders: dict[str, Path], saved: Any, settings: dict[str, float], message: str
) -> None:
    path = str(folders["sd"])
    _, adapter = saved("sd", lora_rank=2, lora_alpha=3.0)
    recipe = StableDiffusion(path=path, adapter=str(adapter), **settings)  # type: ignore[arg-type]
    if not message:
        recipe.load("cpu")
        return
    with pytest.raises(UserError, match=message):
        recipe.load("cpu")


def test_what_names_an_adapter_where_a_model_is_wanted_says_so(
    folders: dict[str, Path], saved: Any, tmp_path: Path
) -> None:
    _, adapter = saved("sd", lora_rank=2)
    for name in (adapter, adapter / lora.FILE):
        with pytest.raises(
            UserError,
            match=(
                r"policy\.path must name a model, .*, an adapter; name the model .* as"
                r" policy\.adapter="
            ),
        ):
            StableDiffusion(path=str(name)).load("cpu")
        with pytest.raises(
            UserError, match=r"MODEL must name a model, .*, an adapter; name .* as policy\.adapter="
        ):
            find_model(str(name))
    with pytest.raises(
        UserError,
        match=r"policy\.adapter must be a folder with pytorch_lora_weights\.safetensors, or a",
    ):
        StableDiffusion(path=str(folders["sd"]), adapter=str(tmp_path / "nothing")).load("cpu")
    with pytest.raises(
        UserError, match=r"policy\.adapter must be empty for points, which takes none"
    ):
        build("policies", {"name": "points", "adapter": str(tmp_path)}).load("cpu")  # type: ignore[attr-defined]


def test_runs_without_an_adapter_are_the_runs_that_they_were() -> None:
    """A checkpoint that is older than the setting is resumed."""
    from rlalign.config import identity_of
    from rlalign.config.files import resolved
    from rlalign.learning import checkpoint

    run = load_run(CONFIGS / "quickstart.yaml")
    before = resolved(run)
    for name in ("adapter", "negative_prompt", "embeddings"):
        assert before["policy"].pop(name) == ""
    assert before["policy"].pop("decode_rows") == 0
    for name in ("vae_tiling", "compile", "channels_last"):
        assert before["policy"].pop(name) is False
    optimizer = before["learner"].pop("optimizer")
    assert optimizer.pop("name") == "adamw"
    before["learner"] |= optimizer
    assert before["learner"].pop("warmup") == 0
    assert before["learner"].pop("shard") == "none"
    assert (before["plan"].pop("window_place"), before["plan"].pop("min_std")) == (
        "first_half",
        0.0,
    )
    assert before.pop("combine") == "sum"
    assert before.pop("refit") is None
    assert before["evaluate"].pop("by") == ""
    assert before["guard"].pop("limits") == []
    before["guard"] |= {"held_out": "", "drop": 0.05}
    for name, was in (("at_least", None), ("frames", None), ("units_per_call", 1)):
        assert before["rewards"][0].pop(name) == was
    assert identity_of(run) == checkpoint.identity(before) == "c4c621d302faa380"
    other = load_run(CONFIGS / "quickstart.yaml", ["policy.adapter=somewhere"])
    assert identity_of(other) != identity_of(run)
