"""``rlalign sample`` from the settings to the folder: what is written, what is compared, and what
happens when scores fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rlalign.cli import main
from rlalign.core.pictures import read_grid
from rlalign.core.registry import UserError
from rlalign.sampling import load_sample, sample_local
from rlalign.sampling.settings import parse_sample

SETTINGS: dict[str, Any] = {
    "name": "some",
    "policy": {"name": "tiny"},
    "plan": {"steps": 4, "eta": 1.0},
    "prompts": {"name": "shapes"},
    "pictures": 3,
    "rewards": [{"name": "shapes"}],
    "held_out": [{"name": "jpeg"}],
    "sampler": {"name": "best_of_n", "n": 2},
    "rows": 3,
    "runtime": {"rollout": {"workers": 2}},
}


def refuses_half(media_BFCHW: torch.Tensor, prompts: list[str]) -> list[float]:
    """Fails for a picture whose mean is above the middle of its batch."""
    means = media_BFCHW.flatten(1).mean(1)
    return [float("nan") if m > means.median() else float(m) for m in means]


def refuses_all(media_BFCHW: torch.Tensor, prompts: list[str]) -> list[float]:
    raise RuntimeError("the reward server is down")


def run(folder: Path, **settings: Any) -> dict[str, Any]:
    return sample_local(parse_sample({**SETTINGS, **settings}), folder, lambda record: None)


def test_a_folder_holds_pictures_scores_costs_and_a_page(tmp_path: Path) -> None:
    result = run(tmp_path / "out", sampler={"name": "demon", "candidates": 2})
    out = tmp_path / "out"
    assert json.loads((out / "sample.json").read_text()) == result
    assert [m["title"] for m in result["methods"]] == ["method", "plain", "best of N, same cost"]
    method, plain, best = result["methods"]
    assert method["cost"]["denoiser_calls"] == 3 * (
        4 + 2 * 3
    )  # a step each, and a look of each candidate but at the end
    assert plain["cost"]["denoiser_calls"] == 3 * 4
    assert plain["cost"]["reward_queries"] == 0  # the scores of the comparison are not the method's
    assert best["cost"]["denoiser_calls"] <= method["cost"]["denoiser_calls"]
    assert {"reward/shapes/mean", "held_out/jpeg/mean", "diversity/pixel_rms", "win_rate"} <= set(
        method
    )
    pictures = sorted((out / "pictures").glob("*.png"))
    assert [p.name for p in pictures] == ["00000.png", "00001.png", "00002.png"]
    grid = read_grid(out / "samples.png")
    assert [c.caption for c in grid] == [p["prompt"] for p in result["pictures"]]
    np.testing.assert_array_equal(np.asarray(Image.open(pictures[1])), np.asarray(grid[1].picture))
    page = (out / "report.html").read_text()
    assert "demon" in page
    assert "http" not in page.split("<body>")[1]  # self-contained
    assert load_sample(out / "config.yaml").sampler.name == "demon"


def test_plain_sampling_is_what_a_run_samples(tmp_path: Path) -> None:
    """The same unit through rollout: the same bytes."""
    from rlalign.diffusion.rollout import rollout

    sample = parse_sample({**SETTINGS, "sampler": {"name": "plain"}})
    sample_local(sample, tmp_path / "out", lambda record: None)
    _, media = rollout(sample.model.load("cpu"), sample.unit, 0)
    for i, pixels in enumerate(media[:, 0]):
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / f"out/pictures/{i:05d}.png")),
            pixels.transpose(1, 2, 0),
        )


@pytest.mark.slow
def test_the_number_of_threads_changes_nothing(tmp_path: Path) -> None:
    results = []
    for lanes in (1, 3):
        result = run(
            tmp_path / str(lanes),
            sampler={"name": "svdd", "candidates": 3},
            runtime={"rollout": {"workers": lanes}},
        )
        for method in result["methods"]:
            del method["cost"]["seconds"]
        results.append(result)
    assert results[0] == results[1]


def test_a_budget_decides_the_width(tmp_path: Path) -> None:
    sample = parse_sample({**SETTINGS, "budget": {"denoiser_calls": 13}})
    assert sample.method.n == 3  # type: ignore[attr-defined]
    with pytest.raises(
        UserError, match=r"budget\.denoiser_calls must be >= 4 for best_of_n with this plan, got 3"
    ):
        _ = parse_sample({**SETTINGS, "budget": {"denoiser_calls": 3}}).method


def test_candidates_without_scores_are_dropped_and_said(tmp_path: Path) -> None:
    reward = {"name": "function", "call": "tests.sampling.test_compare:refuses_half"}
    result = run(tmp_path / "out", rewards=[reward], sampler={"name": "best_of_n", "n": 4})
    assert result["methods"][0]["cost"]["missing_scores"] > 0
    assert "missing scores" in (tmp_path / "out" / "report.html").read_text()


def test_a_reward_that_fails_for_all_names_its_error_and_saves_the_pictures(
    tmp_path: Path, capsys: Any
) -> None:
    import yaml

    reward = {"name": "function", "call": "tests.sampling.test_compare:refuses_all"}
    config = tmp_path / "some.yaml"
    config.write_text(yaml.safe_dump({**SETTINGS, "rewards": [reward]}))
    assert main(["sample", str(config), "--local", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "the rewards gave no score for any of the 2 candidates of picture 1" in said
    assert "RuntimeError: the reward server is down" in said
    assert "Traceback" not in said
    assert len(read_grid(tmp_path / "out" / "so-far" / "so-far.png")) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sampler": {"name": "demon"}, "plan": {"steps": 4, "eta": 0.0}},
            "plan.eta must be > 0 for demon, got 0.0",
        ),
        ({"sampler": {"name": "doodl"}}, "doodl follows the gradient, and shapes has none"),
        (
            {"sampler": {"name": "classifier_guidance", "of": "reward"}},
            "classifier_guidance follows the gradient",
        ),
        ({"plan": {"steps": 4, "rule": "flow_ode"}}, "plan.rule 'flow_ode' needs a flow model"),
        ({"interpolation": 0.5}, "interpolation needs a run folder's policy"),
        (
            {"policy": "no/such/run"},
            "policy must name a file or folder that is there, got 'no/such/run'",
        ),
        (
            {"sampler": {"name": "edict", "precision": "bfloat16"}},
            "inversion multiplies rounding errors",
        ),
        (
            {"sampler": {"name": "edict", "source": ["a.png"]}},
            "source_prompt must say what each of the 1 source pictures",
        ),
        ({"sampler": {"name": "demn"}}, "did you mean 'demon'"),
        (
            {"sampler": {"name": "classifier_guidance", "classifier": "no/such"}},
            "sampler.classifier must name a file or folder",
        ),
        ({"held_out": [{"name": "shapes"}]}, "'shapes' appears twice"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_mistakes_are_refused_with_the_way_out(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        run(tmp_path / "out", **settings)
    assert message in str(refusal.value)


@pytest.mark.slow
def test_a_picture_is_edited_by_inverting_it(tmp_path: Path) -> None:
    """Under its own caption it comes back; under another one it does not. The autoencoder's own
    error is the floor."""
    from rlalign.data.shapes import captions

    plain = run(
        tmp_path / "plain", sampler={"name": "plain"}, plan={"steps": 10, "eta": 0.0}, pictures=1
    )
    source, told = tmp_path / "plain" / "pictures" / "00000.png", plain["pictures"][0]["prompt"]
    before = np.asarray(Image.open(source), dtype=float)
    errors = {}
    for name, prompt in (("same", told), ("other", captions("held_out")[5])):
        run(
            tmp_path / name,
            sampler={
                "name": "edict",
                "source": [str(source)],
                "source_prompt": [told],
                "strength": 0.8,
            },
            prompts={"name": "list", "prompts": ["a red circle"], "held_out_prompts": [prompt]},
            plan={"steps": 10, "eta": 0.0},
            pictures=1,
        )
        after = np.asarray(Image.open(tmp_path / name / "pictures" / "00000.png"), dtype=float)
        errors[name] = float(np.abs(after - before).mean())
    assert errors["same"] < 6.0
    assert errors["other"] > 1.5 * errors["same"]


def test_memory_of_doodl_by_inversion_does_not_grow_with_the_steps() -> None:
    """Bytes that autograd keeps between forward and backward, at most at any time: the same at 10,
    50 and 200 steps."""
    from rlalign.core.records import Plan
    from rlalign.samplers.doodl import Doodl, _PullInverted
    from tests.samplers.helpers import ExactRewards, unit_of
    from tests.toy import ToyPolicy

    def most(steps: int) -> int:
        policy = ToyPolicy(dtype=torch.float64)
        policy.decode = lambda latents: latents[:, None]  # type: ignore[method-assign]
        unit = unit_of(2, Plan(steps=steps, eta=0.0))
        z = torch.zeros(2, 2, 1, 1, dtype=torch.float64)
        work = _PullInverted(unit=unit, z=z, update=0, settings=Doodl())
        held: dict[int, int] = {}
        highest = [0]

        class Kept:
            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor = tensor
                held[id(self)] = tensor.numel() * tensor.element_size()
                highest[0] = max(highest[0], sum(held.values()))

            def __del__(self) -> None:
                held.pop(id(self), None)

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            work.do(policy, ExactRewards(lambda x_BD: torch.sin(x_BD).sum(1)))
        return highest[0]

    assert most(10) == most(50) == most(200)


@pytest.mark.slow
def test_check_says_what_a_sample_file_comes_to(tmp_path: Path, capsys: Any) -> None:
    import yaml

    config = tmp_path / "some.yaml"
    config.write_text(yaml.safe_dump({**SETTINGS, "sampler": {"name": "svdd", "candidates": 3}}))
    assert main(["check", str(config)]) == 0
    said = capsys.readouterr().out
    assert (
        "about 10, 0 of them with a gradient" in said
    )  # one look, and three at each of three more steps
    assert said.endswith("ok\n")
    assert main(["check", str(config), "plan.eta=0.0"]) == 2
    assert "plan.eta must be > 0 for svdd, got 0.0" in capsys.readouterr().err
