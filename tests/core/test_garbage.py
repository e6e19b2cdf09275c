"""Garbage is not looked for while it is paused, and is as before afterwards."""

from __future__ import annotations

import gc

import pytest

from rlalign.core.garbage import pause_collection


@pytest.fixture(autouse=True)
def enabled():
    yield
    gc.enable()


def test_it_is_looked_for_again_afterwards():
    with pause_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_inside_leaves_it_as_it_was():
    with pytest.raises(KeyError), pause_collection():
        raise KeyError
    assert gc.isenabled()


def test_who_has_paused_it_finds_it_paused():
    gc.disable()
    with pause_collection():
        pass
    assert not gc.isenabled()
