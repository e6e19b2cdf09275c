"""What a run is refused for once its policy is there: steps, samples, ties, and pictures of another
size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlalign.alignment.assemble import build_learner, check_plan, preference_pairs
from rlalign.config import Run, parse_run
from rlalign.core.batches import PairBatch
from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import write_pairs
from rlalign.data.pairs.ranking import encode
from rlalign.data.pairs.reader import PairReader
from rlalign.policies.base import Policy
from tests.toy import PROMPTS, SIZE, ToyFamily, ToyPolicy

ONLINE = {"per_round": 4, "per_unit": 2, "samples_per_prompt": 4}


def run_of(algorithm: dict[str, Any], **changes: Any) -> Run:
    """A run on the toy policy, whose pictures are 8 x 8."""
    prompts = {"name": "list", "prompts": list(PROMPTS), **ONLINE, **changes.pop("prompts", {})}
    settings = {
        "name": "toy",
        "policy": {"name": "tests.toy:Toy"},
        "prompts": prompts,
        "rewards": [{"name": "jpeg"}],
    }
    return parse_run({**settings, "algorithm": algorithm, **changes})


def refused(run: Run, **how: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_plan(run, ToyPolicy(), **how)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["ddpo", "dpok", "grpo", "d3po", "diffusion_dpo", "diffusion_nft", "rwr"]
)
def test_an_ordinary_run_passes(name: str) -> None:
    check_plan(run_of({"name": name}), ToyPolicy())


@pytest.mark.parametrize(
    ("algorithm", "changes", "expected"),
    [
        ({"name": "ddpo"}, {"plan": {"eta": 0.0}}, "plan.eta must be > 0 for ddpo, got 0.0"),
        (
            {"name": "grpo"},
            {"plan": {"steps": 1}},
            "algorithm.skip_last must be <= 0 with 1 steps, got 1",
        ),
        (
            {"name": "grpo"},
            {"prompts": {"samples_per_prompt": 1}},
            "prompts.samples_per_prompt must be >= 2 for grpo",
        ),
        (
            {"name": "diffusion_nft"},
            {"plan": {"guidance": 2.0}},
            "plan.guidance must be <= 1 for diffusion_nft",
        ),
        (
            {"name": "ddpo"},
            {"plan": {"rule": "flow_sde"}},
            "plan.rule 'flow_sde' needs a flow model",
        ),
    ],
)
def test_what_cannot_learn_is_refused_and_may_still_be_sampled(
    algorithm: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    run = run_of(algorithm, **changes)
    assert refused(run).startswith(expected)
    with pytest.raises(UserError, match=expected.split(",")[0].replace("(", r"\(")[:40]):
        build_learner(run)
    if run.plan.rule == "ddim":
        check_plan(run, ToyPolicy(), learns=False)


def test_a_prompt_of_which_a_round_takes_several_has_company() -> None:
    """One prompt, drawn four times a round: four samples of it, though samples_per_prompt is 1."""
    prompts = {"prompts": ["a red circle"], "samples_per_prompt": 1}
    check_plan(run_of({"name": "grpo"}, prompts=prompts), ToyPolicy())
    check_plan(run_of({"name": "d3po"}, prompts=prompts), ToyPolicy())


# a set of preferences


def write(path: Path, *shapes: tuple[int, int]) -> Path:
    """Pairs of pictures, two of each of these (height, width), in their order."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "caption": PROMPTS[n % 4],
            "label_0": 1.0,
            "label_1": 0.0,
            **{
                side: encode(rng.integers(0, 256, (3, *shape), dtype=np.uint8))
                for side in ("jpg_0", "jpg_1")
            },
        }
        for n, shape in enumerate(s for s in shapes for _ in range(2))
    ]
    write_pairs(path / "pairs.parquet", rows)
    return path


def offline(path: Path, algorithm: dict[str, Any] | None = None, **settings: Any) -> Run:
    preferences = {
        "path": str(path),
        "pairs_per_round": 4,
        "pairs_per_pass": 1,
        "shuffle": 1,
        **settings,
    }
    return run_of(
        {"name": "diffusion_dpo", "draws": 1, **(algorithm or {})}, preferences=preferences
    )


