"""A callable of the user's as a reward. The callables below are what a user might write, mistakes
included."""

from __future__ import annotations

import math
import pickle
import sys

import numpy as np
import pytest
import torch

from rlalign.core.registry import UserError, build
from rlalign.rewards.base import score
from rlalign.rewards.function import Function

MEDIA = np.stack([np.full((1, 3, 2, 2), v, dtype=np.uint8) for v in (0, 51, 255)])
PROMPTS = ["a", "bb", "ccc"]

SOURCE = """
import numpy as np
import torch

class Scores:
    @staticmethod
    def length(media, prompts):
        return [len(p) for p in prompts]

    def __call__(self, media, prompts):
        return [1.0] * len(prompts)

instance = Scores()
NUMBER = 3

def as_list(media, prompts): return [float(m.mean()) for m in media]
def as_tensor(media, prompts): return media.mean((1, 2, 3, 4)).requires_grad_()
def as_tensors(media, prompts): return [m.mean().requires_grad_() for m in media]
def as_array(media, prompts): return np.array([float(m.mean()) for m in media])
def scaled(media, prompts, *, factor): return factor * media.mean((1, 2, 3, 4))
def too_few(media, prompts): return [1.0]
def a_matrix(media, prompts): return np.zeros((len(prompts), 1))
def a_number(media, prompts): return 1.0
def nothing(media, prompts): return None
def words(media, prompts): return prompts
def ragged(media, prompts): return [[1.0], [1.0, 2.0], []]
def one_missing(media, prompts): return [1.0, float("nan"), 3.0]
def fails_on_bb(media, prompts):
    if "bb" in prompts:
        raise RuntimeError("not bb")
    return [len(p) for p in prompts]
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """``my_scores`` on the path, as a user's own module is."""
    (tmp_path / "my_scores.py").write_text(SOURCE)
    (tmp_path / "my_broken.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_scores", None)


def scores(function, **settings):
    reward = build("rewards", {"name": "function", "call": f"my_scores:{function}", **settings})
    return score(reward, reward.load("cpu"), MEDIA, PROMPTS)


@pytest.mark.parametrize("function", ["as_list", "as_tensor", "as_tensors", "as_array"])
def test_lists_arrays_and_tensors_are_scores(function):
    found = scores(function)
    np.testing.assert_allclose(found, [0.0, 0.2, 1.0], rtol=1e-6)
    assert found.dtype == np.float32


def test_the_prompts_arrive():
    assert scores("Scores.length").tolist() == [1, 2, 3]


def test_anything_that_can_be_called_will_do():
    assert scores("instance").tolist() == [1, 1, 1]


def test_arguments_are_passed():
    np.testing.assert_allclose(scores("scaled", arguments={"factor": 10}), [0, 2, 10], rtol=1e-6)


def test_no_gradient_passes():
    scorer = Function(call="my_scores:as_tensor").load("cpu")
    assert not Function.differentiable
    assert not scorer(torch.rand(3, 1, 3, 2, 2), PROMPTS).requires_grad


def test_failed_scores_follow_the_policy():
    with pytest.raises(UserError, match=r"rewards\.function returned nan for 'bb'"):
        scores("one_missing")
    assert math.isnan(scores("one_missing", on_error="drop")[1])
    assert scores("one_missing", on_error=-1.0).tolist() == [1, -1, 3]
    with pytest.raises(RuntimeError, match="not bb"):
        scores("fails_on_bb")
    assert scores("fails_on_bb", on_error=0.0).tolist() == [1, 0, 3]


@pytest.mark.parametrize(
    "call", ["my_scores", "my_scores:", ":as_list", "my scores:as_list", "my_scores:as_list()", ""]
)
def test_a_call_names_module_and_function(call):
    with pytest.raises(
        UserError, match=r"^rewards\[0\]\.call must read package\.module:function, got "
    ):
        build("rewards", {"name": "function", "call": call}, "rewards[0]")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("my_skores:as_list", r"rewards\.mine\.call: cannot import 'my_skores' .*PYTHONPATH"),
        (
            "my_broken:as_list",
            r"rewards\.mine\.call: cannot import 'my_broken' .*a_library_that_is_not_there",
        ),
        (
            "my_scores:as_lisst",
            r"rewards\.mine\.call: 'my_scores' has no 'as_lisst'; write package\.module:function",
        ),
        (
            "my_scores:NUMBER",
            (
                r"rewards\.mine\.call must name something that can be called, got"
                r" 'my_scores:NUMBER', a int"
            ),
        ),
    ],
)
def test_what_is_not_there_is_said_when_it_loads(call, message):
    reward = build("rewards", {"name": "function", "call": call, "label": "mine"})
    with pytest.raises(UserError, match=message):
        reward.load("cpu")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("too_few", r"a list of shape \(1,\)"),
        ("a_matrix", r"a ndarray of shape \(3, 1\)"),
        ("a_number", r"a float of shape \(\)"),
        ("nothing", r"a NoneType"),
        ("words", r"a list \(could not convert"),
        ("ragged", r"a list \("),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "drop", 0.0])
def test_what_is_not_b_numbers_is_an_error_under_every_policy(function, message, on_error):
    place = (
        rf"^rewards\.function: my_scores:{function} must return 3 numbers, one per picture, got "
    )
    with pytest.raises(UserError, match=place + message):
        scores(function, on_error=on_error)


def test_the_recipe_travels():
    reward = build(
        "rewards", {"name": "function", "call": "my_scores:scaled", "arguments": {"factor": 2}}
    )
    assert pickle.loads(pickle.dumps(reward)) == reward
