"""GenEval's rules on made-up detections: thresholds, ties, counts, colours, positions, and what a
record must be."""

from __future__ import annotations

import json

import pytest

from rlalign.core.registry import UserError
from rlalign.rewards._geneval_rules import (
    Detection,
    Limits,
    grade,
    is_correct,
    keep,
    keep_all,
    overlap,
    read_record,
    relations,
)


def thing(left=0, top=0, right=10, bottom=10, score=0.95):
    return Detection(score, (float(left), float(top), float(right), float(bottom)))


def record(*include, exclude=(), tag="single_object"):
    """Clauses as in the published file, through JSON as they come."""
    made = {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "a photo"}
    return read_record(json.loads(json.dumps(made)), "rewards.geneval", "a photo")


def no_colours(class_name, some):
    raise AssertionError("no colour was asked for")


def painted(*colours):
    """Reads these colours, in the order of the detections."""
    return lambda class_name, some: list(colours)[: len(some)]


def verdicts(made, found, colours=no_colours):
    """(GenEval's verdict, strict verdict, graded score)."""
    return is_correct(made, found, colours, 0.1), *grade(made, found, colours, 0.1)


# --- which detections count ----------------------------------------------------------------------


def test_a_confidence_must_exceed_the_threshold():
    some = [thing(score=s) for s in (0.3, 0.31, 0.2)]
    assert [one.score for one in keep(some, 0.3, Limits())] == [0.31]


@pytest.mark.parametrize(("tag", "kept"), [("counting", [0.95]), ("two_object", [0.95, 0.9, 0.5])])
def test_counting_asks_for_surer_ones(tag, kept):
    found = {"cow": [thing(score=s) for s in (0.5, 0.95, 0.9)], "cat": [thing(score=0.1)]}
    made = keep_all(found, tag, Limits())
    assert list(made) == ["cow"], "a class without any is not there"
    assert [one.score for one in made["cow"]] == kept


def test_the_surest_sixteen_are_kept_and_of_equals_the_later_first():
    some = [thing(left=i, score=0.5) for i in range(20)]
    made = keep(some, 0.3, Limits())
    assert [one.box[0] for one in made] == list(range(19, 3, -1))


def test_overlapping_ones_are_kept_unless_it_is_asked_for():
    a, b, c = thing(0, 0, 9, 9, 0.9), thing(0, 0, 9, 8, 0.8), thing(20, 20, 29, 29, 0.7)
    assert overlap(a.box, b.box) == pytest.approx(0.9)
    assert keep([a, b, c], 0.3, Limits()) == [a, b, c]
    assert keep([a, b, c], 0.3, Limits(max_overlap=0.9)) == [a, c], "from the limit on it is one"
    assert keep([a, b, c], 0.3, Limits(max_overlap=0.91)) == [a, b, c]


def test_the_overlap_counts_the_last_pixel():
    assert overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 1.0
    assert overlap((0, 0, 9, 9), (10, 0, 19, 9)) == 0.0
    assert overlap((0, 0, 9, 9), (9, 9, 18, 18)) == pytest.approx(1 / 199)


# --- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (-50, 0, {"left of"}),
        (50, 0, {"right of"}),
        (0, -50, {"above"}),
        (0, 50, {"below"}),
        (-50, -50, {"left of", "above"}),
        (-50, 20, {"left of"}),
        (0, 0, set()),
    ],
)
def test_where_one_is_to_another(x, y, said):
    assert relations(thing(x, y, x + 10, y + 10), thing(), 0.1) == said


def test_an_offset_within_a_tenth_of_both_sizes_says_nothing():
    """Two of 10 pixels: the offset is shortened by 2, and what is left must exceed half of it."""
    b = thing()
    assert relations(thing(2, 0, 12, 10), b, 0.1) == set()
    assert relations(thing(4, 0, 14, 10), b, 0.1) == set(), "exactly half"
    assert relations(thing(4.1, 0, 14.1, 10), b, 0.1) == {"right of"}
    assert relations(thing(2, 0, 12, 10), b, 0.0) == {"right of"}


def test_the_sizes_are_each_axis_own():
    wide, high = thing(0, 0, 100, 10), thing(0, 0, 10, 100)
    moved = Detection(0.9, (60.0, 60.0, 70.0, 70.0))
    assert relations(moved, wide, 0.1) == {"below"}
    assert relations(moved, high, 0.1) == {"right of"}


# --- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (0, (False, False, 0.0)),
        (1, (False, False, 0.5)),
        (2, (True, True, 1.0)),
        (3, (True, False, 0.5)),
        (5, (True, False, -0.5)),
    ],
)
def test_a_number_of_objects(seen, expected):
    made = record({"class": "cow", "count": 2})
    assert verdicts(made, {"cow": [thing()] * seen}) == expected


def test_one_too_many_is_excluded_where_the_record_says_so():
    made = record(
        {"class": "cow", "count": 2}, exclude=[{"class": "cow", "count": 3}], tag="counting"
    )
    assert verdicts(made, {"cow": [thing()] * 2}) == (True, True, 1.0)
    assert verdicts(made, {"cow": [thing()] * 3}) == (False, False, 0.5)