def test_drawn_size_is_the_policys_own() -> None:
    assert ToyPolicy().drawn_size(Plan()) == (SIZE, SIZE)


def test_pictures_of_the_policys_size_are_learned_from(tmp_path: Path) -> None:
    run = offline(write(tmp_path, (SIZE, SIZE)))
    learner = build_learner(run)
    assert run.preferences is not None
    pairs = preference_pairs(PairReader(run.preferences, run.seed), 0, run.plan)
    metrics = learner.update(PairBatch(pairs=tuple(pairs), draws=run.algorithm.draws), round=1)
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    ("shape", "size", "got"),
    [
        ((16, 16), 0, "0 and pictures of 16 x 16"),
        ((SIZE, 12), 0, "0 and pictures of 8 x 12"),
        ((SIZE, SIZE), 16, "16 and"),
    ],
)
def test_pictures_of_another_size_are_refused_before_the_run(
    tmp_path: Path, shape: tuple[int, int], size: int, got: str
) -> None:
    run = offline(write(tmp_path, shape), size=size)
    message = refused(run)
    assert message.startswith(
        f"preferences.size must be 8, the side of the policy's pictures, got {got}"
    )
    assert message.endswith("or set plan.height and plan.width to theirs")
    with pytest.raises(UserError, match="preferences.size must be 8"):
        build_learner(run)
    check_plan(offline(tmp_path, size=SIZE), ToyPolicy())


def test_a_later_picture_of_another_size_is_refused_where_it_is_met(tmp_path: Path) -> None:
    """The first picture is right, so the run starts; the second pair's are not, and it says so in
    one sentence."""
    run = offline(write(tmp_path, (SIZE, SIZE), (16, 16)))
    learner = build_learner(run)
    assert run.preferences is not None
    pairs = preference_pairs(PairReader(run.preferences, run.seed), 0, run.plan)
    batch = PairBatch(pairs=tuple(pairs), draws=run.algorithm.draws)
    with pytest.raises(
        UserError, match="preferences.size must be 8, .* got 0 and pictures of 16 x 16"
    ):
        learner.update(batch, round=1)


def test_an_oblong_plan_wants_its_own_shape(tmp_path: Path) -> None:
    class Oblong(ToyFamily):
        def decode(self, latents):
            return super().decode(latents)[..., :4]

    with pytest.raises(UserError) as caught:
        check_plan(offline(write(tmp_path, (SIZE, SIZE))), Policy(Oblong()))
    assert str(caught.value).startswith(
        "preferences must hold pictures of 8 x 4 (height x width), the plan's, got 8 x 8; "
    )


def test_a_first_picture_that_cannot_be_decoded_is_refused_unless_so_many_bad_rows_are_allowed(
    tmp_path: Path,
) -> None:
    picture = encode(np.full((3, SIZE, SIZE), 7, dtype=np.uint8))
    row = {"caption": "a", "jpg_0": picture, "jpg_1": picture, "label_0": 1.0, "label_1": 0.0}
    write_pairs(
        tmp_path / "pairs.parquet",
        [{**row, "jpg_0": b"no picture"}, {**row, "jpg_1": picture[:40]}, row],
    )
    for size in (0, SIZE):
        message = refused(offline(tmp_path, size=size))
        assert (
            "pairs.parquet:0: picture cannot be decoded (no picture that Pillow knows) in jpg_0"
            in message
        )
        message = refused(offline(tmp_path, size=size, bad_share=0.4))
        assert "pairs.parquet:1: picture cannot be decoded" in message and "in jpg_1" in message
        check_plan(offline(tmp_path, size=size, bad_share=0.7), ToyPolicy())


def test_ties_of_a_set_are_the_sets_to_say(tmp_path: Path) -> None:
    write(tmp_path, (SIZE, SIZE))
    assert refused(offline(tmp_path, {"ties": "half"})).startswith(
        "algorithm.ties must be drop where the pairs are a set's"
    )
    check_plan(offline(tmp_path, {"ties": "half"}, ties="half"), ToyPolicy())
    check_plan(offline(tmp_path, ties="half"), ToyPolicy())
