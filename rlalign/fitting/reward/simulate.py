"""Simulated pairs: a policy's own samples of one prompt, and drawn scenes, ordered by a utility
that the model never sees."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlalign.core.progress import Report
from rlalign.core.prompts import dump_record, record_of
from rlalign.core.records import Unit, prompts_of
from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import write_pairs
from rlalign.data.pairs.ranking import encode_media, facts_of_clips
from rlalign.data.prompts.base import prompt_id
from rlalign.data.shapes import (
    PALETTE,
    PLURALS,
    RELATIONS,
    Group,
    Scene,
    draw,
    parse_caption,
    random_scene,
    split_of,
)
from rlalign.diffusion.noise import generator
from rlalign.engine import Rewards
from rlalign.engine.local import LiveRewards, LocalEngine
from rlalign.engine.pieces import Pictures
from rlalign.fitting.reward.settings import FitReward, Simulate

_CHUNK = 256
"""Drawn pairs that are scored at once."""


def simulate_pairs(config: FitReward, file: Path, report: Report) -> None:
    """Writes the run's simulated pairs as Parquet. Which pairs and which labels depends on
    (settings, seed) alone."""
    simulate = config.simulate
    assert simulate is not None
    scorers = {reward.title: reward.load_scorer(config.device) for reward in simulate.utility}
    utility = LiveRewards(simulate.utility, scorers=scorers, strict=True)
    drawn = round(simulate.drawn * simulate.pairs)
    rows = [
        *_sampled(config, simulate, utility, simulate.pairs - drawn, report),
        *_drawn(config, utility, drawn, report),
    ]
    # every row of a file has the same columns
    if any("record" in row for row in rows):
        rows = [{"record": "{}", **row} for row in rows]
    order = generator("fit-reward", config.seed, "mix").permutation(len(rows))
    write_pairs(file, (rows[i] for i in order))


def _sampled(
    config: FitReward, simulate: Simulate, utility: Rewards, count: int, report: Report
) -> Iterator[dict[str, Any]]:
    """Pairs of samples of one prompt, each with each, in unit order."""
    units = _units(config, simulate, count)
    if not units:
        return

    # the utility is taken here, unit by unit, and not in the lanes
    engine = LocalEngine.with_lanes(
        simulate.policy.load(config.device),
        lambda: LiveRewards(()),
        workers=simulate.lanes,
        rows=len(units[0].prompts),
        threads=1 if config.device == "cpu" else torch.get_num_threads(),
    )
    works = deque(engine.submit(Pictures(unit=unit, version=0)) for unit in units)

    # units in their order, whatever lane has made them
    made = 0
    has_records = any(map(record_of, prompts_of(units)))
    source = {"model_0": simulate.policy.name, "model_1": simulate.policy.name}
    for done, unit in enumerate(units, start=1):
        media: np.ndarray = works.popleft().result().value
        utility_B = utility.score_arrays({"media": media}, unit.prompts).total_B
        for a, b in _within(unit.prompt_ids)[: count - made]:
            key = f"{unit.key}/{unit.prompt_ids[a]}"
            uids = (f"{key}/{unit.sample_ids[a]}", f"{key}/{unit.sample_ids[b]}")
            pictures = (media[a], media[b])
            utilities = (float(utility_B[a]), float(utility_B[b]))
            row = _row(config, simulate, unit.prompts[a], pictures, utilities, uids)
            record = {"record": dump_record(unit.prompts[a])} if has_records else {}
            yield {**row, **source, **record}
            made += 1
        report("sampling", done, len(units), float(np.mean(utility_B)))


def _units(config: FitReward, simulate: Simulate, count: int) -> list[Unit]:
    """Units with enough prompts for ``count`` pairs."""
    if not count:
        return []
    per_prompt = simulate.samples_per_prompt * (simulate.samples_per_prompt - 1) // 2
    needed = -(-count // per_prompt)
    prompts = simulate.prompts
    per_unit = min(prompts.per_unit, needed)
    needed = -(-needed // per_unit) * per_unit
    # distinct prompts while the source has them: a round draws without replacement
    changes = {
        "per_round": needed,
        "per_unit": per_unit,
        "samples_per_prompt": simulate.samples_per_prompt,
    }
    units = prompts.model_copy(update=changes).units(config.seed, 0, simulate.plan)
    return [replace(unit, key=unit.key._replace(stream="fit-reward")) for unit in units]


def _within(prompt_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of a unit's samples that share their prompt."""
    return [
        (a, b) for a, b in combinations(range(len(prompt_ids)), 2) if prompt_ids[a] == prompt_ids[b]
    ]


