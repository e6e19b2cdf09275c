"""What families of clips must hold to beside the acceptance test: frames, lanes, bfloat16."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rlalign.algorithms._advantages import PromptStatistics
from rlalign.algorithms.ddpo import DDPO
from rlalign.core.registry import UserError
from tests.policies.acceptance import RANK, Acceptance, Case, stochastic
from tests.toy import collect, make_units

LANES = 4


class ClipAcceptance(Acceptance):
    """The tests. ``case`` is a fixture of the module that takes them over."""

    def test_other_numbers_of_frames_are_refused(self, case: Case) -> None:
        """Those of which the autoencoder would give others back."""
        family = case.policy.family
        plan = case.plan(case.sizes[0])
        unit = family.frame_unit
        assert plan.frames == unit + 1
        rule = rf"plan\.frames must be {unit}n \+ 1 for '.*' \(1, {unit + 1}, .*take {unit + 1} or"
        with pytest.raises(UserError, match=rule):
            family.latent_shape(plan.model_copy(update={"frames": unit + 2}))
        for frames in (1, 2 * unit + 1):
            shape = family.latent_shape(plan.model_copy(update={"frames": frames}))
            with torch.no_grad():
                media = case.policy.decode(torch.zeros(1, *shape))
                assert media.shape == (1, frames, 3, *case.sizes[0])
                assert case.policy.encode_media(media).shape == (1, *shape)

    def test_lanes_decode_at_once_as_one_does_alone(self, case: Case) -> None:
        """Bit for bit, also where an autoencoder keeps features on itself."""
        policy = case.policy
        shape = policy.latent_shape(case.plan(case.sizes[0]))
        generator = torch.Generator().manual_seed(4)
        latents = [torch.randn(1, *shape, generator=generator) for _ in range(3 * LANES)]
        lanes = [policy.replica() for _ in range(LANES)]

        def decode(lane: int) -> list[torch.Tensor]:
            with torch.no_grad():
                return [lanes[lane].decode(one) for one in latents[lane::LANES]]

        alone = [policy.decode(one) for one in latents]
        with ThreadPoolExecutor(LANES) as threads:
            found = list(threads.map(decode, range(LANES)))
        for lane, media in enumerate(found):
            assert all(map(torch.equal, media, alone[lane::LANES]))

    def test_the_ratio_is_exactly_one_in_bfloat16(self, case: Case) -> None:
        """Before the first update, of a LoRA beside rounded weights."""
        policy = case.varied(precision="bfloat16", lora_rank=RANK)
        scored = collect(policy, make_units(1, per_unit=2, plan=stochastic(policy, case)))
        algorithm = DDPO(advantage="global")
        batch = algorithm.make_batch(scored, PromptStatistics())
        for one in batch.passes(1):
            assert algorithm.loss(one, policy).maxima["ratio/max_deviation"].item() == 0.0
