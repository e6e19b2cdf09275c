"""What families of clips must hold to beside the acceptance test: frames, lanes, bfloat16."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from rlalign.algorithms._advantages import PromptStatistics
from rlalign.algorithms.ddpo import DDPO
from rlalign.core.registry import UserError
from rlalign.policies.base import Policy
from tests.policies.acceptance import RANK, Acceptance, Case, stochastic
from tests.toy import collect, make_units

LANES = 4


def watch_decoder(policy: Policy) -> list[torch.Size]:
    """Shapes of the latents that the autoencoder's decoder is asked about from now on."""
    seen: list[torch.Size] = []
    vae: Any = policy.family.vae  # type: ignore[attr-defined]
    vae.decoder.register_forward_pre_hook(lambda _, asked: seen.append(asked[0].shape))
    return seen


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

    def test_tiles_are_as_large_as_asked(self, case: Case) -> None:
        """The first three quarters of the first tile are what the tile is by itself, and no other
        is larger; a replica has the same."""
        plain = case.policy
        side = 4 * plain.family.factor  # type: ignore[attr-defined]
        policy = case.varied(vae_tiling=True, vae_tile=side).replica()
        plan = case.plan((2 * side, 2 * side))
        shape = (1, *policy.latent_shape(plan))
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        seen = watch_decoder(policy)
        with torch.no_grad():
            media = policy.decode(latents)
            first = plain.decode(latents[..., :4, :4])
        assert media.shape[-2:] == (2 * side, 2 * side)
        kept = side - side // 4
        found, wanted = media[..., :kept, :kept], first[..., :kept, :kept]
        torch.testing.assert_close(found, wanted, rtol=0, atol=case.pictures)
        assert max(max(one[-2:]) for one in seen) == 4 and len(seen) > 1

    def test_tiles_that_do_not_fit_are_refused(self, case: Case) -> None:
        unit = 4 * case.policy.family.factor  # type: ignore[attr-defined]
        rule = rf"policy\.vae_tile must be a multiple of {unit} for '.*', beside policy\.vae_tiling"
        for settings in ({"vae_tile": unit + 1, "vae_tiling": True}, {"vae_tile": unit}):
            with pytest.raises(UserError, match=rule):
                case.varied(**settings)

    def test_frames_are_decoded_in_runs(self, case: Case) -> None:
        """The first run but its last latent frame is what it is by itself; or the autoencoder goes
        in runs anyway, and the setting is refused."""
        family = case.policy.family
        unit = family.frame_factor  # type: ignore[attr-defined]
        if not hasattr(family.vae, "use_framewise_decoding"):  # type: ignore[attr-defined]
            with pytest.raises(UserError, match=r"decode_frames must be 0 for .* by itself, with"):
                case.varied(decode_frames=2 * unit)
            return
        with pytest.raises(UserError, match=rf"decode_frames must be a multiple of {unit}, of"):
            case.varied(decode_frames=unit)
        policy = case.varied(decode_frames=2 * unit)
        frames = 4 * unit + 1
        plan = case.plan(case.sizes[0]).model_copy(update={"frames": frames})
        shape = (1, *policy.latent_shape(plan))
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(6))
        seen = watch_decoder(policy)
        with torch.no_grad():
            media = policy.decode(latents)
            first = case.policy.decode(latents[:, :, :3])
        assert media.shape[1] == frames
        torch.testing.assert_close(
            media[:, : unit + 1], first[:, : unit + 1], rtol=0, atol=case.pictures
        )
        assert max(one[2] for one in seen) == 3 and len(seen) > 1

    def test_the_ratio_is_exactly_one_in_bfloat16(self, case: Case) -> None:
        """Before the first update, of a LoRA beside rounded weights."""
        policy = case.varied(precision="bfloat16", lora_rank=RANK)
        scored = collect(policy, make_units(1, per_unit=2, plan=stochastic(policy, case)))
        algorithm = DDPO(advantage="global")
        batch = algorithm.make_batch(scored, PromptStatistics())
        for one in batch.passes(1):
            assert algorithm.loss(one, policy).maxima["ratio/max_deviation"].item() == 0.0
