"""Which pair comes next, by a reward that ``rlalign fit-reward`` has fitted.

The reward's score of a picture is a sum over the features of its last layer,

    score = sum_d w_d f_d,   f = exp(logit_scale) * image * text,   w = 1 as it was fitted,

so the votes so far say more about w at once, without another fit: their posterior under a Gaussian
around 1 is found by Newton's method whenever some more are there (Laplace 1774; logistic
regression). A pair's predicted probability is the sigmoid of the difference of scores, its features
are the difference of f. ``rlalign.ballots.choose`` makes the choice of them.

Letters: N pairs, D features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlalign.ballots.choose import Information, fisher, gap, pick, uncertain
from rlalign.ballots.deal import Rule as DealRule
from rlalign.ballots.deal import choose_random
from rlalign.ballots.records import Item
from rlalign.ballots.store import Store
from rlalign.core.clips import read_clip
from rlalign.data.pairs.campaign import read_vote_pairs
from rlalign.data.pairs.settings import BallotSettings
from rlalign.voting.pairing import Choice, Group, Pick, pick_random
from rlalign.voting.pictures import PictureFile
from rlalign.voting.settings import Rule, Vote

if TYPE_CHECKING:
    from rlalign.networks.towers import Towers

REFIT_EVERY = 16
"""Votes between two looks at what they say."""
PRIOR = 4.0
"""Inverse variance of each weight around 1."""
SHIPPED = Path(__file__).parents[1] / "assets" / "tiny_reward"
"""The reward for 32x32 shapes that ships with rlalign."""
_UPDATES = 12


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How pairs are chosen: among waiting items, and among a caption's pictures."""

    deal: DealRule = choose_random
    pick: Pick = pick_random
    watch: Callable[[Sequence[PictureFile]], None] = lambda made: None
    """Told of pictures that were made."""
    refresh: Callable[[], None] = lambda: None
    """Takes up the votes that there are since the last time."""


def make_rules(vote: Vote, store: Store) -> Rules:
    """The rules of a campaign. Raises UserError where the reward cannot be loaded."""
    if vote.rule == "random":
        return Rules()
    from rlalign.networks.towers import load_towers

    towers = load_towers(vote.reward or SHIPPED, "reward", "cpu")
    fitted = FittedChoice(
        towers=towers,
        store=store,
        campaign=vote.name,
        rule=vote.rule,
        random_share=vote.shares.random,
    )
    return Rules(deal=fitted.deal, pick=fitted.pick, watch=fitted.watch, refresh=fitted.refresh)


