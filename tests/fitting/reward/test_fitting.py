"""A fit as a whole: it learns, resumes bit for bit, freezes what it is told to, and says what is
wrong in one message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlalign.cli import main
from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import write_pairs
from rlalign.data.pairs.ranking import encode
from rlalign.data.shapes import draw, random_scene
from rlalign.fitting.reward import FitReward, fit_reward
from rlalign.fitting.reward.fitting import held_out
from rlalign.fitting.reward.stage import lock
from rlalign.networks.towers import build_towers
from rlalign.rewards.bradley_terry import BradleyTerry


class Stopped(Exception):
    """What stands for a power cut."""


def quiet(stage: str, done: int, total: int, loss: float) -> None:
    """No progress."""


def pictures_that_differ_in_light(count: int) -> Iterator[dict[str, Any]]:
    """Pairs of one scene, of which the brighter drawing is preferred: learnt in seconds."""
    rng = np.random.default_rng(0)
    for n in range(count):
        scene = random_scene(rng, "train")
        bright, pale = draw(scene, rng), draw(scene, rng) // 3
        first = float(n % 2)
        pictures = [p.transpose(2, 0, 1) for p in ((bright, pale) if first else (pale, bright))]
        row = {
            "jpg_0": encode(pictures[0]),
            "jpg_1": encode(pictures[1]),
            "label_0": first,
            "label_1": 1.0 - first,
        }
        yield {"caption": scene.caption, **row}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "light.parquet"
    write_pairs(file, pictures_that_differ_in_light(200))
    return file


def settings(file: Path, out: Path, **changes: Any) -> FitReward:
    values = {
        "out": out,
        "preferences": {
            "path": str(file),
            "pairs_per_round": 8,
            "pairs_per_pass": 4,
            "shuffle": 50,
        },
        "held_out": 0.3,
        "contrastive": {"updates": 3, "batch": 6, "warmup": 1},
        "fit": {"updates": 5, "warmup": 2},
        "checkpoint_every": 2,
        **changes,
    }
    return FitReward.model_validate(values)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def whole(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reward folder of an uninterrupted fit."""
    return fit_reward(settings(pairs, tmp_path_factory.mktemp("whole")), progress=quiet)


@pytest.mark.promise
@pytest.mark.parametrize(
    "stop", [("contrastive", 1), ("contrastive", 3), ("fit", 1), ("fit", 4), ("fit", 5)]
)
def test_a_resumed_fit_ends_in_the_same_weights_bit_for_bit(
    whole: Path, pairs: Path, tmp_path: Path, stop: tuple[str, int]
) -> None:
    def progress(stage: str, done: int, total: int, loss: float) -> None:
        if (stage, done) == stop:
            raise Stopped

    with pytest.raises(Stopped):
        fit_reward(settings(pairs, tmp_path), progress=progress)
    again, expected = weights(fit_reward(settings(pairs, tmp_path), progress=quiet)), weights(whole)
    assert [n for n in expected if not torch.equal(again[n], expected[n])] == []
    assert (tmp_path / "fit.json").read_bytes() == (whole.parent / "fit.json").read_bytes()


@pytest.mark.promise
def test_other_settings_cannot_resume_but_can_start_anew(
    whole: Path, pairs: Path, tmp_path: Path
) -> None:
    first = weights(fit_reward(settings(pairs, tmp_path, seed=1), progress=quiet))
    assert any(not torch.equal(first[n], t) for n, t in weights(whole).items())
    with pytest.raises(UserError, match=r"seed must stay 1 to resume from .*, got 0"):
        fit_reward(settings(pairs, tmp_path), progress=quiet)
    anew = weights(fit_reward(settings(pairs, tmp_path), resume=False, progress=quiet))
    assert all(torch.equal(anew[n], t) for n, t in weights(whole).items())


