"""Scores by task, where prompts say in their records which task they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlalign.core.prompts import record_of

FIELD = "tag"
"""Of a record: the prompt's task, as GenEval's prompts have it."""


def task_scores(prompts: Sequence[str], score_N: np.ndarray) -> dict[str, float]:
    """task/TAG -> the mean score of the task's samples; tasks -> the mean of the tasks' means.

    The latter is GenEval's overall score: a task with many prompts counts no more than one with
    few. A missing score is left out, and a task without any score is NaN. Nothing where a prompt
    names no task.
    """
    tags = [record_of(prompt).get(FIELD) for prompt in prompts]
    if not tags or not all(isinstance(tag, str) and tag for tag in tags):
        return {}
    by_task: dict[str, list[float]] = {}
    for tag, score in zip(tags, score_N, strict=True):
        by_task.setdefault(str(tag), [])
        if np.isfinite(score):
            by_task[str(tag)].append(float(score))
    means = {tag: float(np.mean(some)) if some else float("nan") for tag, some in by_task.items()}
    return {
        **{f"task/{tag}": mean for tag, mean in means.items()},
        "tasks": float(np.mean(list(means.values()))),
    }
