"""The samples of an evaluation that changed most since the first one: their pictures, before and
after.

``samples/base.png`` keeps every picture of the first evaluation (the first ``MOST_PROMPTS``, of
clips ``MOST_CLIPS``), so that a run that goes on in another process can still compare.
``samples/round-00010-changes.png`` has pairs of pictures, before and after, of the largest gains
and then of the largest losses. Clips lie beside both, in the folders of their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from rlalign.core.pictures import Cell, read_grid, shrink, write_grid
from rlalign.core.records import Scored, prompts_of
from rlalign.learning.evaluate import collect_scores, media_of

LARGEST = 10
"""Gains, and as many losses."""
MOST_PROMPTS = 512
MOST_CLIPS = 128
_COLUMNS = 10


def write_base(folder: Path, scored: Sequence[Scored]) -> Path:
    """Keeps the first evaluation's pictures with their total rewards."""
    path = folder / "samples" / "base.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    media = media_of(scored)
    most = MOST_PROMPTS if media.shape[1] == 1 else MOST_CLIPS
    captions = prompts_of(s.unit for s in scored)[:most]
    scores = collect_scores(scored, "total")[:most].tolist()
    write_grid(path, media[:most], captions, scores, columns=16)
    return path


def write_changes(folder: Path, round: int, scored: Sequence[Scored]) -> Path | None:
    """The largest gains and losses of an evaluation; None where the first one is not there (or is
    of other sizes), or where nothing changed."""
    base_file = folder / "samples" / "base.png"
    base = read_grid(base_file) if base_file.is_file() else []
    before_N = np.array([np.nan if cell.score is None else cell.score for cell in base])
    after_N = collect_scores(scored, "total")[: len(base)].astype(np.float64)
    chosen = choose_changes(after_N - before_N)
    if not chosen:
        return None

    # before and after, side by side; a clip whose file is gone has too few frames
    media = shrink(media_of(scored)[chosen])
    before = [base[i].media_FCHW for i in chosen]
    if any(one.shape != media.shape[1:] for one in before):
        return None
    captions = [caption for i in chosen for caption in (base[i].caption,) * 2]
    scores = [score for i in chosen for score in (before_N[i], after_N[i])]
    pictures = np.stack(list(chain(*zip(before, media, strict=True))))
    path = changes_file(folder, round)
    title = f"largest gains, then largest losses, since the first evaluation: round {round}"
    rate = base[chosen[0]].rate
    write_grid(path, pictures, captions, scores, columns=_COLUMNS, title=title, rate=rate)
    return path


def choose_changes(gain_N: np.ndarray) -> list[int]:
    """Numbers of the samples with the largest gains, the largest first, then of those with the
    largest losses. What did not change, or has no score, is neither."""
    known_N = np.where(np.isfinite(gain_N), gain_N, 0.0)
    order = np.argsort(-known_N, kind="stable").tolist()
    gains = [i for i in order if known_N[i] > 0][:LARGEST]
    losses = [i for i in reversed(order) if known_N[i] < 0][:LARGEST]
    return gains + losses


def changes_file(folder: Path, round: int) -> Path:
    """Where the changes of an evaluation lie."""
    return folder / "samples" / f"round-{round:05d}-changes.png"


def read_changes(folder: Path, round: int) -> list[tuple[Cell, Cell]]:
    """(before, after) of each sample in ``write_changes``'s order; none where there is no such
    file."""
    path = changes_file(folder, round)
    cells = read_grid(path) if path.is_file() else []
    return list(zip(cells[::2], cells[1::2], strict=True))
