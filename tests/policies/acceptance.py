"""What every family of diffusers' pipelines must hold to, as tests that a ``Case`` is put into.

A test module of a family says its cases (a small random pipeline, and how diffusers' own is called
for the same picture), and takes the tests over::

    @pytest.fixture(scope="module", params=CASES)
    def case(request, tmp_path_factory):
        return CASES[request.param](tmp_path_factory.mktemp("pipeline"))

    class TestAcceptance(Acceptance): ...
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten, tree_map

from rlalign.algorithms._advantages import PromptStatistics
from rlalign.algorithms.ddpo import DDPO
from rlalign.core.prompts import Prompt, record_of
from rlalign.core.records import Plan, with_prompts
from rlalign.networks import lora
from rlalign.networks.pipelines.packing import pack, unpack
from rlalign.networks.precision import rounded_names
from rlalign.policies.base import PipelineRecipe, Policy
from tests.toy import collect, make_units

PROMPTS = ("a red circle", "two")
STEPS = 4
RANK = 2
ALPHA = 5.0
"""Another one than the rank: a file that lacks it would be read with another scale."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family on a small random pipeline, and the call of diffusers' own that asks the same."""

    recipe: PipelineRecipe
    """With the folder as its path."""
    adapted: int
    """Layers that a LoRA of the family's targets adapts."""
    call: Callable[[float], Mapping[str, Any]]
    """plan.guidance -> settings of the pipeline's call; 1 is without classifier-free guidance."""
    packed: bool = False
    """Whether the pipeline's latents are tokens of 2 x 2."""
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((16, 16), (24, 16))
    """Two resolutions (height, width) in pixels."""
    frames: int = 1
    """More than 1 for a family of clips."""
    guidance: float = 3.0
    prepare: Callable[[Any], None] = lambda pipeline: None
    """What is changed in diffusers' pipeline before it is asked: a one-step scheduler in place of
    its solver of several."""
    to_pipeline: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Our latents -> those that a call takes, where they differ otherwise than by packing."""
    from_pipeline: Callable[[Any, torch.Tensor, Sequence[int]], torch.Tensor] | None = None
    """diffusers' pipeline, its latents of ``output_type="latent"``, and the shape of ours -> ours,
    where they differ otherwise than by packing."""
    unheard: int = 0
    """Adapted layers whose answer goes nowhere, as what the last block writes of the words."""
    instructed: bool = False
    """Whether a caption is read with an instruction, which the empty one lacks."""
    prompts: tuple[str, str] = PROMPTS
    """Of unequal length."""
    timesteps: tuple[int, int] = (700, 200)
    """Of two rows in one pass."""
    load_second: Callable[[Any, Path], None] = lambda pipeline, folder: None
    """How plain diffusers reads the LoRA of a second denoiser in a folder."""
    loads_adapters: bool = True
    """False where plain diffusers has no LoRA loader for the pipeline: only a merged one is
    written."""
    latents: float = 2e-6
    """Largest difference of final latents, in units of the largest latent (at least 1)."""
    pictures: float = 2e-6
    """Largest difference of pictures in [0, 1]."""

    @functools.cached_property
    def policy(self) -> Policy:
        return self.recipe.load("cpu")

    @functools.cached_property
    def pipeline(self) -> Any:
        """Plain diffusers' own, whose networks answer what they were asked before without
        computing it again: latents and a picture are two calls."""
        pipeline = open_plain(self.recipe.path)
        self.prepare(pipeline)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                remember_answers(part)
        return pipeline

    def trained(self) -> Policy:
        """A LoRA whose matrices are neither zero nor small; the same policy each time."""
        return self._trained

    @functools.cached_property
    def _trained(self) -> Policy:
        policy = self.varied(lora_rank=RANK, lora_alpha=ALPHA)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return policy

    def varied(self, **change: Any) -> Policy:
        """The policy of a recipe with other settings."""
        return self.recipe.model_copy(update=change).load("cpu")

    def draw(self, noise: torch.Tensor, plan: Plan, output: str) -> torch.Tensor:
        """What diffusers' pipeline draws from ``noise`` (B, *latent): latents, or pictures (B, 3,
        H, W), or clips (B, F, 3, H, W)."""
        told = {**self.call(plan.guidance), "num_inference_steps": plan.steps}
        told |= {"height": plan.height, "width": plan.width, "output_type": output}
        start = pack(noise) if self.packed else noise.clone()
        if self.to_pipeline is not None:
            start = self.to_pipeline(start)
        if self.frames > 1:
            told["num_frames"] = self.frames
        found = self.pipeline(prompt=[str(p) for p in self.prompts], latents=start, **told)
        return found.frames if self.frames > 1 else found.images

    def plan(self, size: tuple[int, int], **settings: Any) -> Plan:
        """A plan of a resolution (height, width)."""
        height, width = size
        return Plan(height=height, width=width, frames=self.frames, **settings)

    def unpacked(self, latents: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The pipeline's final latents as ours."""
        if self.from_pipeline is not None:
            return self.from_pipeline(self.pipeline, latents, shape)
        return unpack(latents, shape) if self.packed else latents


