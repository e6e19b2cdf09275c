"""Evaluation: fixed prompts and noise; trained and held-out rewards, diversity, distance from the
reference, win rates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from rlalign.core.files import dump_json, write_whole
from rlalign.core.prompts import record_of
from rlalign.core.records import Plan, Scored, Unit, UnitKey, prompts_of
from rlalign.core.registry import Before, plugin_field
from rlalign.diffusion.rollout import replay
from rlalign.policies.base import Policy
from rlalign.rewards.base import Reward

_HeldOut = Annotated[Reward, plugin_field("rewards", "evaluate.rewards")]


class EvaluateSettings(BaseModel):
    """What a run measures beside what it trains on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(
        default=10,
        ge=0,
        description="rounds between evaluations; 0 is at the start and the end only",
    )
    prompts: int = Field(default=64, ge=1, description="held-out prompts")
    rewards: tuple[SerializeAsAny[_HeldOut], ...] = Field(
        default=(), description="held-out rewards: measured, never trained on"
    )
    by: Annotated[str, Before("")] = Field(
        default="",
        description="field of the prompts' records: the mean score of each of its values as well",
    )
    grid: int = Field(default=16, ge=1, description="pictures in the sample grid")
    seed: int = Field(default=0, ge=0, description="decides the noise")


def evaluation_units(
    prompts: Sequence[tuple[int, str]], plan: Plan, seed: int, per_unit: int
) -> list[Unit]:
    """Units over (id, prompt), one sample each, with the same noise at every evaluation."""
    rows = [(number, text, sample) for sample, (number, text) in enumerate(prompts)]
    parts = [rows[start : start + per_unit] for start in range(0, len(rows), per_unit)]
    return [
        Unit.of_rows(UnitKey("evaluate", 0, index), part, seed, plan)
        for index, part in enumerate(parts)
    ]


def collect_scores(scored: Sequence[Scored], title: str) -> np.ndarray:
    """(N,) raw scores of one reward, or the weighted total, in unit order."""
    return np.concatenate([s.total_B if title == "total" else s.raw[title] for s in scored])


def media_of(scored: Sequence[Scored]) -> np.ndarray:
    """(N, F, 3, H, W) uint8 in unit order."""
    media = [s.media_BFCHW for s in scored]
    assert all(m is not None for m in media), "an evaluation keeps its media"
    return np.concatenate([m for m in media if m is not None])


def summarise(
    scored: Sequence[Scored], trained: Sequence[str], held_out: Sequence[str], by: str = ""
) -> dict[str, float]:
    """Mean and std of the total and of each reward, and the diversity of the pictures.

    ``by`` is a field of the prompts' records: ``reward/TITLE/BY=VALUE`` is the mean over the
    prompts that have a value there, ``reward/TITLE/mean_by_BY`` the mean over the values of those.
    """
    out: dict[str, float] = {}
    groups = _groups(scored, by) if by else {}
    for prefix, titles in (("reward", ["total", *trained]), ("held_out", list(held_out))):
        for title in titles:
            every_N = collect_scores(scored, title).astype(np.float64)
            score_N = every_N[np.isfinite(every_N)]
            out[f"{prefix}/{title}/mean"] = _mean(every_N)
            out[f"{prefix}/{title}/std"] = float(score_N.std()) if len(score_N) else float("nan")
            means = {value: _mean(every_N[inside_N]) for value, inside_N in groups.items()}
            out |= {f"{prefix}/{title}/{by}={value}": mean for value, mean in means.items()}
            if means:
                out[f"{prefix}/{title}/mean_by_{by}"] = _mean(np.array(list(means.values())))
    out["diversity/pixel_rms"] = pixel_diversity(media_of(scored))
    return out


def _mean(score_N: np.ndarray) -> float:
    """The mean of the scores that there are."""
    score_N = score_N[np.isfinite(score_N)]
    return float(score_N.mean()) if len(score_N) else float("nan")


def _groups(scored: Sequence[Scored], by: str) -> dict[str, np.ndarray]:
    """Value of a field of the records -> (N,) bool: the samples that have it, in unit order.
    Values are sorted; "none" is that of records without the field."""
    prompts = prompts_of(one.unit for one in scored)
    names = np.array([_name_of(record_of(prompt).get(by, "none")) for prompt in prompts])
    return {str(name): names == name for name in np.unique(names)}


def _name_of(value: Any) -> str:
    """A value within the name of a metric, whose parts are cut at slashes."""
    text = value if isinstance(value, str) else dump_json(value)
    return text.replace("/", "|")


def round_facts(scored: Sequence[Scored], titles: Sequence[str]) -> dict[str, float]:
    """A training round's part of the metrics line: rewards, dropped samples, and the entropy of its
    steps.

    ``entropy/per_step`` is the mean of -log p over samples and stochastic steps, nats per latent
    element: an estimate of the steps' differential entropy, ln(std) + 1.42 where the plan alone
    decides the std.
    """
    if not scored:
        return {}
    line: dict[str, float] = {}

    # the rewards of samples that were kept
    for title in ("total", *titles):
        value_B = collect_scores(scored, title)
        some = bool(np.isfinite(value_B).any())
        line[f"reward/{title}/mean"] = float(np.nanmean(value_B)) if some else float("nan")
        line[f"reward/{title}/std"] = float(np.nanstd(value_B)) if some else float("nan")
    line["samples_dropped"] = int(sum((~s.kept_B).sum() for s in scored))

    # the entropy over the steps that draw noise
    trajectories = [s.trajectory for s in scored if s.trajectory is not None]
    taken = [t.log_prob_BK[:, t.stochastic_K] for t in trajectories if t.stochastic_K.any()]
    if taken:
        line["entropy/per_step"] = -float(
            np.concatenate([one.flatten() for one in taken]).astype(np.float64).mean()
        )
    return line


