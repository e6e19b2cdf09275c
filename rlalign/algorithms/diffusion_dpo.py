"""Diffusion-DPO: learning from pairs of pictures without a reward model, offline or from the run's
own scored samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from rlalign.algorithms import _objectives as objectives
from rlalign.algorithms._memory import Memory
from rlalign.algorithms._pairwise import PairwiseAlgorithm
from rlalign.algorithms.base import Given, Loss, best_and_worst, final_latents, noised
from rlalign.core.batches import Key, PairBatch, PairPass, Pairs
from rlalign.core.records import Scored
from rlalign.core.registry import Before, UserError
from rlalign.diffusion.noise import generator, normal
from rlalign.diffusion.paths import elbo_weight
from rlalign.policies.base import Policy


class DiffusionDPO(PairwiseAlgorithm):
    """-log sigmoid(-s (d_w - d_l)), d = |target - prediction|^2 - |target - prediction of the
    reference|^2, per pair.

    Winner and loser get the same noise level and the same noise. Errors are means over elements.
    ``weighting`` uniform has s = beta / 2, the published code's form; elbo writes the bound out, s
    = beta T w(t) with w(t) the exact weight of the variational bound at that level, so beta counts
    nats per element.

    Pairs come from the run's ``preferences`` (offline), or from the round's samples: best against
    worst of each prompt. ``ties`` is about the latter; what a set's ties count is said by
    ``preferences.ties``. ``flip`` and ``posterior`` are about a set's pictures: the published
    trainer has flip true and posterior sample.

    Source: Wallace 2023, arXiv:2311.12908, eq. 14; Rafailov 2023, arXiv:2305.18290.
    """

    eats = PairBatch

    beta: float = Field(
        default=5000.0, gt=0, description="strength; the published 5000 goes with uniform weighting"
    )
    weighting: Literal["uniform", "elbo"] = Field(default="uniform", description="of noise levels")
    draws: int = Field(default=4, ge=1, description="times that each pair is noised")
    caption_dropout: float = Field(
        default=0.2, ge=0, le=1, description="share of empty captions, for guidance"
    )
    flip: Annotated[bool, Before(False)] = Field(
        default=False,
        description="each picture of a set is mirrored or not, left to right, by a draw of its own",
    )
    posterior: Annotated[Literal["mean", "sample"], Before("mean")] = Field(
        default="mean",
        description="latents of a set's pictures: the mean of the encoder's posterior, or a draw",
    )
    ties: Literal["drop", "half"] = Field(
        default="drop",
        description=(
            "own samples with equal rewards: left out, or half for each side (of a set:"
            " preferences.ties)"
        ),
    )

    def check(self, given: Given) -> None:
        super().check(given)
        if given.ties == "drop" and self.ties == "half":
            raise UserError(
                "algorithm.ties must be drop where the pairs are a set's, got 'half': it is about"
                " samples of one's own; set preferences.ties to half"
            )
        own = self.flip or self.posterior == "sample"
        if own and not given.ties:
            name = "flip" if self.flip else "posterior"
            raise UserError(
                f"algorithm.{name} is about the pictures of a set, and this run learns from samples"
                f" of its own, got {getattr(self, name)}; leave it out, or name a set under"
                " preferences"
            )

    @property
    def times_noised(self) -> int:
        return self.draws

    def make_batch(self, scored: Sequence[Scored], memory: Memory) -> PairBatch:
        parts = []

        # of each unit's prompts the best and the worst sample
        for one, clean in zip(scored, final_latents(scored), strict=True):
            found = best_and_worst(one.total_B, one.unit.prompt_ids)
            if self.ties == "drop":
                found = [pair for pair in found if one.total_B[pair[0]] > one.total_B[pair[1]]]
            if not found:
                continue

            # a tie has label one half
            winners, losers = (list(side) for side in zip(*found, strict=True))
            label = np.where(one.total_B[winners] > one.total_B[losers], 1.0, 0.5).astype(
                np.float32
            )
            parts.append(
                Pairs(
                    prompts=tuple(one.unit.prompts[w] for w in winners),
                    first=clean[winners],
                    second=clean[losers],
                    label_B=torch.from_numpy(label),
                    key=(one.unit.seed, *one.unit.key),
                    plan=one.unit.plan,
                )
            )
        return PairBatch(pairs=tuple(parts), draws=self.draws)

    def loss(self, batch: PairPass, policy: Policy) -> Loss:
        # both pictures of a pair get the same noise, level and caption
        first, second = batch.pairs.latents(
            lambda pictures, side: self._encoded(policy, pictures, (*batch.pairs.key, side))
        )
        level_B, noise, empty_B = noised(
            policy, batch.key, first, batch.pairs.plan, self.caption_dropout
        )
        condition = policy.encode(batch.pairs.prompts, batch.pairs.plan).dropped(empty_B).rows(2)
        if batch.pairs.crops is not None:
            size = policy.drawn_size(batch.pairs.plan)
            told = policy.family.tell_crops(condition.caption, torch.cat(batch.pairs.crops), size)
            condition = replace(condition, caption=told)
        both = torch.cat([first, second])
        levels = level_B.repeat(2)
        noises = torch.cat([noise, noise])

        # how much better than the reference the policy denoises each side
        with torch.no_grad(), policy.as_reference():
            theirs_first, theirs_second = policy.error(both, noises, levels, condition).chunk(2)
        mine_first, mine_second = policy.error(both, noises, levels, condition).chunk(2)
        gain_B = (theirs_first - mine_first) - (theirs_second - mine_second)
        logit_B = self._strength(policy, level_B).to(gain_B) * gain_B

        # the loss and the share of pairs that the policy orders as labelled
        loss_B = objectives.labelled_preference_loss(logit_B, batch.label_B)
        agrees_B = torch.where(
            batch.label_B == 0.5, 0.5, ((logit_B > 0) == (batch.label_B > 0.5)).float()
        )
        return Loss(
            value=loss_B.mean(),
            means={
                "preference/accuracy": agrees_B.mean(),
                "preference/logit": logit_B.detach().abs().mean(),
            },
        )

    def _encoded(self, policy: Policy, pictures: torch.Tensor, key: Key) -> torch.Tensor:
        """(B, *latent) clean latents of one side of pairs; ``key`` decides what is drawn for
        it."""
        # samples of one's own are latents already
        if pictures.dtype != torch.uint8:
            return policy.as_latents(pictures.to(policy.device))

        # mirrored before they are encoded, as an encoder is not symmetric
        if self.flip:
            flipped_B = torch.from_numpy(generator(*key, "flip").random(len(pictures)) < 0.5)
            pictures = torch.where(flipped_B.view(-1, 1, 1, 1, 1), pictures.flip(-1), pictures)
        if self.posterior == "mean":
            return policy.as_latents(pictures.to(policy.device))
        mean, deviation = policy.posterior(pictures.to(policy.device).float() / 255.0)
        if deviation is None:
            raise UserError(
                "algorithm.posterior must be mean for a policy whose encoder has no posterior, got"
                " 'sample'"
            )
        return mean + deviation * normal((*key, "posterior"), mean.shape).to(mean)

    def _strength(self, policy: Policy, level_B: torch.Tensor) -> torch.Tensor:
        """(B,) what the difference of gains is multiplied with."""
        if self.weighting == "uniform":
            return torch.full_like(level_B, self.beta / 2.0)
        return (
            self.beta
            * policy.path.train_steps
            * elbo_weight(policy.path, level_B, policy.prediction)
        )
