"""A thousand malformed run files: each is read, or refused in one message that names a place;
nothing else ever happens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlalign.config import Run, load_run, resolved
from rlalign.core.registry import UserError
from tests.runs import CONFIGS

BASE: dict[str, Any] = resolved(load_run(CONFIGS / "quickstart.yaml", []))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
NAMES = st.sampled_from(
    ["name", "lr", "shapes", "ddpo", "tiny", "rounds", "policy", "weight"]
) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested settings."""
    parts = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return (
        [path, *(place for key, part in parts for place in places(part, (*path, key)))]
        if parts
        else [path]
    )


PLACES = [place for place in places(BASE) if place]


def many(count: int) -> settings:
    """So many examples, the same ones each time, however slow the machine."""
    return settings(
        max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


def reads_or_refuses(path: Path, overrides: list[str] | None = None) -> None:
    try:
        run = load_run(path, overrides or [])
    except UserError as error:
        message = str(error)
        assert message
        assert "Traceback" not in message
        assert len(message) < 3000
    else:
        assert isinstance(run, Run)


def replaced(place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The base settings with one place changed."""
    data = copy.deepcopy(BASE)
    target: Any = data
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return data


@pytest.mark.slow
@many(400)
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_any_value_at_any_place(place: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(replaced(place, value), allow_unicode=True),
        encoding="utf-8",
        errors="replace",
    )
    reads_or_refuses(path)


@pytest.mark.slow
@many(200)
@given(place=st.sampled_from(PLACES), key=NAMES, value=VALUES)
def test_any_key_more_or_less(place: tuple[Any, ...], key: str, value: Any, tmp_path: Path) -> None:
    data = copy.deepcopy(BASE)
    target: Any = data
    for part in place[:-1]:
        target = target[part]
    if isinstance(target, dict):
        target.pop(place[-1])
        target[key] = value
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8", errors="replace")
    reads_or_refuses(path)


@many(200)
@given(
    blob=st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))
)
def test_any_bytes(blob: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(blob)
    reads_or_refuses(path)


TEXT = (CONFIGS / "quickstart.yaml").read_text()


@many(200)
@given(start=st.integers(0, len(TEXT)), length=st.integers(0, 40), text=st.text(max_size=10))
def test_a_hole_or_a_scribble_anywhere(start: int, length: int, text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        TEXT[:start] + text + TEXT[start + length :], encoding="utf-8", errors="replace"
    )
    reads_or_refuses(path)


@many(200)
@given(
    overrides=st.lists(
        st.text(max_size=30)
        | st.tuples(st.sampled_from(PLACES), st.text(max_size=12)).map(
            lambda p: ".".join(map(str, p[0])) + "=" + p[1]
        ),
        max_size=3,
    )
)
def test_any_override(overrides: list[str]) -> None:
    reads_or_refuses(CONFIGS / "quickstart.yaml", overrides)