def pixel_diversity(media_NFCHW: np.ndarray) -> float:
    """Root of the mean squared distance over pairs of samples, each frame averaged over areas to 8
    x 8 RGB in [0, 1].

    0 when all samples look alike at that size. A clip is compared with clips, frame by frame, and
    not with itself. By the identity mean over pairs |a - b|^2 = 2 N / (N - 1) * variance, per
    element.
    """
    if len(media_NFCHW) < 2:
        return 0.0
    pictures_NCHW = torch.from_numpy(np.array(media_NFCHW)).flatten(0, 1).double() / 255.0
    small_NCHW = torch.nn.functional.adaptive_avg_pool2d(pictures_NCHW, 8)
    count = len(media_NFCHW)
    samples_NFCHW = small_NCHW.unflatten(0, (count, -1))
    return float(
        (2.0 * count / (count - 1) * samples_NFCHW.var(dim=0, unbiased=False).mean()).sqrt()
    )


def win_rate(score_N: np.ndarray, against_N: np.ndarray) -> float:
    """Share of pairs that the first wins; ties count half; a pair with a missing score counts as a
    tie."""
    wins = (score_N > against_N).astype(np.float64)
    return float(
        np.where(score_N < against_N, 0.0, np.where(score_N > against_N, wins, 0.5)).mean()
    )


def compare(
    base: Sequence[Scored],
    aligned: Sequence[Scored],
    trained: Sequence[str],
    held_out: Sequence[str],
    by: str = "",
    before: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Two models on the same prompts and noise: the content of ``evaluation.json`` but for what
    needs a live policy. ``before`` is the base's summary, where its media are not kept."""
    if before is None:
        before = summarise(base, trained, held_out, by)
    after = summarise(aligned, trained, held_out, by)
    titles = ["total", *trained, *held_out]

    # every picture under both models
    samples = [
        {**said_of(prompt), "base": base_scores, "aligned": aligned_scores}
        for (prompt, base_scores), (_, aligned_scores) in zip(
            scores_by_prompt(base, titles), scores_by_prompt(aligned, titles), strict=True
        )
    ]
    return {
        "plan": base[0].unit.plan.model_dump(),
        "prompts": len(samples),
        "base": before,
        "aligned": after,
        "gain": {k: after[k] - before[k] for k in before},
        "win_rate": {
            t: win_rate(collect_scores(aligned, t), collect_scores(base, t)) for t in titles
        },
        "samples": samples,
    }


def said_of(prompt: str) -> dict[str, Any]:
    """A prompt within a file of results: its text, and its record where it has one."""
    record = dict(record_of(prompt))
    return {"prompt": str(prompt), **({"record": record} if record else {})}


def scores_by_prompt(
    scored: Sequence[Scored], titles: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """(prompt, title -> score) of every sample, in unit order."""
    for one in scored:
        scores = {t: one.total_B if t == "total" else one.raw[t] for t in titles}
        for i, prompt in enumerate(one.unit.prompts):
            yield prompt, {t: float(score_B[i]) for t, score_B in scores.items()}


def kl_to_reference(policy: Policy, scored: Sequence[Scored]) -> float:
    """Mean over samples and stochastic steps of KL(policy || pretrained model) per step, nats per
    latent element.

    On the policy's own trajectories; times the steps and the elements of a latent it is the bound
    of DPOK's lemma 4.2 (Fan 2023, arXiv:2305.16381). 0 when no step is stochastic.
    """
    return mean_kl([kl_of_unit(policy, one) for one in scored])


@torch.no_grad()
def kl_of_unit(policy: Policy, one: Scored) -> list[torch.Tensor]:
    """(B,) of each stochastic step of one unit: what ``kl_to_reference`` is the mean of."""
    assert one.trajectory is not None
    latents = torch.from_numpy(np.array(one.trajectory.latents_BK1, dtype=np.float32)).to(
        policy.device
    )
    condition = policy.encode(one.unit.prompts, one.unit.plan)
    values = list[torch.Tensor]()
    for k in np.flatnonzero(one.trajectory.stochastic_K).tolist():
        before = latents[:, [one.trajectory.kept.index(k)]]
        mine = replay(policy, one.unit, before, [k], condition).gaussian
        with policy.as_reference(pretrained=True):
            theirs = replay(policy, one.unit, before, [k], condition).gaussian
        values.append(mine.kl(theirs))
    return values


def mean_kl(units: Sequence[Sequence[torch.Tensor]]) -> float:
    """The mean over units, in their order, of their steps' (B,); 0 where there is no step."""
    values = list(chain.from_iterable(units))
    return float(torch.cat(values).double().mean()) if values else 0.0


def write_samples(folder: Path, round: int, scored: Sequence[Scored], count: int) -> Path:
    """``samples/round-00010.png``: the first pictures or clips of the evaluation with captions and
    scores; clips lie in ``samples/round-00010/`` too."""
    from rlalign.core.pictures import write_grid

    media = media_of(scored)[:count]
    captions = prompts_of(s.unit for s in scored)[:count]
    path = folder / "samples" / f"round-{round:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_grid(path, media, captions, collect_scores(scored, "total")[:count].tolist())
    return path


def read_final(folder: Path, rounds: int) -> dict[str, Any] | None:
    """The comparison that ends a run; None where the run did not come to its last round."""
    path = folder / "evaluation.json"
    final = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    over = final is not None and (final["round"] == rounds or "stopped" in final)
    return final if over else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON, whole or not at all; NaN becomes null."""
    write_whole(path, dump_json(content, indent=1))
