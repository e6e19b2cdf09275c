"""A fit from the settings to the reward folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlalign.core.files import replacing, write_whole
from rlalign.core.locations import locate
from rlalign.core.progress import Report, console_progress
from rlalign.core.registry import UserError
from rlalign.data.pairs.campaign import write_vote_pairs
from rlalign.data.pairs.reader import PairReader, first_pair
from rlalign.data.prompts.base import prompt_id
from rlalign.fitting.checkpoints import StageCheckpoints
from rlalign.fitting.reward.losses import Losses, contrastive_losses, pair_losses
from rlalign.fitting.reward.report import measure, write_report
from rlalign.fitting.reward.settings import FitReward, Optimisation
from rlalign.fitting.reward.simulate import simulate_pairs
from rlalign.fitting.reward.stage import Stage, lock
from rlalign.networks.devices import usable
from rlalign.networks.towers import Towers, build_towers, save_towers

_PARTS = 10_000
"""The prompts are told apart by their number modulo this, so the held-out share is exact to 1e-4 of
the numbers."""


def fit_reward(config: FitReward, *, resume: bool = True, progress: Report | None = None) -> Path:
    """Fits a reward on pairs, measures it on held-out prompts and writes it; returns its folder,
    ``out/reward``.

    With ``resume`` it goes on from the newest checkpoint of ``out``; without, earlier checkpoints
    and simulated pairs are deleted. Raises UserError when they were made under other settings, or
    this machine does not have the device.
    """
    usable(config.device, "device")

    # for what is not there; paths stay as they are, since checkpoints are of these settings
    locate(config)

    # what may not change between a checkpoint and the run that goes on from it
    settings = config.model_dump(mode="json", exclude={"out", "checkpoint_every", "threads"})
    checkpoints = StageCheckpoints(
        config.out / "checkpoints", settings, every=config.checkpoint_every, grows=""
    )
    saved = checkpoints.newest() if resume else checkpoints.clear()

    # the whole fit under its own number of threads
    model = config.model
    threads = torch.get_num_threads()
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        with contextlib.nullcontext(progress) if progress else console_progress() as report:
            towers = build_towers(
                model.architecture,
                tokenizer=model.tokenizer,
                pretrained=model.pretrained,
                seed=config.seed,
            ).to(config.device)
            _make_pairs(config, resume, report)
            lock(towers, model)
            reader = PairReader(
                config.pairs,
                config.seed,
                keep=lambda caption: not held_out(caption, config.held_out),
            )
            measured_on = _held_out_pairs(config)
            _train(towers, _stages(towers, config, reader), saved, checkpoints, config.seed, report)
            facts = {"trained_on": len(reader), **_measured(towers, config, measured_on)}
    finally:
        torch.set_num_threads(threads)
    write_report(config.out, facts)
    return _write(towers, config, facts)


def held_out(caption: str, share: float) -> bool:
    """Whether a prompt's pairs are for measuring; it depends on the words alone."""
    return prompt_id(caption) % _PARTS < share * _PARTS


def _make_pairs(config: FitReward, resume: bool, report: Report) -> None:
    """The run folder's own pairs, simulated or voted: made once, and used again by the same
    settings. A given set is looked at."""
    if config.preferences.path:
        first_pair(config.pairs)
        return
    file = config.out / "pairs.parquet"
    note = config.out / "pairs.json"
    said = _origin(config)
    if resume and file.is_file() and note.is_file():
        kept = json.loads(note.read_text(encoding="utf-8"))
        if {key: value for key, value in kept.items() if key != "cursor"} != said:
            made = "simulated" if config.simulate is not None else "written from votes"
            raise UserError(
                f"{file} was {made} under other settings; choose another out, or delete it"
            )
        return
    given = config.preferences
    if given.ballots is None:
        simulate_pairs(config, file, report)
    else:
        said["cursor"] = write_vote_pairs(given.ballots, file, given.upto)
    write_whole(note, json.dumps(said, indent=2) + "\n")


def _origin(config: FitReward) -> dict[str, Any]:
    """What decides the run folder's own pairs; of votes, beside how many there were."""
    if config.simulate is None:
        given = config.preferences
        assert given.ballots is not None
        upto = {} if given.upto is None else {"upto": given.upto}
        return {"ballots": given.ballots.model_dump(mode="json"), **upto}
    return {"seed": config.seed, **config.simulate.model_dump(mode="json", exclude={"lanes"})}


def _stages(
    towers: Towers, config: FitReward, reader: PairReader
) -> dict[str, tuple[Optimisation, Losses]]:
    """Name -> settings and loss, in order (which is also that of the names)."""

    def trained_on(caption: str) -> bool:
        return not held_out(caption, config.held_out)

    stages: dict[str, tuple[Optimisation, Losses]] = {}
    if config.contrastive.updates:
        stages["contrastive"] = (config.contrastive, contrastive_losses(towers, config, trained_on))
    if config.fit.updates:
        stages["fit"] = (config.fit, pair_losses(towers, config, reader))
    return stages


def _train(
    towers: Towers,
    stages: Mapping[str, tuple[Optimisation, Losses]],
    saved: Mapping[str, torch.Tensor],
    checkpoints: StageCheckpoints,
    seed: int,
    report: Report,
) -> None:
    """All updates that the stages still lack. A checkpoint is of one stage: those before it are
    done."""
    if not stages:
        return
    towers.train()
    reached = next((name for name in stages if f"{name}/done" in saved), next(iter(stages)))
    for name in list(stages)[list(stages).index(reached) :]:
        settings, losses = stages[name]
        stage = Stage(name, towers, settings, saved)
        while stage.done < settings.updates:
            value = stage.step(losses, seed)
            if stage.done % checkpoints.every == 0 or stage.done == settings.updates:
                checkpoints.save(name, stage.done, stage.state())
            report(name, stage.done, settings.updates, value)


def _held_out_pairs(config: FitReward) -> PairReader:
    """The pairs that the reward is measured on, found before any work is done."""
    try:
        return PairReader(
            config.pairs, config.seed, keep=lambda caption: held_out(caption, config.held_out)
        )
    except UserError as error:
        raise UserError(
            f"{error}; held_out ({config.held_out:g}) sets captions aside to measure on, by a"
            " number of each: raise it, or give pairs of more captions"
        ) from error


def _measured(towers: Towers, config: FitReward, reader: PairReader) -> dict[str, Any]:
    """What the model says about the held-out prompts."""
    return {
        "prompts": len(reader.counts),
        **measure(towers.eval(), reader, config.device, config.fit.theta),
    }


def _write(towers: Towers, config: FitReward, facts: Mapping[str, Any]) -> Path:
    """The reward folder; replaces an earlier one in one rename."""
    folder = config.out / "reward"
    loss = "bradley_terry" if config.fit.theta == 1.0 else f"rao_kupper, theta {config.fit.theta:g}"
    keys = ("accuracy", "standard_error", "decided", "prompts", "loss", "calibration_error")
    about = {
        "loss": loss,
        "ties": config.preferences.ties,
        "held_out": {key: facts[key] for key in keys},
    }
    with replacing(folder) as scratch:
        save_towers(towers, scratch, about)
    return folder