def open_plain(folder: str | Path) -> Any:
    """A pipeline folder as diffusers alone reads it, in evaluation mode."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


def remember_answers(network: torch.nn.Module) -> None:
    """A question of the same numbers, bit for bit, is computed once."""
    forward = network.forward
    known: dict[bytes, Any] = {}

    def told(value: Any) -> bytes:
        if not isinstance(value, torch.Tensor):
            return repr(value).encode()
        flat = value.detach().contiguous().flatten().view(torch.uint8)
        return f"{value.dtype} {tuple(value.shape)}".encode() + flat.numpy().tobytes()

    @functools.wraps(forward)
    def remembering(*args: Any, **more: Any) -> Any:
        leaves, form = tree_flatten((args, more))
        key = hashlib.sha256(b"|".join([repr(form).encode(), *map(told, leaves)])).digest()
        if key not in known:
            known[key] = forward(*args, **more)
        # whoever asked may write into what it gets
        return tree_map(lambda one: one.clone() if torch.is_tensor(one) else one, known[key])

    network.forward = remembering


def asked(policy: Policy, case: Case) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(latents, timesteps, words) to compare two networks by."""
    shape = policy.latent_shape(case.plan(case.sizes[1]))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    plan = case.plan(case.sizes[1])
    return x, torch.tensor(case.timesteps), policy.encode(case.prompts, plan).caption


def predicted(policy: Policy, network: torch.nn.Module, case: Case) -> torch.Tensor:
    """What the family makes of another denoiser's answer."""
    x, timestep_B, words = asked(policy, case)
    with torch.no_grad():
        return policy.family.with_network(network).predict(x, timestep_B, words)


def adapters(network: torch.nn.Module) -> list[Any]:
    """The layers that peft has put in the place of others."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def deterministic(policy: Policy, case: Case, size: tuple[int, int], guidance: float) -> Plan:
    """The plan of the pipeline's own sampling."""
    rule = "flow_ode" if policy.prediction == "flow" else "ddim"
    return case.plan(size, steps=STEPS, rule=rule, eta=0.0, guidance=guidance)


def stochastic(policy: Policy, case: Case) -> Plan:
    """A plan to learn from."""
    rule, eta = ("flow_sde", 0.7) if policy.prediction == "flow" else ("ddim", 1.0)
    return case.plan(case.sizes[0], steps=3, rule=rule, eta=eta, guidance=case.guidance)


