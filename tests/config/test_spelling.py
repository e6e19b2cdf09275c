"""The runtime's flat keys of before are read as what they are now, with one note for a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from rlalign.cli import main
from rlalign.config import Run, dump, identity_of, load_begun, load_run, parse_run
from rlalign.config.spelling import NESTED, nest_path, note_spelling
from rlalign.core.registry import UserError
from rlalign.sampling import load_sample
from tests.runs import CONFIGS

EARLIER = Path(__file__).parent / "earlier_run" / "config.yaml"
FLAT = {
    "rollout_workers": 3,
    "rollout_cpus": 0.5,
    "rollout_labels": {"zone": "a"},
    "max_rollout_workers": 5,
    "rollout_threads": 2,
    "reward_workers": 4,
    "reward_spares": 1,
    "reward_gpus": 0.25,
    "learner_resources": {"learner": 1.0},
    "learner_threads": 3,
    "max_staleness": 1,
}
TODAY = {
    "rollout": {
        "workers": 3,
        "cpus": 0.5,
        "labels": {"zone": "a"},
        "max_workers": 5,
        "threads": 2,
    },
    "reward": {"workers": 4, "spares": 1, "gpus": 0.25},
    "learner": {"resources": {"learner": 1.0}, "threads": 3},
    "max_staleness": 1,
}


def file(folder: Path, runtime: dict[str, Any], config: str = "quickstart") -> Path:
    data = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text()) | {"runtime": runtime}
    path = folder / f"{config}.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize(
    ("config", "load"), [("quickstart", load_run), ("sample_demon", load_sample)]
)
def test_flat_keys_mean_the_nested_ones_and_one_note_names_them(
    config: str, load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "today").mkdir()
    expected = load(file(tmp_path / "today", TODAY, config))
    assert capsys.readouterr().err == "", "nothing to say of today's spelling"
    path = file(tmp_path, FLAT, config)
    assert load(path) == load(path) == expected
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"note: {path}: runtime.")
    for key in FLAT.keys() - {"max_staleness"}:
        assert f"runtime.{key} is {nest_path(f'runtime.{key}')}" in said


def test_every_setting_of_before_has_a_place_today() -> None:
    earlier = yaml.safe_load(EARLIER.read_text())["runtime"]
    run = load_begun(EARLIER)
    for key, value in earlier.items():
        if key == "recovery_seconds":
            value = max(value, earlier["start_seconds"])
        place: Any = run
        for part in nest_path(f"runtime.{key}").split("."):
            place = getattr(place, part)
        assert place == value, key
    moved = NESTED.keys() | {"recovery_seconds"}
    assert moved == earlier.keys() - type(run.runtime).model_fields.keys()


def test_overrides_in_either_spelling_meet_files_in_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(tmp_path, {"rollout_workers": 3, "rollout_labels": {"zone": "a"}})
    run = load_run(
        path,
        ["runtime.rollout.workers=4", "runtime.rollout_labels.disk=ssd", "runtime.reward_spares=2"],
    )
    assert run.runtime.rollout.workers == 4
    assert run.runtime.rollout.labels == {"zone": "a", "disk": "ssd"}
    assert run.runtime.reward.spares == 2
    said = capsys.readouterr().err
    assert "the command line: runtime.reward_spares is runtime.reward.spares now" in said
    assert load_run(path, ["runtime={learner_threads: 2}"]).runtime.learner.threads == 2


@pytest.mark.parametrize(
    ("runtime", "seconds"),
    [
        ({"recovery_seconds": 30.0}, 30.0),
        ({"recovery_seconds": 900.0, "start_seconds": 60.0}, 900.0),
        ({"recovery_seconds": 30.0, "start_seconds": 60.0}, 60.0),
    ],
)
def test_one_wait_is_the_longer_of_two(
    runtime: dict[str, Any], seconds: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(tmp_path, runtime)
    assert load_run(path).runtime.start_seconds == seconds
    assert capsys.readouterr().err == (
        f"note: {path}: runtime.recovery_seconds is runtime.start_seconds now; the old spelling is"
        " read for one more release\n"
    )
    assert load_run(path, ["runtime.recovery_seconds=7"]).runtime.start_seconds == 7.0


def test_one_note_names_all_that_is_spelt_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = yaml.safe_load((CONFIGS / "tiny_dpo_offline.yaml").read_text())
    data["preferences"]["workers"] = 4
    data["guard"] = {"held_out": "", "kl_most": 0.1}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    assert [limit.name for limit in load_run(path).guard.limits] == ["kl"]
    assert capsys.readouterr().err == (
        f"note: {path}: guard.held_out is reward of held_out in guard.limits, guard.kl_most is most"
        " of kl in guard.limits, preferences.workers is the number of cores now; the old spelling"
        " is read for one more release\n"
    )


def test_a_key_in_both_spellings_is_refused(tmp_path: Path) -> None:
    path = file(tmp_path, {"rollout_workers": 3, "rollout": {"workers": 2}})
    with pytest.raises(UserError, match=r"runtime\.rollout_workers is runtime\.rollout\.workers"):
        load_run(path)


@pytest.mark.parametrize(
    ("runtime", "said"),
    [
        (
            {"rollout_wrkers": 3},
            r"runtime\.rollout_wrkers: unknown setting; did you mean 'rollout'",
        ),
        ({"rollout": {"worker": 3}}, r"runtime\.rollout\.worker: .* did you mean 'workers'"),
        ({"rollout_workers": 0}, r"runtime\.rollout\.workers must be >= 1, got 0"),
        ({"recovery_seconds": 5, "start_seconds": "x"}, r"start_seconds must be .* got 'x'"),
        ({"rollout_workers": 1, "rollout": 3}, r"runtime\.rollout must be a mapping of settings"),
        (3, "runtime must be a mapping of settings"),
    ],
)
def test_mistakes_are_named_by_where_they_belong_today(runtime: Any, said: str) -> None:
    data = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    with pytest.raises(UserError, match=said):
        parse_run({**data, "runtime": runtime})


@pytest.mark.promise
def test_a_run_folder_of_before_is_noted_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(tmp_path, {"rollout_workers": 3})
    assert main(["check", str(path), "rounds=2"]) == 0
    assert capsys.readouterr().err.count("runtime.rollout_workers is") == 1


def with_learner(folder: Path, learner: dict[str, Any]) -> Path:
    data = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text()) | {"learner": learner}
    if "adamw_8bit" in str(learner):
        data["runtime"] = {"device": "cuda"}
    path = folder / "quickstart.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


OF_ADAMW: dict[str, Any] = {"betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.02}
UNSAID: dict[str, Any] = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 1e-4}
OPTIMIZERS_OF_BEFORE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, "1f54d9fa56b6c6b3"),
    (UNSAID, {"name": "adamw"}, "1f54d9fa56b6c6b3"),
    ({"optimizer": "adamw"}, {"weight_decay": 1e-4}, "1f54d9fa56b6c6b3"),
    (OF_ADAMW, OF_ADAMW, "3bf1b66d4bc71793"),
    (
        OF_ADAMW | {"optimizer": "adamw_8bit"},
        {"name": "adamw_8bit", **OF_ADAMW},
        "c3d9d301f0bcbacb",
    ),
    (UNSAID | {"optimizer": "adafactor"}, {"name": "adafactor"}, "1f408a54e15ce70d"),
    (
        {"optimizer": "adafactor", "weight_decay": 0.0},
        {"name": "adafactor", "weight_decay": 0.0},
        "53fe367ad7a9fdc3",
    ),
]
"""What a learner said of its optimiser, how it says it now, and the identity of rlalign 0.1."""


@pytest.mark.parametrize(("before", "now", "identity"), OPTIMIZERS_OF_BEFORE)
def test_an_optimiser_in_either_spelling_is_the_same_run(
    before: dict[str, Any],
    now: dict[str, Any],
    identity: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "now").mkdir()
    today = with_learner(tmp_path / "now", {"warmup": 3, **({"optimizer": now} if now else {})})
    run = load_run(today)
    assert capsys.readouterr().err == ""
    path = with_learner(tmp_path, {"warmup": 3, **before})
    assert load_run(path) == load_begun(path) == run
    assert identity_of(run) == identity
    said = capsys.readouterr().err
    assert said.count("note:") == bool(before)
    for key in before:
        assert f"learner.{key} is learner.optimizer.{'name' if key == 'optimizer' else key}" in said
    (tmp_path / "dumped").mkdir()
    dumped = tmp_path / "dumped" / "config.yaml"
    dumped.write_text(dump(run))
    assert load_begun(dumped) == run
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "given", [{}, {"optimizer": "adamw", **UNSAID}, {"optimizer": {"name": "adamw", **UNSAID}}]
)
def test_overrides_of_an_optimiser_in_either_spelling(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note_spelling.cache_clear()
    path = with_learner(tmp_path, given)
    expected = {"name": "adafactor", "weight_decay": 0.02}
    for one in ("learner.weight_decay=0.02", "learner.optimizer.weight_decay=0.02"):
        found = load_run(path, ["learner.optimizer=adafactor", one]).learner.optimizer
        assert found.model_dump() == expected
        found = load_run(path, [one, "learner.optimizer=adafactor"]).learner.optimizer
        assert found.model_dump() == expected
    whole = load_run(path, ["learner={weight_decay: 0.02, optimizer: adafactor}"]).learner
    assert whole.optimizer.model_dump() == expected
    said = capsys.readouterr().err
    assert "the command line: learner.optimizer is learner.optimizer.name now" in said


@pytest.mark.parametrize(
    ("learner", "said"),
    [
        (
            {"optimizer": {"name": "adamw", "eps": 1e-8}, "eps": 1e-8},
            r"learner\.eps is learner\.optimizer\.eps now, and both are given; keep the second",
        ),
        ({"optimizer": "adamv"}, r"learner\.optimizer\.name: .* did you mean 'adamw'"),
        (
            {"optimizer": "adafactor", "betas": [0.8, 0.9]},
            r"learner\.optimizer\.betas: unknown setting; known: name, weight_decay",
        ),
        ({"weight_decay": -1}, r"learner\.optimizer\.weight_decay must be >= 0, got -1"),
        ({"optimizer": ["adamw"]}, r"learner\.optimizer must be a mapping with a name"),
    ],
)
def test_mistakes_with_an_optimiser(learner: dict[str, Any], said: str) -> None:
    data = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    with pytest.raises(UserError, match=said):
        parse_run({**data, "learner": learner})


def count(cls: type[BaseModel], seen: set[tuple[str, str]]) -> None:
    """Adds a class's own settings, and those of its groups; what two groups share counts once."""
    for name, setting in cls.model_fields.items():
        if isinstance(setting.default, BaseModel):
            count(type(setting.default), seen)
        else:
            owner = next(
                c for c in reversed(cls.__mro__) if name in getattr(c, "__annotations__", {})
            )
            seen.add((owner.__name__, name))


def test_the_core_settings_are_few() -> None:
    from rlalign.data.pairs.reader import PreferenceSettings
    from rlalign.data.prompts.base import Prompts

    found: set[tuple[str, str]] = set()
    for cls in (Run, PreferenceSettings, Prompts):
        count(cls, found)
    assert len(found) <= 70, sorted(found)
