"""The published recipes in configs/published/: what rlalign makes of each is what was published.

Nothing is loaded. The numbers are those of the named repositories' own configuration files; where a
run file has another one, ``OURS`` says so here and a comment says so there.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rlalign import load_policy
from rlalign.algorithms.base import Given
from rlalign.config import Run, load_run
from rlalign.config.derive import summarise_run
from rlalign.core.records import Plan
from rlalign.data.prompts.file import FilePrompts, read_prompts
from rlalign.data.prompts.list import ListedPrompts
from rlalign.diffusion.noise import noise_masks
from rlalign.diffusion.paths import RectifiedFlow
from rlalign.diffusion.steps import LOG_2PI, Gaussian, Move, flow_cps
from rlalign.policies.base import Policy

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "published"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


class Recipe(NamedTuple):
    """What a configuration file says, or what follows from it."""

    samples: int
    """Samples (or pairs) a round, on all cards together."""
    updates: int | None
    """Of the optimiser, a round; None was not at hand, here and in the batch."""
    batch: int | None
    """Samples (or pairs) an update: batch x accumulation x cards."""
    lr: float
    steps: int
    guidance: float
    """Of a second pass; 1 is none."""
    rank: int
    """Of the LoRA; 0 trains all weights."""
    clip: float | None
    """Of the ratio; None where there is no ratio."""
    kl: float | None
    """Weight of the distance to the reference; None where there is none to set."""


PUBLISHED = {
    # kvablack/ddpo-pytorch, config/dgx.py: 8 cards x 8 x 4; training 4 x 2 (aesthetic: 4 x 4) x 8
    "ddpo_sd14_compressibility": Recipe(256, 4, 64, 3e-4, 50, 5.0, 4, 1e-4, None),
    "ddpo_sd14_incompressibility": Recipe(256, 4, 64, 3e-4, 50, 5.0, 4, 1e-4, None),
    "ddpo_sd14_aesthetic": Recipe(256, 2, 128, 3e-4, 50, 5.0, 4, 1e-4, None),
    # 6 cards x 8 x 6; training 4 x 6 x 6
    "ddpo_sd14_alignment": Recipe(288, 2, 144, 3e-4, 50, 5.0, 4, 1e-4, None),
    # google-research dpok/README.md; the batch is 4 x 12 transitions, not samples
    "dpok_sd15_single": Recipe(10, 5, 48, 1e-5, 50, 7.5, 4, 1e-4, 0.01),
    # DiffusionDPO launchers: 1 x 128 x 16 pairs; 1e-8 times that with --scale_lr; beta is tested
    # apart. The steps and the guidance are those of evaluations, which nobody published
    "diffusion_dpo_sd15": Recipe(2048, 1, 2048, 1e-8 * 2048, 50, 7.5, 0, None, None),
    "diffusion_dpo_sdxl": Recipe(2048, 1, 2048, 1e-8 * 2048, 50, 5.0, 0, None, None),
    # diffusers' research project: 16 x 2 and 8 x 2 pairs, one card
    "diffusion_dpo_sd15_lora": Recipe(16 * 2, 1, 32, 1e-5, 50, 7.5, 8, None, None),
    "diffusion_dpo_sdxl_lora": Recipe(8 * 2, 1, 16, 1e-5, 50, 5.0, 8, None, None),
    # yifan123/flow_grpo, config/grpo.py: two updates an epoch; ranks: scripts/train_*.py
    "flow_grpo_sd35_ocr": Recipe(24 * 48, 2, 576, 3e-4, 10, 4.5, 32, 1e-4, 0.04),
    "flow_grpo_sd35_ocr_4gpu": Recipe(16 * 16, 2, 128, 3e-4, 10, 4.5, 32, 1e-4, 0.04),
    "flow_grpo_sd35_ocr_1gpu": Recipe(8 * 8, 2, 32, 3e-4, 10, 4.5, 32, 1e-4, 0.04),
    "flow_grpo_sd35_geneval": Recipe(24 * 48, 2, 576, 3e-4, 10, 4.5, 32, 1e-4, 0.04),
    "flow_grpo_sd35_pickscore": Recipe(24 * 48, 2, 576, 3e-4, 10, 4.5, 32, 1e-4, 0.01),
    "flow_grpo_sd35_geneval_fast": Recipe(24 * 48, 2, 576, 3e-4, 10, 1.0, 32, 1e-5, 0.0),
    "flow_grpo_sd35_pickscore_fast": Recipe(18 * 64, 2, 576, 3e-4, 10, 1.0, 32, 1e-5, 0.0),
    "grpo_guard_sd35_ocr": Recipe(24 * 48, 2, 576, 1e-4, 10, 4.5, 32, 2e-6, 0.0),
    "flow_grpo_flux_pickscore_8gpu": Recipe(24 * 48, 2, 576, 3e-4, 6, 1.0, 64, 1e-4, 0.0),
    "flow_grpo_flux_geneval_fast": Recipe(24 * 48, 2, 576, 3e-4, 6, 1.0, 64, 1e-5, 0.0),
    "flow_grpo_flux_pickscore_fast": Recipe(24 * 48, 2, 576, 3e-4, 6, 1.0, 64, 1e-5, 0.0),
    "flow_grpo_qwen_image": Recipe(16 * 32, 2, 256, 3e-4, 10, 4.0, 64, 1e-4, 0.0),
    # NVlabs/DiffusionNFT, config/nft.py
    "nft_sd35_geneval": Recipe(24 * 48, 1, 1152, 3e-4, 10, 1.0, 32, None, 1e-4),
    "nft_sd35_pickscore": Recipe(24 * 48, 1, 1152, 3e-4, 10, 1.0, 32, None, 1e-4),
    "nft_sd35_hpsv2": Recipe(24 * 48, 1, 1152, 3e-4, 10, 1.0, 32, None, 1e-4),
    "nft_sd35_ocr": Recipe(24 * 48, 2, 576, 3e-4, 10, 1.0, 32, None, 1e-4),
    "nft_sd35_multi_reward": Recipe(24 * 48, 1, 1152, 3e-4, 25, 1.0, 32, None, 1e-4),
    # DanceGRPO and MixGRPO, scripts/finetune: cards x prompts a card x 12
    "dance_grpo_flux": Recipe(16 * 12, 3, 64, 1e-5, 16, 1.0, 0, 1e-4, 0.0),
    "dance_grpo_flux_8gpu": Recipe(8 * 2 * 12, 2, 96, 1e-5, 16, 1.0, 0, 1e-4, 0.0),
    "dance_grpo_flux_lora": Recipe(8 * 2 * 12, 2, 96, 3e-4, 12, 1.0, 128, 1e-4, 0.0),
    "mixgrpo_flux": Recipe(32 * 12, 4, 96, 1e-5, 25, 1.0, 0, 1e-4, 0.0),
    # clips: flow_grpo's config/grpo.py:general_ocr_wan2_1, 1 card x 8 x 2 batches
    "flow_grpo_wan21_ocr": Recipe(8 * 2, 2, 8, 1e-4, 20, 4.5, 32, 1e-3, 0.004),
    "unirl_wan21_videoalign": Recipe(24 * 32, None, None, 5e-5, 16, 5.0, 0, 1e-4, 0.0),
    "unirl_wan21_flash": Recipe(8 * 8, 2, 32, 1e-4, 20, 4.5, 64, 1e-3, 0.0),
    "genrl_wan21_longcat": Recipe(32 * 4, None, None, 1e-4, 16, 4.5, 128, 1e-3, 3e-4),
    "flow_factory_wan21": Recipe(16 * 48, 2, 384, 1e-4, 10, 5.0, 0, 1e-4, 0.0),
}
CLIPS = {
    "flow_grpo_wan21_ocr": (240, 416, 33, 4, 0.7, 0),
    "unirl_wan21_videoalign": (480, 480, 9, 24, 0.25, 0),
    "unirl_wan21_flash": (480, 832, 81, 8, 1.0, 1),
    "genrl_wan21_longcat": (480, 832, 81, 4, 1.0, 1),
    "flow_factory_wan21": (256, 256, 5, 16, 0.9, 1),
}
"""Recipe of clips -> height, width, frames, samples of a prompt, noise, steps with noise."""
OURS: dict[str, dict[str, Any]] = {
    # in samples: every transition of two
    "dpok_sd15_single": {"batch": 2},
    # another log-prob, see below
    "flow_grpo_sd35_geneval_fast": {"clip": 8.0e-6},
    "flow_grpo_sd35_pickscore_fast": {"clip": 8.0e-6},
    "flow_grpo_flux_geneval_fast": {"clip": 9.5e-6},
    "flow_grpo_flux_pickscore_fast": {"clip": 9.5e-6},
    # whole prompts, dealt to three updates
    "dance_grpo_flux": {"samples": 15 * 12, "batch": 60},
}
"""Recipe -> what the run file has instead."""
UNPUBLISHED = {"sdxl_ddpo_24gb", "sdxl_grpo_24gb", "sdxl_nft_24gb"}
OTHER_ALPHAS = {"genrl_wan21_longcat": 64.0}
"""Recipe -> its alpha, where that is not its rank's."""
ALPHAS = {32: 64.0, 64: 128.0, 128: 256.0, 8: 0.0, 4: 0.0, 0: 0.0}
"""Rank of a published LoRA -> its alpha; 0 is the rank."""