class Acceptance:
    """The tests. ``case`` is a fixture of the module that takes them over."""

    @pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
    @pytest.mark.parametrize("size", [0, 1], ids=["first size", "second size"])
    def test_it_draws_what_the_pipeline_draws(self, case: Case, size: int, guided: bool) -> None:
        """Deterministic sampling from the same noise, of two prompts of unequal length: the final
        latents, and the picture."""
        policy = case.policy
        plan = deterministic(policy, case, case.sizes[size], case.guidance if guided else 1.0)
        shape = (len(case.prompts), *policy.latent_shape(plan))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        told = {"height": plan.height, "width": plan.width, "frames": plan.frames}
        found = policy.sample(
            case.prompts,
            steps=STEPS,
            guidance=plan.guidance,
            latents=noise,
            output="latents",
            **told,
        )
        with torch.no_grad():
            wanted = case.unpacked(case.draw(noise, plan, "latent"), shape)
            pictures = case.draw(noise, plan, "pt")
            media = policy.decode(found)
        bound = case.latents * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(found, wanted, rtol=0, atol=bound)
        assert media.shape == (len(case.prompts), plan.frames, 3, plan.height, plan.width)
        assert policy.drawn_size(plan) == (plan.height, plan.width)
        drawn = media if case.frames > 1 else media[:, 0]
        torch.testing.assert_close(drawn, pictures, rtol=0, atol=case.pictures)

    def test_the_words_are_heard(self, case: Case) -> None:
        """Or equal pictures would prove nothing: each tensor of words moves the answer."""
        policy = case.policy
        x, timestep_B, words = asked(policy, case)
        with torch.no_grad():
            said = policy.family.predict(x, timestep_B, words)
            for name, tensor in words.tensors.items():
                # no constant, which a norm would take away again
                ramp = torch.linspace(1.0, 2.0, tensor.shape[-1])
                other = tensor.logical_not() if tensor.dtype == torch.bool else tensor + ramp
                changed = type(words)({**words.tensors, name: other})
                moved = policy.family.predict(x, timestep_B, changed)
                assert (moved - said).abs().max() > 1e-4, name

    def test_a_prompts_rows_do_not_depend_on_its_neighbours(self, case: Case) -> None:
        """Bit for bit, and the empty caption is a prompt as any other."""
        plan = case.plan(case.sizes[0])
        together = case.policy.encode(case.prompts, plan)
        other = case.trained()
        other.family.memory.rows.clear()
        for row, prompt in reversed(list(enumerate(case.prompts))):
            alone = other.encode([prompt], plan)
            for name, tensor in together.caption.tensors.items():
                assert torch.equal(alone.caption[name][0], tensor[row])
        blank = other.encode([Prompt("", record_of(case.prompts[1]))], plan)
        empty = blank.empty if case.instructed else blank.caption
        for name, tensor in together.empty.tensors.items():
            assert torch.equal(empty[name][0], tensor[1])

    @pytest.mark.parametrize("lora_rank", [0, RANK])
    def test_the_ratio_is_exactly_one_before_the_first_update(
        self, case: Case, lora_rank: int
    ) -> None:
        """float32, one step a pass: max |ratio - 1| is 0, not small."""
        policy = case.trained() if lora_rank else case.policy
        units = make_units(2, per_unit=2, plan=stochastic(policy, case))
        units = [with_prompts(unit, case.prompts) for unit in units]
        scored = collect(policy, units)
        assert np.isfinite(scored[0].trajectory.log_prob_BK).all()
        algorithm = DDPO(advantage="global")
        batch = algorithm.make_batch(scored, PromptStatistics())
        passes = list(batch.passes(1))
        assert passes
        for one in passes:
            assert algorithm.loss(one, policy).maxima["ratio/max_deviation"].item() == 0.0

    @pytest.mark.parametrize("lora_rank", [0, RANK])
    def test_bfloat16_needs_rounded_weights_only(
        self, case: Case, lora_rank: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Bit for bit, of those that ``rounded_names`` names: workers are sent no more."""
        policy = case.trained() if lora_rank else case.policy
        own = policy.weights()
        names = rounded_names(policy.network, "bfloat16") & own.keys()
        assert names == own.keys() if lora_rank else len(names) > len(own) / 2
        sent = {n: t.bfloat16().float() if n in names else t for n, t in own.items()}
        assert any(not torch.equal(sent[n], own[n]) for n in names)
        monkeypatch.setattr(policy, "precision", "bfloat16")
        with torch.no_grad():
            said = policy.answer(*asked(policy, case))
            with policy.holding(sent):
                assert torch.equal(policy.answer(*asked(policy, case)), said)

    def test_gradient_checkpointing_repeats_the_gradient(self, case: Case) -> None:
        """Bit for bit, of an adapter whose matrices are not zero."""
        found = []
        policy = case.trained()
        for checkpointing in (False, True):
            policy.network.zero_grad()
            if checkpointing:
                policy.family.checkpoint_gradients()
            policy.answer(*asked(policy, case)).square().mean().backward()
            grads = [p.grad for p in policy.trainable().values()]
            heard = [g for g in grads if g is not None and bool(g.any())]
            assert len(grads) - len(heard) == 2 * case.unheard
            found.append(torch.cat([g.flatten() for g in heard]))
        assert torch.equal(*found)

    def test_its_adapter_is_one_of_plain_diffusers(self, case: Case, tmp_path: Path) -> None:
        """Every layer that should be is adapted, the file in a plain pipeline (alpha is not the
        rank) says what the policy says with a difference of 0, and so does a run that starts from
        it."""
        policy = case.trained()
        said = predicted(policy, policy.network, case)
        assert len(adapters(policy.network)) == case.adapted
        with policy.as_reference():
            assert not torch.allclose(predicted(policy, policy.network, case), said, atol=1e-4)
        if not case.loads_adapters:
            return
        policy.save(tmp_path)
        files = sorted(tmp_path.glob("*.safetensors"))
        tensors = {(file.name, name): t for file in files for name, t in load_file(file).items()}
        assert len(tensors) == 2 * case.adapted

        # nothing of the file is left out, nothing is added
        plain = open_plain(case.recipe.path)
        plain.load_lora_weights(tmp_path)
        case.load_second(plain, tmp_path)
        network = policy.family.denoiser_of(plain)
        assert len(adapters(network)) == case.adapted
        assert sum("lora_" in name for name, _ in network.named_parameters()) == len(tensors)
        scales = {s for layer in adapters(network) for s in layer.scaling.values()}
        assert scales == {ALPHA / RANK}
        assert torch.equal(predicted(policy, network, case), said)

        # and back
        again = case.varied(adapter=str(tmp_path))
        assert torch.equal(predicted(again, again.network, case), said)

    def test_its_merged_pipeline_is_one_of_plain_diffusers(
        self, case: Case, tmp_path: Path
    ) -> None:
        """To rounding: the adapters are added into the weights."""
        policy = case.trained()
        merged = policy.merged()
        assert lora.is_attached(policy.network) and not lora.is_attached(merged.network)
        policy.save_merged(tmp_path)
        plain = policy.family.denoiser_of(open_plain(tmp_path))
        found = predicted(policy, plain, case)
        assert torch.equal(found, predicted(policy, merged.network, case))
        said = predicted(policy, policy.network, case)
        bound = 5e-6 * max(1.0, said.abs().max().item())
        torch.testing.assert_close(found, said, rtol=0, atol=bound)

    def test_pictures_go_through_the_autoencoder_and_back(self, case: Case) -> None:
        """Latents have the shape of the drawn ones, and a picture comes back as its autoencoder
        alone gives it back: the scales out and in are inverse to each other."""
        policy = case.policy
        plan = case.plan(case.sizes[1])
        shape = (2, *policy.latent_shape(plan))
        vae = policy.family.vae
        clips = case.frames > 1 or bool(policy.family.own_per_thread)
        with torch.no_grad():
            drawn = policy.decode(torch.randn(shape, generator=torch.Generator().manual_seed(3)))
            pixels = (drawn.transpose(1, 2) if clips else drawn[:, 0]) * 2 - 1
            encoded = vae.encode(pixels, return_dict=False)[0]
            inner = encoded if isinstance(encoded, torch.Tensor) else encoded.mode()
            alone = vae.decode(inner, return_dict=False)[0]
            latents = policy.encode_media(drawn)
            back = policy.decode(latents)
        assert latents.shape == shape
        wanted = (alone / 2 + 0.5).clamp(0, 1)
        found = back.transpose(1, 2) if clips else back[:, 0]
        torch.testing.assert_close(found, wanted, rtol=0, atol=case.pictures)