@pytest.mark.slow
def test_a_small_fit_learns_what_is_preferred(pairs: Path, tmp_path: Path) -> None:
    """60 updates of 16 pairs: held-out accuracy over 0.9 where chance is 0.5 (some 60 pairs), from
    seed 0."""
    preferences = {"path": str(pairs), "pairs_per_round": 16, "pairs_per_pass": 16}
    changes = {
        "preferences": preferences,
        "contrastive": {"updates": 0},
        "fit": {"updates": 60, "warmup": 10},
    }
    folder = fit_reward(settings(pairs, tmp_path, **changes), progress=quiet)
    found = json.loads((tmp_path / "fit.json").read_text())
    assert found["accuracy"] > 0.9 and found["loss"] < 0.5
    assert (
        json.loads((folder / "reward.json").read_text())["held_out"]["accuracy"]
        == found["accuracy"]
    )
    assert "<circle" in (tmp_path / "fit.html").read_text()
    rng = np.random.default_rng(9)
    scene = random_scene(rng, "held_out")
    media = (
        torch.from_numpy(np.stack([draw(scene, rng), draw(scene, rng) // 3])).permute(0, 3, 1, 2)[
            :, None
        ]
        / 255
    )
    bright, pale = BradleyTerry(path=str(folder)).load("cpu")(media, [scene.caption] * 2)
    assert bright > pale


def test_simulated_pairs_are_made_once_and_kept(tmp_path: Path) -> None:
    simulate = {"utility": [{"name": "shapes"}], "pairs": 40, "drawn": 1.0}
    preferences = {"pairs_per_round": 8, "pairs_per_pass": 8}
    changes = {"preferences": preferences, "simulate": simulate, "fit": {"updates": 1}}
    fit_reward(settings(Path(), tmp_path, **changes), progress=quiet)
    file = tmp_path / "pairs.parquet"
    stamp = file.stat().st_mtime_ns
    fit_reward(settings(Path(), tmp_path, **changes), progress=quiet)
    assert file.stat().st_mtime_ns == stamp
    (tmp_path / "checkpoints" / "fit-00000001" / "checkpoint.json").unlink()
    for left in sorted((tmp_path / "checkpoints").rglob("*"), reverse=True):
        left.unlink() if left.is_file() else left.rmdir()
    with pytest.raises(
        UserError, match=r"pairs\.parquet was simulated under other settings; choose another out"
    ):
        fit_reward(settings(Path(), tmp_path, **{**changes, "seed": 7}), progress=quiet)


def test_prompts_are_split_by_their_words_in_about_the_stated_share() -> None:
    """2000 captions at 0.2: within three standard errors (0.027)."""
    share = np.mean([held_out(f"caption {n}", 0.2) for n in range(2000)])
    assert share == pytest.approx(0.2, abs=0.027)
    assert held_out("a red circle", 0.5) == held_out("a red circle", 0.5)


def test_that_nothing_is_held_out_is_said_before_anything_is_fitted(
    pairs: Path, tmp_path: Path
) -> None:
    def never(stage: str, done: int, total: int, loss: float) -> None:
        raise AssertionError(stage)

    few = settings(pairs, tmp_path / "out", held_out=1e-4)
    with pytest.raises(UserError, match=r"none of the captions asked for .*; held_out \(0\.0001\)"):
        fit_reward(few, progress=never)


def test_frozen_layers_stay_and_a_tower_without_parts_is_refused(tmp_path: Path) -> None:
    towers = build_towers("tiny")
    lock(
        towers,
        FitReward.model_validate({"preferences": {"path": "x"}, "model": {"text_groups": 2}}).model,
    )
    trained = {n for n, p in towers.clip.named_parameters() if p.requires_grad}
    assert any(n.startswith("transformer.resblocks.1") for n in trained) and any(
        n.startswith("visual") for n in trained
    )
    assert not any(n.startswith(("transformer.resblocks.0", "token_embedding")) for n in trained)
    towers = build_towers("tiny")
    model = FitReward.model_validate(
        {"preferences": {"path": "x"}, "model": {"image_groups": 0}}
    ).model
    lock(towers, model)
    assert not any(p.requires_grad for p in towers.clip.visual.parameters())
    with pytest.raises(UserError, match=r"open_clip cannot lock a part of 'tiny'"):
        lock(build_towers("tiny"), model.model_copy(update={"image_groups": 2}))


def test_pictures_of_different_sizes_are_scored_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for n, row in enumerate(pictures_that_differ_in_light(30)):
        noise = rng.integers(0, 256, (3, 24 + n % 3, 40), dtype=np.uint8)
        rows.append({**row, "jpg_1": encode(noise, "jpeg")})
    write_pairs(tmp_path / "odd.parquet", rows)
    changes = {"contrastive": {"updates": 0}, "fit": {"updates": 1}}
    fit_reward(settings(tmp_path / "odd.parquet", tmp_path / "out", **changes), progress=quiet)
    assert json.loads((tmp_path / "out" / "fit.json").read_text())["decided"] > 0


# the command


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command_says_how_good_it_is_and_where(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "fit.yaml"
    file.write_text(
        f"preferences: {{path: {pairs}, pairs_per_round: 4, pairs_per_pass: 4}}\nheld_out: 0.3\n"
    )
    code, out, err = call(capsys, "fit-reward", file, "fit.updates=2", "--out", tmp_path / "made")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("held-out pairs: the winner has the higher score in ")
    assert lines[1:] == [f"reward: {tmp_path}/made/reward", f"report: {tmp_path}/made/fit.html"]
    assert "fit 2/2 loss" in err


def test_a_folder_with_other_things_is_left_alone(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fit.yaml").write_text(f"preferences: {{path: {pairs}}}\n")
    for out, message in (
        (tmp_path, "is not empty; name another"),
        (tmp_path / "fit.yaml", "is a file and must be"),
    ):
        code, _, err = call(capsys, "fit-reward", tmp_path / "fit.yaml", "--out", out)
        assert code == 2 and message in err
    assert [p.name for p in tmp_path.iterdir()] == ["fit.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 1",
            (
                "preferences.path or simulate must say where the pairs come from, and not both, got"
                " neither"
            ),
        ),
        ("preferences: {path: none.parquet}", "there is nothing at "),
        ("preferences: {path: x}\nfits: {}", "fits: unknown setting; did you mean 'fit'?"),
        ("preferences: {path: x}\nfit: {updates: -1}", "fit.updates must be >= 0, got -1"),
        (
            "preferences: {path: x}\nfit: {theta: 1.5}",
            "fit.theta > 1 models ties and needs preferences.ties half",
        ),
        ("preferences: {path: .}\nmodel: {architecture: ViT-B-33}", "did you mean 'ViT-B-32'?"),
        ("simulate: {utility: []}", "simulate.utility must hold at least 1"),
        (
            "simulate: {utility: [{name: shape}]}",
            "no plug-in 'shape' on shelf rewards; did you mean 'shapes'?",
        ),
        ("simulate: {utility: [{name: shapes}], policy: tyni}", "did you mean 'tiny'?"),
    ],
)
def test_a_mistake_is_one_message_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "fit.yaml").write_text(text)
    code, out, err = call(capsys, "fit-reward", tmp_path / "fit.yaml", "--out", tmp_path / "out")
    assert code == 2 and out == ""
    assert err.splitlines()[-1].startswith("error: ") and message in err and "Traceback" not in err
