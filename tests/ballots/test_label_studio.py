"""Label Studio's exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlalign.ballots.label_studio import Fields, Judgement, read_judgements
from rlalign.core.registry import UserError


def task(*annotations: dict[str, Any], **data: object) -> dict[str, Any]:
    return {
        "id": 7,
        "data": {"prompt": "a caption", "image1": "l.png", "image2": "r.png", **data},
        "annotations": list(annotations),
        "predictions": [],
    }


def annotation(*result: dict[str, Any], **other: object) -> dict[str, Any]:
    return {
        "id": 1001,
        "completed_by": 10,
        "result": list(result),
        "was_cancelled": False,
        "created_at": "2021-03-09T22:16:08.728353Z",
        "lead_time": 4.288,
        **other,
    }


def pairwise(selected: str) -> dict[str, Any]:
    return {
        "id": "Dx_aB91ISN",
        "from_name": "pw",
        "to_name": "image1,image2",
        "type": "pairwise",
        "value": {"selected": selected},
    }


def choices(*chosen: str) -> dict[str, Any]:
    value = {"choices": list(chosen)}
    return {"from_name": "tie", "to_name": "image1", "type": "choices", "value": value}


def write(folder: Path, content: object) -> Path:
    path = folder / "export.json"
    path.write_text(json.dumps(content))
    return path


def test_annotations_are_judgements(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [
            task(
                annotation(pairwise("left")),
                annotation(pairwise("right"), completed_by={"id": 3, "email": "a@b.c"}),
                annotation(choices("Tie"), lead_time=None, created_at=None),
                annotation(pairwise("left"), was_cancelled=True),
                annotation(),
                annotation(choices("looks")),
            )
        ],
    )
    first, second, third = read_judgements(path)
    assert first == Judgement(
        task="7",
        annotator="10",
        caption="a caption",
        left="l.png",
        right="r.png",
        outcome="left",
        at=pytest.approx(1615328168.728353),  # type: ignore[arg-type]
        decide_ms=4288.0,
    )
    assert (second.outcome, second.annotator) == ("right", "3")
    assert (third.outcome, third.at, third.decide_ms) == ("tie", 0.0, 0.0)


def test_fields_have_the_names_of_the_configuration(tmp_path: Path) -> None:
    path = write(tmp_path, [task(annotation(pairwise("left")), text="another", a="x", b="y")])
    (one,) = read_judgements(path, Fields(caption="text", left="a", right="b"))
    assert (one.caption, one.left, one.right) == ("another", "x", "y")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"tasks": []}, "list of tasks"),
        ([{"id": 1}], "task 0 must have data"),
        ([task(image2="")], "text under 'image2'"),
        ([{"data": {"promt": "x"}}], "did you mean 'promt'"),
        ([{**task(), "annotations": 3}], "list of annotations"),
    ],
)
def test_what_is_no_export_is_one_message(tmp_path: Path, content: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        list(read_judgements(write(tmp_path, content)))
    (tmp_path / "broken.json").write_text("[1,")
    with pytest.raises(UserError, match="export of Label Studio as JSON"):
        list(read_judgements(tmp_path / "broken.json"))
