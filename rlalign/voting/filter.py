"""Pictures that nobody is shown: a reward says so before they reach the store."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlalign.core.clips import read_clip
from rlalign.rewards.base import Scorer, score
from rlalign.voting.pictures import PictureFile
from rlalign.voting.settings import Filter


class PictureFilter:
    """Keeps pictures whose score is at least the threshold; one without a score is not shown.

    A clip is scored as a whole. Raises UserError where the reward cannot be loaded.
    """

    def __init__(self, settings: Filter, device: str = "cpu") -> None:
        self.settings = settings
        # one that fails says nothing about the others
        self._reward = settings.reward.model_copy(update={"on_error": "drop"})
        self._scorer: Scorer = settings.reward.load_scorer(device)
        self.held_back = 0
        """Pictures that were not shown so far."""

    def __call__(self, group: Sequence[PictureFile]) -> Sequence[PictureFile]:
        kept = [made for made in group if self._may_be_shown(made)]
        self.held_back += len(group) - len(kept)
        return kept

    def _may_be_shown(self, made: PictureFile) -> bool:
        media_BFCHW = read_clip(made.content)[None]
        found = float(score(self._reward, self._scorer, media_BFCHW, [made.caption])[0])
        return math.isfinite(found) and found >= self.settings.least