def recipe_of(run: Run) -> Recipe:
    """What rlalign makes of a run, from what ``rlalign check`` derives."""
    facts = summarise_run(run)
    pairs = run.preferences is not None
    counted = re.match(r"[\d,]+", facts["pairs per round" if pairs else "samples per round"])
    updated = re.match(r"([\d,]+)(?: of (\d+) samples each)?", facts["updates per round"])
    assert counted and updated
    samples = int(counted[0].replace(",", ""))
    updates = int(updated[1].replace(",", ""))
    return Recipe(
        samples=samples,
        updates=updates,
        batch=samples // updates if pairs else int(updated[2]),
        lr=run.learner.lr,
        steps=run.plan.steps,
        guidance=run.plan.guidance,
        rank=run.policy.lora_rank,
        clip=getattr(run.algorithm, "clip_range", None),
        kl=getattr(run.algorithm, "kl_weight", None),
    )


def comments(path: Path) -> str:
    """A file's comments as one line."""
    lines = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    return " ".join(lines)


def test_every_file_is_in_the_table() -> None:
    assert set(FILES) == set(PUBLISHED) | UNPUBLISHED
    assert set(OURS) <= set(PUBLISHED)


def test_the_page_has_every_file() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [*PUBLISHED, *sorted(UNPUBLISHED)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_comes_to_what_was_published(name: str) -> None:
    run = load_run(FILES[name])
    found = recipe_of(run)._asdict()
    wanted = {**PUBLISHED[name]._asdict(), **OURS.get(name, {})}
    for field, value in wanted.items():
        if value is None and field in ("updates", "batch"):
            continue
        exact = value if value is None else pytest.approx(value, rel=1e-9)
        assert found[field] == exact, field
    rank = run.policy.lora_rank
    assert run.policy.lora_alpha == OTHER_ALPHAS.get(name, ALPHAS[rank])
    assert run.runtime.max_staleness == 0


@pytest.mark.parametrize("name", CLIPS)
def test_what_a_recipe_of_clips_draws(name: str) -> None:
    """What was not at hand is said in the file to be ours."""
    run = load_run(FILES[name])
    plan = run.plan
    group = run.prompts.samples_per_prompt
    found = (plan.height, plan.width, plan.frames, group, plan.eta, plan.window)
    assert found == CLIPS[name]
    assert run.policy.name == "wan" and plan.frames % 4 == 1
    if PUBLISHED[name].updates is None:
        assert re.search(r"Updates a round are ours: their .* not at hand", comments(FILES[name]))


@pytest.mark.parametrize("name", OURS)
def test_a_difference_is_said_in_the_file(name: str) -> None:
    """With the published number."""
    said = comments(FILES[name])
    published = PUBLISHED[name]._asdict()
    for field, ours in OURS[name].items():
        assert ours != published[field]
        text = f"{published[field]:g}".replace("e-05", "e-5")
        assert re.search(rf"(?<![\d.]){re.escape(text)}(?![\d])", said), f"{field} {text}"


@pytest.mark.parametrize("name", FILES)
def test_a_file_names_its_source_and_nothing_is_wide(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    (source,) = re.findall(r"^# Source: (.+)$", text, re.MULTILINE)
    assert name in UNPUBLISHED or re.match(r"[\w.-]+/[\w.-]+, \S+", source)
    assert [line for line in text.splitlines() if line.startswith("#") and len(line) > 100] == []


@pytest.mark.parametrize("name", sorted(UNPUBLISHED))
def test_what_one_card_of_24_gb_is_given(name: str) -> None:
    """One sample at a time, an adapter, bfloat16, activations computed again; both roles on it."""
    run = load_run(FILES[name])
    assert run.policy.name == "sdxl"
    assert (run.samples_per_unit, run.learner.steps_per_pass, run.learner.shards) == (1, 1, 1)
    assert run.policy.lora_rank > 0
    assert (run.policy.precision, run.policy.gradient_checkpointing) == ("bfloat16", True)
    assert run.runtime.rollout.gpus + run.runtime.learner.gpus <= 1


@pytest.mark.parametrize("name", ["sdxl_grpo_24gb", "sdxl_nft_24gb"])
def test_groups_of_four_without_a_batch_of_four(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt comes four times a round, in units of one."""
    monkeypatch.chdir(ROOT)
    run = load_run(FILES[name])
    units = run.prompts.units(run.seed, 1, run.plan)
    drawn = [unit.prompt_ids[0] for unit in units]
    assert {len(unit.prompts) for unit in units} == {1}
    assert {drawn.count(number) for number in drawn} == {4}
    assert len({(u.prompt_ids, u.sample_ids) for u in units}) == len(units)


@pytest.fixture(scope="module")
def policies() -> dict[str, Policy]:
    """The embedded models, in the place of those that a recipe names: noise, and a flow."""
    return {name: load_policy(name) for name in ("tiny", "tiny_flow")}


@pytest.mark.parametrize("name", FILES)
def test_its_algorithm_takes_the_plan_and_the_groups(
    name: str, policies: dict[str, Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run is refused for before its first round; prompts that are not shipped are
    replaced by as many others."""
    monkeypatch.chdir(ROOT)
    run = load_run(FILES[name])
    prompts = run.prompts
    if isinstance(prompts, FilePrompts) and not Path(prompts.path).is_file():
        dealt = prompts.model_dump(include={"per_round", "samples_per_prompt", "per_unit"})
        prompts = ListedPrompts(prompts=tuple(f"a {n}" for n in range(100)), **dealt)
    plan = run.plan.model_copy(update={"height": 0, "width": 0, "frames": 1})
    given = run.preferences
    run.algorithm.check(
        Given(
            policy=policies["tiny_flow" if plan.rule.startswith("flow") else "tiny"],
            plan=plan,
            units=() if given else prompts.units(run.seed, 1, plan),
            ties=given.ties if given else "",
        )
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("diffusion_dpo_sd15", (5000.0, 0.2, 500, "adamw", 512, 2000)),
        ("diffusion_dpo_sdxl", (5000.0, 0.2, 200, "adafactor", 1024, 2000)),
        ("diffusion_dpo_sd15_lora", (2500.0, 0.0, 0, "adamw_8bit", 512, 10000)),
        ("diffusion_dpo_sdxl_lora", (5000.0, 0.0, 0, "adamw_8bit", 1024, 2000)),
    ],
)
def test_the_preference_recipes(name: str, wanted: tuple[Any, ...]) -> None:
    """Beta, share of empty captions, warm-up, optimiser, size of the pictures, updates."""
    run = load_run(FILES[name])
    algorithm = run.algorithm.model_dump()
    learner = run.learner
    optimizer = learner.optimizer.model_dump()
    assert run.preferences is not None
    found = (algorithm["beta"], algorithm["caption_dropout"], learner.warmup, optimizer.pop("name"))
    assert (*found, run.preferences.size, run.rounds) == wanted
    assert (algorithm["flip"], algorithm["posterior"]) == (True, "sample")
    assert (optimizer["weight_decay"], run.preferences.resize) == (1e-2, "crop")


def cps_factors(path: RectifiedFlow, plan: Plan) -> torch.Tensor:
    """(K,) 1 / (2 s^2) of each step: what rlalign's CPS log-prob has and Flow-GRPO's leaves out.

    Of rlalign's own Gaussians: log p is -d^2 / (2 s^2) - log s - log(2 pi) / 2 at a distance d = 1.
    """
    level = path.levels(plan.steps)
    found = []
    for now, after in pairwise(level[:-1]):
        x = torch.zeros(1, 4, dtype=torch.float64)
        gaussian: Gaussian = flow_cps(Move(x, x, x, path, now, after, plan.eta))
        constant = -gaussian.std.log() - 0.5 * LOG_2PI
        found.append((constant - gaussian.log_prob(gaussian.mean + 1.0)).item())
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("name", "path", "said"),
    [
        # Stable Diffusion 3.5's scheduler
        ("flow_grpo_sd35_geneval_fast", RectifiedFlow(shift=3.0), ["0.60", "1.11"]),
        # FLUX.1-dev's at 1,024 tokens: exp(0.5 + 0.65 (1024 - 256) / (4096 - 256)), levels to 1 / 6
        (
            "flow_grpo_flux_pickscore_fast",
            RectifiedFlow(shift=math.exp(0.63), last=1 / 6),
            ["0.68", "0.89", "1.30"],
        ),
    ],
)
def test_the_clip_range_of_another_log_prob(
    name: str, path: RectifiedFlow, said: list[str]
) -> None:
    """The published range times the mean, over the window's places, of what that log-prob lacks."""
    run = load_run(FILES[name])
    factor_K = cps_factors(path, run.plan)
    masks = torch.tensor(noise_masks(run.plan))[:, : len(factor_K)]
    mean = torch.stack([factor_K[mask].mean() for mask in masks]).mean().item()
    clip = PUBLISHED[name].clip
    assert clip is not None
    assert recipe_of(run).clip == pytest.approx(clip * mean, rel=0.03)
    used = factor_K[masks.any(0)]
    ends = [used.min(), used.max()] if len(said) == 2 else list(used)
    assert [f"{one:.2f}" for one in ends] == said
    assert all(one in comments(FILES[name]) for one in said)


def test_the_lists_of_prompts() -> None:
    """First, last and count, as in ddpo-pytorch; the activities are every pair of a list of 45 and
    one of 3."""
    folder = ROOT / "configs" / "prompts"
    imagenet, simple, activities = (
        read_prompts(str(folder / f"{name}.txt"), name)
        for name in ("imagenet_animals", "simple_animals", "animal_activities")
    )
    assert (len(imagenet), len(set(imagenet))) == (398, 398)
    assert imagenet[0] == "tench, Tinca tinca"
    assert imagenet[151] == "Chihuahua"
    assert imagenet[397].startswith("puffer")
    assert (len(set(simple)), simple[0], simple[-1]) == (45, "cat", "kangaroo")
    verbs = ("washing the dishes", "riding a bike", "playing chess")
    nouns = ["an ant" if animal == "ant" else f"a {animal}" for animal in simple]
    assert list(activities) == [f"{noun} {verb}" for noun in nouns for verb in verbs]