def _drawn(
    config: FitReward, utility: Rewards, count: int, report: Report
) -> Iterator[dict[str, Any]]:
    """Pairs of drawings: the caption's scene, and one with a fact changed; which comes first is
    keyed."""
    simulate = config.simulate
    assert simulate is not None
    for start in range(0, count, _CHUNK):
        # a chunk of pairs of drawings
        captions = []
        pictures = []
        for n in range(start, min(start + _CHUNK, count)):
            rng = generator("fit-reward", config.seed, "drawn", n)
            scene = random_scene(rng, "train")
            two = [draw(scene, rng), draw(one_fact_changed(scene, rng), rng)]
            pictures += [two[i].transpose(2, 0, 1)[None] for i in rng.permutation(2)]
            captions += [scene.caption] * 2
        # scored at once
        media = np.stack(pictures)
        utility_B = utility.score_arrays({"media": media}, captions).total_B
        for k in range(0, len(captions), 2):
            uids = (f"drawn/{start + k // 2}/0", f"drawn/{start + k // 2}/1")
            utilities = (float(utility_B[k]), float(utility_B[k + 1]))
            row = _row(config, simulate, captions[k], (media[k], media[k + 1]), utilities, uids)
            yield {**row, "model_0": "drawn", "model_1": "drawn"}
        report("drawing", min(start + _CHUNK, count), count, float(np.mean(utility_B)))


def _row(
    config: FitReward,
    simulate: Simulate,
    caption: str,
    pictures: tuple[np.ndarray, np.ndarray],
    utilities: tuple[float, float],
    uids: tuple[str, str],
) -> dict[str, Any]:
    label_0 = _label(config.seed, utilities[0] - utilities[1], simulate.temperature, uids)
    return {
        "caption": caption,
        "jpg_0": encode_media(pictures[0]),
        "jpg_1": encode_media(pictures[1]),
        "label_0": label_0,
        "label_1": 1.0 - label_0,
        "are_different": not np.array_equal(*pictures),
        "has_label": bool(np.isfinite(utilities).all()),
        "image_0_uid": uids[0],
        "image_1_uid": uids[1],
        "ranking_id": prompt_id(caption),
        **facts_of_clips(len(pictures[0])),
    }


def _label(seed: int, difference: float, temperature: float, uids: tuple[str, str]) -> float:
    """1, 0 or, where the judge is exact, 0.5 for a tie; a noisy judge follows Bradley & Terry 1952
    and always decides."""
    if temperature == 0.0 or not np.isfinite(difference):
        return 0.5 if not difference or not np.isfinite(difference) else float(difference > 0)
    wins = 1.0 / (1.0 + np.exp(-difference / temperature))
    return float(generator("fit-reward", seed, "label", *uids).random() < wins)


def one_fact_changed(scene: Scene, rng: np.random.Generator) -> Scene:
    """Another scene of the grammar, outside the novel pairs, that differs in one number, colour,
    shape, or in its relation."""
    changed = [s for s in _neighbours(scene) if s != scene and _allowed(s)]
    return changed[int(rng.integers(len(changed)))]


def _neighbours(scene: Scene) -> Iterator[Scene]:
    for i, group in enumerate(scene.groups):
        others = [replace(group, number=n) for n in (1, 2, 3)]
        others += [replace(group, colour=c) for c in PALETTE] + [
            replace(group, shape=s) for s in PLURALS
        ]
        for other in others:
            groups: list[Group] = [*scene.groups]
            groups[i] = other
            yield replace(scene, groups=tuple(groups))
    if len(scene.groups) == 2:
        # the other way round
        yield replace(scene, groups=scene.groups[::-1])
        for relation in RELATIONS:
            yield replace(scene, relation=relation)


def _allowed(scene: Scene) -> bool:
    try:
        parse_caption(scene.caption)
    except UserError:  # two groups of one colour, or too many objects
        return False
    return split_of(scene) != "novel"
