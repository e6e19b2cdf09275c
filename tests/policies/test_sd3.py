"""The Stable Diffusion 3 policy against diffusers' own pipeline, on a pipeline of random weights
(seed 0)."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlalign.algorithms._advantages import PromptStatistics
from rlalign.algorithms.ddpo import DDPO
from rlalign.cli.export import export, find_model
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import UserError
from rlalign.diffusion.rollout import moves, replay_log_prob, rollout
from rlalign.networks import lora
from rlalign.policies.base import Policy
from rlalign.policies.sd3 import StableDiffusion3, StableDiffusion3Family
from tests.toy import collect, make_units, save_flow_pipeline

PROMPTS = ("a red circle", "blue", "a green square")
X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([999.0, 500.0, 3.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flow_pipeline(tmp_path_factory.mktemp("pipeline") / "small")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Policy, Any]]:
    """Settings of a pipeline, and how many rows of T5 (the recipe's default where they are not
    given) -> the policy and plain diffusers, each loaded once."""

    @functools.cache
    def load(shift: float, t5: bool, **ours: int) -> tuple[Policy, Any]:
        folder = save_flow_pipeline(tmp_path_factory.mktemp("pipeline") / "of", shift=shift, t5=t5)
        policy = StableDiffusion3(path=str(folder), **ours).load("cpu")
        return policy, diffusers_pipeline(folder)

    return load


@pytest.fixture
def policy(folder: Path) -> Policy:
    return StableDiffusion3(path=str(folder)).load("cpu")


def unit_of(plan: Plan) -> Unit:
    return Unit(
        key=UnitKey("train", 1, 0),
        prompts=PROMPTS,
        prompt_ids=(0, 1, 2),
        sample_ids=(0, 0, 0),
        seed=0,
        plan=plan,
    )


def diffusers_pipeline(folder: Path) -> Any:
    """Plain diffusers, which wants the parts that a folder lacks (T5) named."""
    from diffusers import DiffusionPipeline

    index = json.loads((folder / "model_index.json").read_text())
    pipeline = DiffusionPipeline.from_pretrained(
        folder, **{n: None for n, kind in index.items() if kind == [None] * 2}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def predicted(policy: Policy) -> torch.Tensor:
    condition = policy.encode(PROMPTS)
    with torch.no_grad():
        return policy.family.predict(X, T, condition.caption)


@pytest.mark.parametrize("guidance", [0.0, pytest.param(0.5, marks=pytest.mark.promise), 1.0, 3.0])
@pytest.mark.parametrize(
    ("shift", "t5", "told", "ours"),
    [
        (1.0, False, {}, {}),
        (3.0, False, {}, {}),
        (3.0, True, {}, {}),
        (3.0, False, {"max_sequence_length": 0}, {"t5_tokens": 0}),
        (3.0, True, {"max_sequence_length": 9}, {"t5_tokens": 9}),
    ],
)
def test_rollout_equals_diffusers(
    both: Callable[..., tuple[Policy, Any]],
    guidance: float,
    shift: float,
    t5: bool,
    told: dict[str, int],
    ours: dict[str, int],
) -> None:
    """Our default is that of a call which is told prompts, steps, guidance and latents alone;
    ``t5_tokens`` is its ``max_sequence_length``. Euler's ODE, ten steps: final latents within 1e-4,
    pictures within one grey level."""
    policy, pipeline = both(shift, t5, **ours)
    trajectory, media = rollout(
        policy, unit_of(Plan(steps=10, rule="flow_ode", eta=0.0, guidance=guidance)), 0
    )
    assert not trajectory.stochastic_K.any()
    settings = {"num_inference_steps": 10, "guidance_scale": guidance, "output_type": "np", **told}
    start, seen = torch.from_numpy(trajectory.latents_BK1[:, 0]), {}
    pictures = pipeline(
        list(PROMPTS),
        latents=start.clone(),
        callback_on_step_end=lambda _, k, t, state: seen.update(state) or state,
        **settings,
    ).images
    assert np.abs(trajectory.latents_BK1[:, -1] - seen["latents"].numpy()).max() < 1e-4
    assert media.shape == (3, 1, 3, 16, 16)
    grey = pictures.transpose(0, 3, 1, 2) * 255.0
    assert np.abs(media[:, 0].astype(np.float64) - grey).max() < 0.5 + 1e-2


@pytest.mark.parametrize(
    ("t5", "t5_tokens", "tokens"),
    [(False, 256, 272), (False, None, 16), (False, 9, 25), (True, None, 272)],
)
def test_encode_is_the_pipelines(
    tmp_path: Path, t5: bool, t5_tokens: int | None, tokens: int
) -> None:
    """Embeddings and pooled vectors of prompts and of the empty one, with T5 and without, within
    1e-5.

    null, which the config.yaml of earlier runs may say, is no rows where there is no T5.
    """
    folder = save_flow_pipeline(tmp_path / "pipeline", t5=t5)
    policy = StableDiffusion3(path=str(folder), t5_tokens=t5_tokens).load("cpu")
    condition = policy.encode(PROMPTS)
    with torch.no_grad():
        wanted = diffusers_pipeline(folder).encode_prompt(
            list(PROMPTS), None, None, max_sequence_length=policy.family.t5_tokens
        )
    found = (
        condition.caption["embeds_BLD"],
        condition.empty["embeds_BLD"],
        condition.caption["pooled_BD"],
        condition.empty["pooled_BD"],
    )
    assert condition.caption["embeds_BLD"].shape == (3, tokens, 40)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert (condition.caption["embeds_BLD"][:, 16:] != 0).any() == t5
    twice = condition.rows(2)
    assert torch.equal(twice.caption["pooled_BD"], torch.cat([condition.caption["pooled_BD"]] * 2))


def test_a_negative_prompt_is_the_calls(folder: Path) -> None:
    """``negative_prompt`` of the recipe against that of a pipeline's call: latents within 1e-4."""
    policy = StableDiffusion3(path=str(folder), negative_prompt="a blue dog").load("cpu")
    plan = Plan(steps=5, rule="flow_ode", eta=0.0, guidance=3.0)
    trajectory, _ = rollout(policy, unit_of(plan), 0)
    start = torch.from_numpy(trajectory.latents_BK1[:, 0].copy())
    told = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "latent"}
    pipeline = diffusers_pipeline(folder)
    negative, none = (
        pipeline(list(PROMPTS), latents=start.clone(), negative_prompt=text, **told).images
        for text in (["a blue dog"] * 3, None)
    )
    final = torch.from_numpy(trajectory.latents_BK1[:, -1].copy())
    assert (final - negative).abs().max() < 1e-4
    assert (none - negative).abs().max() > 1e-3


