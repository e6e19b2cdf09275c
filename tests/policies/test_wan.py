"""Wan against diffusers' own pipelines, on small ones of random weights."""

from __future__ import annotations

import gc
import inspect
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.wan import Wan
from tests.policies.acceptance import Acceptance, Case, asked
from tests.policies.clip_acceptance import ClipAcceptance
from tests.toy import collect, make_units

TEXT_TOKENS = 24
FRAMES = 5


def step_once(pipeline: Any) -> None:
    """Euler's steps on the shipped solver's levels, of which the first is pure noise (UniPC begins
    1e-6 below), and timesteps that are not cut to whole numbers."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    shipped = pipeline.scheduler

    class Euler(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            shipped.set_timesteps(num_inference_steps)
            sigmas = [1.0, *shipped.sigmas[1:-1].tolist()]
            super().set_timesteps(sigmas=sigmas, device=device)

    pipeline.scheduler = Euler()


def small(name: str, folder: Path, side: int = 16) -> Case:
    write_pipeline(folder, FAMILIES[name])
    return Case(
        recipe=Wan(path=str(folder), text_tokens=TEXT_TOKENS),
        adapted=16,
        call=lambda w: {"guidance_scale": w, "max_sequence_length": TEXT_TOKENS},
        sizes=((side, side), (2 * side, side)),
        frames=FRAMES,
        prepare=step_once,
    )


def two_experts(folder: Path) -> Case:
    """Of four steps the first two are above the boundary of 0.875."""
    case = small("wan22", folder)
    told = {"guidance_scale_2": 2.0, "max_sequence_length": TEXT_TOKENS}
    return replace(
        case,
        recipe=case.recipe.model_copy(update={"guidance_low": 2.0}),
        adapted=32,
        call=lambda w: {"guidance_scale": w, **told},
        timesteps=(900, 200),
        load_second=load_second,
    )


def load_second(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(
        folder,
        weight_name="pytorch_lora_weights_2.safetensors",
        load_into_transformer_2=True,
    )


CASES: dict[str, Callable[[Path], Case]] = {
    "wan": lambda folder: small("wan", folder),
    "wan22_5b": lambda folder: small("wan22_5b", folder, side=32),
    "wan22": two_experts,
}


@pytest.fixture(scope="module", params=CASES)
def every(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A case of each kind."""
    return CASES[request.param](tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Wan 2.1."""
    return CASES["wan"](tmp_path_factory.mktemp("pipeline"))


class TestAcceptance(Acceptance):
    """Each case is taken by diffusers as by rlalign."""

    @pytest.fixture
    def case(self, every: Case) -> Case:
        return every


def test_levels_are_the_shipped_solvers(case: Case) -> None:
    """To its 1e-6 at the first."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler.from_pretrained(case.recipe.path, subfolder="scheduler")
    for steps in (1, 4, 20):
        scheduler.set_timesteps(steps)
        found = case.policy.path.at(Plan(steps=steps)).levels(steps)
        wanted = scheduler.sigmas.to(torch.float64)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_levels_of_another_scheduler_are_its_own(case: Case) -> None:
    """FlowMatchEuler in the folder, as some conversions have it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from rlalign.diffusion.paths import Tokens
    from rlalign.networks.pipelines.schedulers import read_flow

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(10)
    path = read_flow(scheduler, "", Tokens(side=16), even=case.policy.family.even_levels)
    wanted = scheduler.sigmas.to(torch.float64)
    torch.testing.assert_close(path.levels(10), wanted, rtol=0, atol=1e-6)


def test_frames_are_a_multiple_of_four_and_one(case: Case) -> None:
    policy = case.policy

    def shape(frames: int) -> tuple[int, ...]:
        return policy.latent_shape(Plan(height=16, width=16, frames=frames))

    shapes = [shape(frames) for frames in (1, 5, 9)]
    assert shapes == [(4, 1, 4, 4), (4, 3, 4, 4), (4, 5, 4, 4)]
    for frames, near in ((4, "1 or 5"), (8, "5 or 9"), (10, "9 or 13")):
        rule = rf"plan\.frames must be 4n \+ 1 for '.*' \(1, 5, 9 and so on\), got {frames}"
        with pytest.raises(UserError, match=f"{rule}; take {near}$"):
            shape(frames)


def test_a_size_ends_where_the_positions_end(case: Case) -> None:
    """32 places of 8 pixels, 32 latent frames."""
    policy = case.policy
    assert policy.latent_shape(Plan(height=256, width=16)) == (4, 1, 64, 4)
    with pytest.raises(UserError, match=r"must be at most 256, and the latents at most 32 frames"):
        policy.latent_shape(Plan(height=264, width=16))
    with pytest.raises(UserError, match=r"rope_max_seq_len ends, got 16 x 16 and 33"):
        policy.latent_shape(Plan(height=16, width=16, frames=65))


def test_the_callers_own_size(case: Case) -> None:
    """What is drawn where neither the plan nor a config says a size."""
    call = inspect.signature(case.pipeline.__call__).parameters
    family: Any = case.policy.family
    assert family.own_size() == (call["height"].default, call["width"].default)


def test_a_patch_over_frames_is_refused(tmp_path: Path) -> None:
    family = FAMILIES["wan"]
    transformer = family.networks["transformer"].vary(same={"patch_size": [2, 1, 2]})
    networks = {**family.networks, "transformer": transformer}
    write_pipeline(tmp_path, replace(family, networks=networks))
    with pytest.raises(UserError, match=r"transformer: patch_size must be \[1, n, n\], got"):
        Wan(path=str(tmp_path)).load("cpu")


def test_captions_are_cleaned_and_filled_up_with_zeros(case: Case) -> None:
    """As in the pipeline; another width is another answer, since zeros are attended."""
    policy = case.policy
    plain, marked = policy.encode(["a & b", "  a &amp;\n b "]).caption["embeds_BLD"]
    assert torch.equal(plain, marked)
    length = len(case.pipeline.tokenizer("a & b").input_ids)
    assert plain[:length].any(-1).all() and not plain[length:].any()
    x, timestep_B, words = asked(policy, case)
    narrow = case.varied(text_tokens=TEXT_TOKENS - 4)
    with torch.no_grad():
        said = policy.family.predict(x, timestep_B, words)
        other = narrow.family.predict(x, timestep_B, asked(narrow, case)[2])
    assert (other - said).abs().max() > 1e-5


def test_a_negative_prompt_is_the_calls(case: Case) -> None:
    text = "blurred"
    against = case.varied(negative_prompt=text).encode(["a", "b"]).against
    assert against is not None
    settings = {"max_sequence_length": TEXT_TOKENS, "device": "cpu"}
    _, wanted = case.pipeline.encode_prompt(["a", "b"], negative_prompt=text, **settings)
    torch.testing.assert_close(against["embeds_BLD"], wanted, rtol=0, atol=1e-6)


def test_clips_are_decoded_by_several_threads_at_once(case: Case) -> None:
    """The autoencoder keeps the features of the frames before on itself: each thread has its
    own."""
    policies = [case.policy, *(case.policy.replica() for _ in range(2))]
    shape = case.policy.latent_shape(Plan(height=16, width=16, frames=FRAMES))
    latents = torch.randn(3, 1, *shape, generator=torch.Generator().manual_seed(0))

    def decode(lane: int) -> list[torch.Tensor]:
        with torch.no_grad():
            return [policies[lane].decode(latents[lane]) for _ in range(3)]

    wanted = [decode(lane)[0] for lane in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(decode, range(3)))
    for lane in range(3):
        assert all(torch.equal(media, wanted[lane]) for media in found[lane])


@pytest.mark.parametrize("window", [2, 0])
def test_a_round_is_as_large_as_its_window(case: Case, window: int) -> None:
    """What is handed on of twice as many steps, and what is alive while they are made: alike with a
    window but for the log-probs, and twice without."""
    sizes, alive = [], []
    for steps in (8, 16):
        plan = Plan(height=16, width=16, frames=FRAMES, steps=steps, rule="flow_sde", eta=0.7)
        plan = plan.model_copy(update={"window": window})
        (unit,) = make_units(1, per_unit=2, plan=plan)
        counter = AtLastStep(steps, (2, *case.policy.latent_shape(plan)))
        asked = case.policy.network.register_forward_pre_hook(counter)
        (scored,) = collect(case.policy, [unit])
        asked.remove()
        assert counter.left == 0
        sizes.append(len(pickle.dumps(scored.trajectory)))
        alive.append(counter.alive)
    latent = 4 * 2 * 4 * 3 * 4 * 4
    per_step = 2 * 4 + 2 * 1
    if window:
        assert 0 <= sizes[1] - sizes[0] < 8 * 2 * per_step < latent
        assert alive[0] == alive[1]
    else:
        assert sizes[1] - sizes[0] > 8 * latent
        assert alive[1] - alive[0] == 8


class AtLastStep:
    """Counts the tensors of a shape that are alive when a network is asked for the last time."""

    def __init__(self, steps: int, shape: tuple[int, ...]) -> None:
        self.left = steps
        self.shape = shape
        self.alive = 0

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            kinds = (one for one in gc.get_objects() if type(one) is torch.Tensor)
            self.alive = sum(tuple(one.shape) == self.shape for one in kinds)


def test_clips_are_decoded_in_tiles(case: Case) -> None:
    """And one latent frame after the other by itself."""
    shared = ClipAcceptance()
    shared.test_tiles_are_as_large_as_asked(case)
    shared.test_tiles_that_do_not_fit_are_refused(case)
    shared.test_frames_are_decoded_in_runs(case)


def test_bfloat16_keeps_the_parts_that_diffusers_keeps(case: Case) -> None:
    """In float32: what plain diffusers reads in bfloat16 has the same types; the answer is near."""
    from diffusers import WanTransformer3DModel

    rounded = case.varied(precision="bfloat16", lora_rank=2)
    plain = WanTransformer3DModel.from_pretrained(
        case.recipe.path, subfolder="transformer", dtype=torch.bfloat16
    )
    wanted = {name: p.dtype for name, p in plain.named_parameters()}
    found = {
        name.replace(".base_layer.", "."): p.dtype
        for name, p in rounded.network.named_parameters()
        if "lora_" not in name
    }
    assert found == wanted
    assert {*wanted.values()} == {torch.float32, torch.bfloat16}
    assert {p.dtype for p in rounded.trainable().values()} == {torch.float32}
    with torch.no_grad():
        exact = case.policy.answer(*asked(case.policy, case))
        said = rounded.answer(*asked(rounded, case))
    assert said.dtype == torch.float32
    assert 1e-5 < float((said - exact).norm() / exact.norm()) < 3e-2


def test_the_ratio_is_one_in_bfloat16(case: Case) -> None:
    Acceptance().test_the_ratio_is_exactly_one_before_the_first_update(
        replace(case, recipe=case.recipe.model_copy(update={"precision": "bfloat16"})), 2
    )
