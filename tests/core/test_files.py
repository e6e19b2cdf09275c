"""Text that a user gives: UTF-8 with or without a mark, newlines alone, and JSON's escapes as one
character each."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.core.files import (
    UnreadableText,
    dump_json,
    join_surrogates,
    read_text,
    replacing,
    split_lines,
    write_whole,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text") / "file.txt"


@given(text=TEXT, marked=st.booleans())
def test_what_was_written_comes_back_with_or_without_a_mark(
    file: Path, text: str, marked: bool
) -> None:
    file.write_bytes(text.encode("utf-8-sig" if marked else "utf-8"))
    assert read_text(file) == (text if marked else text.removeprefix("\ufeff"))


@given(TEXT)
def test_lines_are_those_of_pythons_text_files(text: str) -> None:
    expected = [
        line.removesuffix("\n").removeprefix("\ufeff") for line in io.StringIO(text, newline=None)
    ]
    found = split_lines(text)
    assert found == expected or found == [*expected, ""]


@given(TEXT)
def test_what_json_escapes_is_joined(text: str) -> None:
    escaped = json.dumps(text)
    halves = "".join(chr(unit) for unit in _units(text))
    assert join_surrogates(halves) == text == json.loads(escaped)


def _units(text: str) -> list[int]:
    """The 16-bit units of a text, as JSON's escapes name them one by one."""
    encoded = text.encode("utf-16-le")
    return [int.from_bytes(encoded[i : i + 2], "little") for i in range(0, len(encoded), 2)]


@pytest.mark.parametrize("half", ["\ud83d", "\ude00\ud83d", "a \ud83d b \ud83d\ude00"])
def test_half_a_pair_is_refused(half: str) -> None:
    with pytest.raises(
        UnreadableText,
        match=r"^\\u[0-9a-f]{4} is half of a surrogate pair, which no text can hold$",
    ):
        join_surrogates(half)


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "no.txt")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    write_whole(file, "one")
    write_whole(file, "zwei, drei: \u00fc")
    assert file.read_text(encoding="utf-8") == "zwei, drei: \u00fc"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_is_replaced_whole_and_stays_where_writing_fails(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    for name in ("old", "new"):
        with replacing(folder) as scratch:
            scratch.mkdir()
            (scratch / name).touch()
    with pytest.raises(FileNotFoundError), replacing(folder) as scratch:
        (scratch / "file").touch()
    assert list(tmp_path.rglob("*")) == [folder, folder / "new"]


def test_json_has_null_for_what_is_not_finite() -> None:
    content = {"a": [1.0, float("nan"), (float("inf"), 2)], "b": {"c": -float("inf")}}
    assert json.loads(dump_json(content)) == {"a": [1.0, None, [None, 2]], "b": {"c": None}}