def test_a_prompts_rows_do_not_depend_on_its_neighbours(folder: Path) -> None:
    """Bit for bit, in policies that have seen other prompts in other orders."""
    together = StableDiffusion3(path=str(folder)).load("cpu").encode(PROMPTS)
    other = StableDiffusion3(path=str(folder)).load("cpu")
    for row, prompt in reversed(list(enumerate(PROMPTS))):
        alone = other.encode([prompt])
        assert torch.equal(alone.caption["embeds_BLD"][0], together.caption["embeds_BLD"][row])
        assert torch.equal(alone.caption["pooled_BD"][0], together.caption["pooled_BD"][row])
    assert not torch.equal(together.caption["pooled_BD"][0], together.caption["pooled_BD"][1])


def test_remembered_prompts_are_bounded(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompt lists do not fill the memory, and forgetting changes no bit."""
    first = policy.encode(PROMPTS)
    monkeypatch.setattr(
        "rlalign.policies._words.REMEMBERED_BYTES", 2 * first.caption["embeds_BLD"][0].nbytes
    )
    policy.encode(["something else", "and more"])
    assert torch.equal(policy.encode(PROMPTS).caption["embeds_BLD"], first.caption["embeds_BLD"])
    assert len(policy.family.memory.rows) <= 2


def test_guidance_mixes_the_empty_caption_in(policy: Policy) -> None:
    """At three levels, one a sample: (clean, noise) from the guided velocity of two passes of
    diffusers' transformer (1e-5)."""
    levels, w = T.double() / 1000.0, 3.0
    condition = policy.encode(PROMPTS)
    with torch.no_grad():
        clean, noise = policy.denoise(X, levels, condition, w)
        halves = [
            policy.network(X, embeds, pooled, T).sample
            for embeds, pooled in (
                condition.empty.tensors.values(),
                condition.caption.tensors.values(),
            )
        ]
    velocity = halves[0] + w * (halves[1] - halves[0])
    s = levels.float()[:, None, None, None]
    torch.testing.assert_close(clean, X - s * velocity, rtol=0, atol=1e-5)
    torch.testing.assert_close(noise, X + (1 - s) * velocity, rtol=0, atol=1e-5)
    torch.testing.assert_close(noise - clean, velocity, rtol=0, atol=1e-5)
    assert (halves[1] - halves[0]).abs().max() > 1e-4


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("window", [0, 2])
def test_replay_gives_the_rollouts_log_probs_bit_for_bit(
    policy: Policy, guidance: float, window: int
) -> None:
    """Flow-SDE on Stable Diffusion 3's grid, also its sharp last step (std 0.0063 with shift 3):
    finite, and equal."""
    unit = unit_of(Plan(steps=10, rule="flow_sde", eta=0.7, guidance=guidance, window=window))
    trajectory, _ = rollout(policy, unit, 0)
    steps = np.flatnonzero(trajectory.stochastic_K).tolist()
    assert len(steps) == (window or 10)
    assert np.isfinite(trajectory.log_prob_BK).all()
    latents, condition = torch.from_numpy(trajectory.latents_BK1), policy.encode(PROMPTS)
    stds = []
    for k in steps:
        with torch.no_grad():
            place = trajectory.kept.index(k)
            move = moves(latents, [place])
            log_prob_BS, found = replay_log_prob(policy, unit, *move, [k], condition)
        assert np.array_equal(log_prob_BS[:, 0].numpy(), trajectory.log_prob_BK[:, k])
        stds.append(float(found.gaussian.std))
    if not window:
        assert stds[-1] == pytest.approx(0.0063, abs=1e-4)
        assert stds[-2] > 10 * stds[-1]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_ratio_is_exactly_one_before_the_first_update(folder: Path, lora_rank: int) -> None:
    """float32, ten Flow-SDE steps, one step a pass: max |ratio - 1| is 0, not small."""
    policy = StableDiffusion3(path=str(folder), lora_rank=lora_rank).load("cpu")
    algorithm = DDPO(advantage="global")
    units = make_units(2, per_unit=3, plan=Plan(steps=10, rule="flow_sde", eta=0.7, guidance=3.0))
    batch = algorithm.make_batch(collect(policy, units), PromptStatistics())
    for one in batch.passes(1):
        assert algorithm.loss(one, policy).maxima["ratio/max_deviation"].item() == 0.0


def test_pictures_come_back_from_latents(policy: Policy) -> None:
    """decode is the VAE's decoder, encode_media the mean of its encoder, with the checkpoint's
    scale and shift."""
    scale, shift = policy.family.vae.config.scaling_factor, policy.family.vae.config.shift_factor
    assert (scale, shift) == (1.5, 0.06)
    with torch.no_grad():
        media = policy.decode(X)
        wanted = policy.family.vae.decode(X / scale + shift).sample
        assert torch.equal(media[:, 0], (wanted / 2 + 0.5).clamp(0, 1))
        mean = policy.family.vae.encode(media[:, 0] * 2 - 1).latent_dist.mean
        assert torch.equal(policy.encode_media(media), (mean - shift) * scale)
        found = policy.family.vae.encode(media[:, 0] * 2 - 1).latent_dist
        assert torch.equal(policy.posterior(media)[0], (mean - shift) * scale)
        assert torch.equal(policy.posterior(media)[1], found.std * scale)


def test_latent_shape_follows_the_plan(policy: Policy) -> None:
    assert policy.latent_shape(Plan()) == (4, 8, 8)
    assert policy.latent_shape(Plan(height=24, width=20)) == (4, 12, 10)
    with pytest.raises(
        UserError, match="plan.height and plan.width must be multiples of 4, got 18 x 16"
    ):
        policy.latent_shape(Plan(height=18))


def test_only_the_transformer_is_trained(policy: Policy) -> None:
    assert set(policy.trainable()) == {n for n, _ in policy.network.named_parameters()}
    pipeline = policy.family.pipeline
    frozen = [policy.family.vae, pipeline.text_encoder, pipeline.text_encoder_2]
    assert not any(p.requires_grad for m in frozen for p in m.parameters())
    assert not any(m.training for m in [*frozen, policy.network])


def test_saved_folder_is_plain_diffusers(policy: Policy, tmp_path: Path) -> None:
    """All weights trained: a pipeline folder that diffusers loads with the same prediction, bit for
    bit, and no pickle.

    ``rlalign evaluate`` and ``export`` read the folder as this family.
    """
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    assert policy.merged() is policy
    policy.save(tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".txt", ".jinja"}
    condition = policy.encode(PROMPTS)
    with torch.no_grad():
        found = (
            diffusers_pipeline(tmp_path)
            .transformer(X, condition.caption["embeds_BLD"], condition.caption["pooled_BD"], T)
            .sample
        )
    assert torch.equal(found, predicted(policy))
    again = find_model(str(tmp_path)).load("cpu")
    assert isinstance(again.family, StableDiffusion3Family)
    assert torch.equal(predicted(again), predicted(policy))


def test_export_says_how_plain_diffusers_loads_the_folder(
    folder: Path, tmp_path: Path, capsys
) -> None:
    """Parts that the pipeline lacks must be named to diffusers; the printed call is one that
    works."""
    import diffusers

    export(str(folder), tmp_path / "out")
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.endswith("/out', text_encoder_3=None, tokenizer_3=None) loads it")
    call = printed.split(": ", 1)[1].removesuffix(" loads it")
    assert isinstance(eval(call, vars(diffusers).copy()), diffusers.StableDiffusion3Pipeline)


def test_plain_diffusers_loads_the_adapter_and_the_merged_pipeline(
    folder: Path, tmp_path: Path
) -> None:
    """Rank 4, alpha 10: every target is adapted; diffusers' pictures with the file, and of the
    merged folder, within 1e-4."""
    policy = StableDiffusion3(path=str(folder), lora_rank=4, lora_alpha=10.0).load("cpu")
    plain = predicted(policy)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapted = {n.split(".lora_")[0] for n in policy.trainable()}
    assert all(
        any(n.endswith(f"attn.{target}") for n in adapted) for target in policy.family.lora_targets
    )
    changed = predicted(policy)
    assert (changed - plain).abs().max() > 1e-3
    with policy.as_reference():
        assert torch.equal(predicted(policy), plain)

    policy.save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert all(n.startswith("transformer.") for n in load_file(file))
    pipeline = diffusers_pipeline(folder)
    pipeline.load_lora_weights(file.parent)
    condition = policy.encode(PROMPTS)
    with torch.no_grad():
        found = pipeline.transformer(
            X, condition.caption["embeds_BLD"], condition.caption["pooled_BD"], T
        ).sample
    torch.testing.assert_close(found, changed, rtol=0, atol=1e-4)

    merged = policy.merged()
    assert not lora.is_attached(merged.network) and lora.is_attached(policy.network)
    merged.save(tmp_path / "whole")
    with torch.no_grad():
        whole = diffusers_pipeline(tmp_path / "whole")
        found = whole.transformer(
            X, condition.caption["embeds_BLD"], condition.caption["pooled_BD"], T
        ).sample
    torch.testing.assert_close(found, changed, rtol=0, atol=1e-4)
    assert torch.equal(predicted(policy), changed)  # the adapters' owner is as it was


@pytest.mark.parametrize(
    "setting",
    [
        {"use_karras_sigmas": True},
        {"stochastic_sampling": True},
    ],
    ids=str,
)
def test_a_grid_of_another_kind_is_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    folder = save_flow_pipeline(tmp_path / "pipeline", **setting)
    with pytest.raises(
        UserError, match=rf"policy\.path: .* {next(iter(setting))} must be off .*, got"
    ):
        StableDiffusion3(path=str(folder)).load("cpu")


@pytest.mark.parametrize(
    "setting", [{"use_dynamic_shifting": True, "max_shift": 2.0}, {"shift_terminal": 0.1}], ids=str
)
@pytest.mark.parametrize("size", [(0, 0), (16, 24)])
def test_a_grid_that_follows_the_picture_is_diffusers(
    tmp_path: Path, setting: dict[str, Any], size: tuple[int, int]
) -> None:
    """A shift by the number of tokens, and a grid that ends above 0: latents of Euler's ODE within
    1e-4."""
    folder = save_flow_pipeline(tmp_path / "pipeline", shift=3.0, **setting)
    policy = StableDiffusion3(path=str(folder)).load("cpu")
    height, width = size
    plan = Plan(steps=6, rule="flow_ode", eta=0.0, height=height, width=width)
    trajectory, _ = rollout(policy, unit_of(plan), 0)
    found = diffusers_pipeline(folder)(
        list(PROMPTS),
        latents=torch.from_numpy(trajectory.latents_BK1[:, 0].copy()),
        output_type="latent",
        num_inference_steps=6,
        guidance_scale=1.0,
        height=height or None,
        width=width or None,
    ).images
    assert np.abs(trajectory.latents_BK1[:, -1] - found.numpy()).max() < 1e-4


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no weights": lambda f: (f / "transformer" / "diffusion_pytorch_model.safetensors").unlink(),
    "no index": lambda f: (f / "model_index.json").unlink(),
    "an index that is a list": lambda f: (f / "model_index.json").write_text("[]"),
    "no text encoder": lambda f: shutil.rmtree(f / "text_encoder"),
    "no second text encoder": lambda f: shutil.rmtree(f / "text_encoder_2"),
    "no second vocabulary": lambda f: (f / "tokenizer_2" / "tokenizer.json").unlink(),
    "another width": lambda f: (f / "transformer" / "config.json").write_text(
        json.dumps({**json.loads((f / "transformer" / "config.json").read_text()), "num_layers": 3})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_a_users_error(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(UserError, match=r"policy\.path.*copy"):
        StableDiffusion3(path=str(copy)).load("cpu")


def test_replicas_read_side_by_side(folder: Path) -> None:
    """Eight threads, forty prompts of different lengths: what one thread reads, bit for bit."""
    from concurrent.futures import ThreadPoolExecutor

    prompts = ["a " * (n % 9 + 1) + "red" * (n % 5 + 1) for n in range(40)]
    alone = StableDiffusion3(path=str(folder)).load("cpu").encode(prompts)
    first = StableDiffusion3(path=str(folder)).load("cpu")
    lanes = [first, *(first.replica() for _ in range(7))]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda n: lanes[n % 8].encode([prompts[n]]), range(40)))
    for row, one in enumerate(read):
        assert torch.equal(one.caption["embeds_BLD"][0], alone.caption["embeds_BLD"][row])