@dataclass(kw_only=True)
class FittedChoice:
    """Choice by a fitted reward. The page asks it from several threads."""

    towers: Towers
    store: Store
    campaign: str
    rule: Rule
    random_share: float
    weights_D: np.ndarray = field(init=False)
    _features: dict[str, np.ndarray] = field(default_factory=dict, init=False)
    """Uid -> (D,)"""
    _information: Information = field(init=False)
    _cursor: int = field(default=0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        dimensions = int(self.towers.texts(["a"]).shape[-1])
        self.weights_D = np.ones(dimensions)
        self._information = Information(dimensions, PRIOR)

    # --- features --------------------------------------------------------------------------------

    def watch(self, made: Sequence[PictureFile]) -> None:
        """Takes up the features of pictures that were made."""
        for one in made:
            uid = one.picture.uid
            if uid not in self._features:
                self._features[uid] = self._of(one.caption, one.content)

    def _of(self, caption: str, content: bytes) -> np.ndarray:
        """(D,) the features of a picture's file under its caption."""
        import torch

        media_BFCHW = torch.from_numpy(read_clip(content)[None]).float() / 255.0
        with torch.no_grad():
            image_D = self.towers.images(media_BFCHW)[0].mean(dim=0)
            text_D = self.towers.texts([caption])[0]
            scale = self.towers.clip.logit_scale.exp()
            return (scale * image_D * text_D).double().numpy()

    def _known(self, caption: str, uid: str) -> np.ndarray:
        if uid not in self._features:
            self._features[uid] = self._of(caption, self.store.content(uid) or b"")
        return self._features[uid]

    # --- the votes -------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Fits the weights anew where there are enough new votes."""
        cursor = self.store.cursor()
        if cursor - self._cursor < REFIT_EVERY:
            return
        settings = BallotSettings(store="unused", campaign=self.campaign)
        pairs = read_vote_pairs(self.store, self.campaign, settings, cursor)
        self._cursor = cursor
        if not pairs:
            return
        difference_ND = np.stack(
            [self._known(p.caption, p.uid_0) - self._known(p.caption, p.uid_1) for p in pairs]
        )
        label_N = np.array([pair.label_0 for pair in pairs])
        weights_D = posterior_mode(difference_ND, label_N)

        # what has been asked is known; what is dealt from now on comes on top
        information = Information(len(weights_D), PRIOR)
        told_N = uncertain(difference_ND @ weights_D)
        for row_D, told in zip(difference_ND, told_N, strict=True):
            information.add(row_D, float(told))
        with self._lock:
            self.weights_D = weights_D
            self._information = information

    # --- choices ---------------------------------------------------------------------------------

    def deal(self, items: Sequence[Item], rng: np.random.Generator) -> tuple[int, float, str]:
        """Which of the waiting items is asked next; a ``rlalign.ballots.deal.Rule``.

        It is asked within a transaction, so features come from memory alone: of an item that was
        made before this process began nothing is known, and it is chosen at random only.
        """
        with self._lock:
            known = [i for i, item in enumerate(items) if self._is_known(item)]
            if not known:
                return choose_random(items, rng)
            difference_ND = np.stack(
                [self._features[items[i].uids[0]] - self._features[items[i].uids[1]] for i in known]
            )
            score_N = np.full(len(items), -np.inf)
            score_N[known] = self._scores(difference_ND)
            found = pick(score_N, self.rule, rng, self.random_share)
            if found.index in known:
                chosen_D = difference_ND[known.index(found.index)]
                self._information.add(chosen_D, float(uncertain(chosen_D @ self.weights_D)))
            return found.index, found.propensity, found.rule

    def _is_known(self, item: Item) -> bool:
        return len(item.uids) == 2 and all(uid in self._features for uid in item.uids)

    def pick(self, group: Group, rng: np.random.Generator) -> Choice:
        """Which two pictures of a caption are compared; a ``Pick``."""
        self.watch(group)
        feature_GD = np.stack([self._features[made.picture.uid] for made in group])
        pairs = [(i, j) for j in range(len(group)) for i in range(j)]
        difference_ND = np.stack([feature_GD[i] - feature_GD[j] for i, j in pairs])
        with self._lock:
            found = pick(self._scores(difference_ND), self.rule, rng, self.random_share)
        first, second = pairs[found.index]
        return Choice(first=first, second=second, rule=found.rule, propensity=found.propensity)

    def _scores(self, difference_ND: np.ndarray) -> np.ndarray:
        """(N,) how much each pair is wanted."""
        margin_N = difference_ND @ self.weights_D
        if self.rule == "uncertain":
            return uncertain(margin_N)
        if self.rule == "gap":
            return gap(margin_N)
        return fisher(margin_N, difference_ND, self._information.inverse_DD)


def sigmoid(logit: Any) -> Any:
    """1 / (1 + exp(-x)), without overflow."""
    return 1.0 / (1.0 + np.exp(-np.clip(logit, -60.0, 60.0)))


def posterior_mode(
    difference_ND: np.ndarray, label_N: np.ndarray, prior: float = PRIOR
) -> np.ndarray:
    """(D,) weights at which the votes' log likelihood, with a Gaussian of inverse variance
    ``prior`` around 1, is largest. A label of 0.5 is half a win for both.

    Newton's method, with the step halved until the objective grows.
    """
    mean_D = np.ones(difference_ND.shape[1])
    weights_D = mean_D.copy()

    def objective(at_D: np.ndarray) -> float:
        logit_N = difference_ND @ at_D
        likelihood = label_N * logit_N - np.logaddexp(0.0, logit_N)
        return float(likelihood.sum() - 0.5 * prior * ((at_D - mean_D) ** 2).sum())

    for _ in range(_UPDATES):
        win_N = sigmoid(difference_ND @ weights_D)
        slope_D = difference_ND.T @ (label_N - win_N) - prior * (weights_D - mean_D)
        curve_DD = (difference_ND * (win_N * (1 - win_N))[:, None]).T @ difference_ND
        step_D = np.linalg.solve(curve_DD + prior * np.eye(len(weights_D)), slope_D)
        share = 1.0
        while share > 1e-4 and objective(weights_D + share * step_D) < objective(weights_D):
            share /= 2
        weights_D = weights_D + share * step_D
        if np.abs(share * step_D).max() < 1e-8:
            break
    return weights_D