def test_every_object_must_be_there():
    made = record({"class": "cow", "count": 1}, {"class": "cat", "count": 1}, tag="two_object")
    assert verdicts(made, {"cow": [thing()], "cat": [thing()]}) == (True, True, 1.0)
    assert verdicts(made, {"cow": [thing()]}) == (False, False, 0.5)


def test_a_colour_is_that_of_the_surest_ones():
    made = record({"class": "cow", "count": 1, "color": "red"}, tag="colors")
    one, two = {"cow": [thing()]}, {"cow": [thing(), thing(score=0.4)]}
    assert verdicts(made, one, painted("red")) == (True, True, 1.0)
    assert verdicts(made, one, painted("blue")) == (False, False, 0.5)
    assert verdicts(made, two, painted("red", "blue")) == (True, False, 0.0)
    assert verdicts(made, two, painted("blue", "red")) == (False, False, 0.0)
    assert verdicts(made, {}, no_colours) == (False, False, 0.0)


def test_colours_are_bound_to_their_objects():
    made = record(
        {"class": "cow", "count": 1, "color": "red"},
        {"class": "cat", "count": 1, "color": "blue"},
        tag="color_attr",
    )
    found = {"cow": [thing()], "cat": [thing()]}
    right = {"cow": ["red"], "cat": ["blue"]}
    swapped = {"cow": ["blue"], "cat": ["red"]}
    assert verdicts(made, found, lambda name, _: right[name]) == (True, True, 1.0)
    assert verdicts(made, found, lambda name, _: swapped[name]) == (False, False, 0.5)


def test_two_of_a_colour():
    made = record({"class": "cow", "count": 2, "color": "red"})
    found = {"cow": [thing(), thing()]}
    assert verdicts(made, found, painted("red", "red")) == (True, True, 1.0)
    assert verdicts(made, found, painted("red", "blue")) == (False, False, 0.75)


POSITION = ({"class": "cat", "count": 1}, {"class": "cow", "count": 1, "position": ["left of", 0]})


def test_a_position_refers_to_an_object_before():
    made = record(*POSITION, tag="position")
    left, right = thing(0, 0, 10, 10), thing(50, 0, 60, 10)
    assert verdicts(made, {"cat": [right], "cow": [left]}) == (True, True, 1.0)
    # the graded score has the wrong position as 0 and as 1
    assert verdicts(made, {"cat": [left], "cow": [right]}) == (False, False, 0.75)
    # nothing to stand beside: 0, 1 and 0
    assert verdicts(made, {"cow": [left]}) == (False, False, pytest.approx(1 / 3))
    # nothing that stands: 1, 0 and 0
    assert verdicts(made, {"cat": [left]}) == (False, False, pytest.approx(1 / 3))


def test_every_one_of_several_must_stand_so():
    made = record(
        {"class": "cat", "count": 2}, {"class": "cow", "count": 1, "position": ["left of", 0]}
    )
    cats = [thing(50, 0, 60, 10), thing(-50, 0, -40, 10)]
    assert verdicts(made, {"cat": cats, "cow": [thing()]}) == (False, False, 0.75)


def test_a_wrong_colour_leaves_the_position_out():
    made = record(
        {"class": "cat", "count": 1},
        {"class": "cow", "count": 1, "color": "red", "position": ["left of", 0]},
    )
    found = {"cat": [thing(50, 0, 60, 10)], "cow": [thing()]}
    assert verdicts(made, found, painted("blue")) == (False, False, pytest.approx(2 / 3))


# --- records -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({}, "'two cows' has no record"),
        ({"include": [{"class": "cow", "count": 1}]}, "record.tag is required"),
        ({"tag": "counting"}, "record.include is required"),
        ({"tag": "counting", "include": []}, "record.include must hold at least 1"),
        ({"tag": "x", "include": [{"count": 1}]}, "record.include.0.class is required"),
        ({"tag": "x", "include": [{"class": "cow", "count": 0}]}, "include.0.count must be >= 1"),
        ({"tag": "x", "include": [{"class": "cow", "count": "2"}]}, "include.0.count must be"),
        (
            {"tag": "x", "include": [{"class": "cow", "count": 1, "color": "teal"}]},
            "include.0.color must be 'red'",
        ),
        (
            {"tag": "x", "include": [{"class": "cow", "count": 1, "position": ["left of", 0]}]},
            "must refer to an object that comes before",
        ),
        (
            {"tag": "x", "include": [{"class": "cow", "count": 1, "position": ["beside", 0]}]},
            "include.0.position.0 must be 'left of'",
        ),
    ],
)
def test_a_record_that_is_wrong_names_the_prompt_and_the_part(made, said):
    with pytest.raises(UserError, match="rewards.geneval: the prompt 'two cows'") as caught:
        read_record(made, "rewards.geneval", "two cows")
    assert said in str(caught.value)


def test_a_record_of_a_table_has_null_where_a_line_of_json_has_nothing():
    clause = {"class": "cow", "count": 1, "color": None, "position": None}
    made = read_record({"tag": "x", "include": [clause], "exclude": None}, "here", "a cow")
    assert verdicts(made, {"cow": [thing()]}) == (True, True, 1.0)
