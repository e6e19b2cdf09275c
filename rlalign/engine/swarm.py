"""Groups of weighted particles on their way through a chain."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from rlalign.core.records import Unit
from rlalign.diffusion.noise import row_generator
from rlalign.engine.base import NoScore
from rlalign.engine.particles import (
    Scheme,
    effective_size,
    log_mean_exp,
    normalise,
    resample,
    roots,
)


def flat_rows(index_BN: np.ndarray) -> np.ndarray:
    """(B * N,) rows of particles side by side, of (B, N) places within their groups of N."""
    return (index_BN + np.arange(len(index_BN))[:, None] * index_BN.shape[1]).ravel()


class Swarm:
    """N particles for each of B pictures: latents, log weights, evidence, lineage. Resampling is
    keyed by picture and step."""

    def __init__(
        self, unit: Unit, x: torch.Tensor, count: int, scheme: Scheme, threshold: float
    ) -> None:
        """``x`` (B * N, C, H, W) in groups of ``count``; ``threshold`` is the share of N below
        which a group resamples."""
        self.unit, self.x, self.count = unit, x, count
        self._scheme: Scheme = scheme
        self._threshold = threshold
        self.log_w_BN = np.zeros((len(unit.prompts), count))
        self.log_evidence_B = np.zeros(len(unit.prompts))
        self.sizes: list[float] = []
        """Effective sample size, mean over pictures, at each weighing."""
        self._parents: list[np.ndarray] = []
        self._last_BN = np.zeros_like(self.log_w_BN)

    def fill_missing(self, reward_BN: np.ndarray) -> np.ndarray:
        """Rewards in which a missing one takes its particle's weight away; NoScore where a picture
        has none at all."""
        finite_BN = np.isfinite(reward_BN)
        empty = np.flatnonzero(~finite_BN.any(axis=1))
        if len(empty):
            raise NoScore(
                f"the rewards gave no score for any of the {self.count} particles of picture"
                f" {int(empty[0]) + 1}",
                self.x,
            )
        self.log_w_BN = np.where(finite_BN, self.log_w_BN, -np.inf)
        return np.where(
            finite_BN,
            reward_BN,
            np.nanmin(np.where(finite_BN, reward_BN, np.nan), axis=1, keepdims=True),
        )

    def weigh(self, gain_BN: np.ndarray) -> None:
        """Multiplies the weights by exp(gain)."""
        self.log_w_BN = self.log_w_BN + gain_BN
        self.sizes.append(float(effective_size(normalise(self.log_w_BN)).mean()))

    def resample(self, k: int) -> np.ndarray | None:
        """(B, N) parents where some group resampled (the others keep themselves), with ``x`` and
        weights moved; else None."""
        w_BN = normalise(self.log_w_BN)
        parents = np.tile(np.arange(self.count), (len(self.log_w_BN), 1))
        equal_B = np.ptp(w_BN, axis=1) < 1e-12
        low_B = (effective_size(w_BN) < self._threshold * self.count) | (self._threshold >= 1.0)
        chosen = np.flatnonzero(low_B & ~equal_B)
        if not len(chosen):
            return None
        for b in chosen.tolist():
            rng = row_generator(self.unit, b, "resample", k)
            parents[b] = resample(w_BN[b], rng, self._scheme)
            self.log_evidence_B[b] += log_mean_exp(self.log_w_BN[b : b + 1])[0]
            self.log_w_BN[b] = 0.0
        self.x = self.x[torch.from_numpy(flat_rows(parents))]
        self._parents.append(parents)
        return parents

    def finish(self, reward_BN: np.ndarray) -> None:
        """The chain has ended with these rewards."""
        self.log_evidence_B = self.log_evidence_B + log_mean_exp(self.log_w_BN)
        self._last_BN = reward_BN

    @property
    def weights_BN(self) -> np.ndarray:
        """Normalised weights."""
        return normalise(self.log_w_BN)

    @property
    def roots_BN(self) -> np.ndarray:
        """(B, N) which first particle each descends from."""
        found = roots(self._parents, self.count)
        return np.broadcast_to(found, self.log_w_BN.shape).copy()

    def choose(self, keep: Literal["best", "weighted"]) -> np.ndarray:
        """(B,) the particle that is the picture: of the largest reward, or drawn by weight. Equal
        ones: the first."""
        alive_BN = np.isfinite(self.log_w_BN)
        best_B = np.where(alive_BN, self._last_BN, -np.inf).argmax(axis=1)
        if keep == "best":
            return best_B
        drawn = []
        for b, w_N in enumerate(self.weights_BN):
            rng = row_generator(self.unit, b, "keep")
            drawn.append(0 if np.ptp(w_N) < 1e-12 else int(rng.choice(len(w_N), p=w_N)))
        return np.array(drawn)
