"""The runtime's flat keys of before are read as what they are now, with one note for a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from rlalign.cli import main
from rlalign.config import Run, load_begun, load_run, parse_run
from rlalign.config.spelling import NESTED, nest_path
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


def test_a_run_folder_of_before_is_noted_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(tmp_path, {"rollout_workers": 3})
    assert main(["check", str(path), "rounds=2"]) == 0
    assert capsys.readouterr().err.count("runtime.rollout_workers is") == 1


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
