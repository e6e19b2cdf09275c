"""Resampling keeps expectations; sizes stay in their bounds; lineage is the composition of
parents."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from rlalign.engine.particles import (
    Scheme,
    effective_size,
    log_mean_exp,
    normalise,
    resample,
    roots,
)

WEIGHTS = np.array([0.35, 0.0, 0.05, 0.2, 0.1, 0.17, 0.13])
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_particle_has_n_times_its_weight_of_children_in_expectation(scheme: Scheme) -> None:
    rng, draws, count = np.random.default_rng(0), 4000, len(WEIGHTS)
    children_DN = np.array(
        [np.bincount(resample(WEIGHTS, rng, scheme), minlength=count) for _ in range(draws)]
    )
    assert (children_DN.sum(axis=1) == count).all()
    # a number of children has a variance of at most N w (1 - w) < 1.6: four standard errors are
    # below 0.08
    np.testing.assert_allclose(children_DN.mean(axis=0), count * WEIGHTS, atol=0.08)
    if scheme in ("systematic", "ssp"):
        assert (np.abs(children_DN - count * WEIGHTS) < 1.0).all()
    if scheme == "residual":
        assert (children_DN >= np.floor(count * WEIGHTS)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_weights_and_a_single_heavy_one(scheme: Scheme) -> None:
    rng = np.random.default_rng(1)
    if scheme != "multinomial":
        np.testing.assert_array_equal(resample(np.full(5, 0.2), rng, scheme), np.arange(5))
    np.testing.assert_array_equal(resample(np.array([0.0, 1.0, 0.0]), rng, scheme), [1, 1, 1])


def test_effective_size_is_between_one_and_n() -> None:
    assert effective_size(np.array([[0.25] * 4]))[0] == 4.0
    assert effective_size(np.array([[1.0, 0.0, 0.0]]))[0] == 1.0
    w = normalise(np.random.default_rng(2).normal(size=(50, 8)) * 3.0)
    assert ((effective_size(w) >= 1.0) & (effective_size(w) <= 8.0)).all()


def test_weights_and_evidence_survive_large_numbers_and_nothing_at_all() -> None:
    log_w = np.array([[-1e5, -1e5 + np.log(3.0)], [-np.inf, -np.inf], [np.nan, 0.0]])
    np.testing.assert_allclose(normalise(log_w), [[0.25, 0.75], [0.5, 0.5], [0.0, 1.0]])
    np.testing.assert_allclose(log_mean_exp(log_w[:1]), [-1e5 + np.log(2.0)])
    assert log_mean_exp(log_w[1:2])[0] == -np.inf


def test_roots_compose_parents() -> None:
    first, second = np.array([[0, 0, 2]]), np.array([[2, 1, 1]])
    np.testing.assert_array_equal(roots([first, second], 3), [[2, 0, 0]])
    np.testing.assert_array_equal(roots([], 3), [[0, 1, 2]])
