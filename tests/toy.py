"""A real policy that is small enough for closed forms: a two-layer denoiser on latents of two
numbers.

``ToyFamily`` is a family behind the library's own Policy (nothing is faked but the size); ``Toy``
is its recipe, so a run file can say ``policy: {name: "tests.toy:Toy"}``. The functions below make
units, trajectories and batches with keyed noise.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file

from rlalign.core.batches import StepBatch
from rlalign.core.records import MEDIA, Plan, Scored, Space, Unit, UnitKey
from rlalign.diffusion.noise import generator
from rlalign.diffusion.paths import VariancePreserving
from rlalign.diffusion.rollout import rollout
from rlalign.networks import lora
from rlalign.policies.base import OWN_SIZE, Condition, Family, Policy, PolicyRecipe, Words

PROMPTS = ("a red circle", "a blue square", "a green triangle", "two circles")
PLAN = Plan(steps=5, eta=1.0)
SIZE = 8
"""Pixels of a side of the toy's pictures."""


class ToyNetwork(torch.nn.Module):
    """(x, t, prompt) -> prediction: 2 + 2 + 4 numbers in, 16 hidden, 2 out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 16)
        self.outer = torch.nn.Linear(16, 2)

    def forward(
        self, x: torch.Tensor, timestep_B: torch.Tensor, embeds_BLD: torch.Tensor
    ) -> torch.Tensor:
        dtype = self.outer.weight.dtype if not lora.is_attached(self) else x.dtype
        t = timestep_B.to(dtype) / 1000.0
        features = torch.cat(
            [x.flatten(1).to(dtype), t[:, None], t[:, None] ** 2, embeds_BLD.mean(1).to(dtype)],
            dim=1,
        )
        return self.outer(torch.nn.functional.silu(self.inner(features))).reshape(x.shape)


class ToyFamily(Family):
    """Latents (2, 1, 1) on Stable Diffusion's path, epsilon prediction; pictures of one colour, 8 x
    8."""

    prediction = "epsilon"
    lora_targets = ("inner", "outer")

    def __init__(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.path = VariancePreserving.scaled_linear()
        self.device = "cpu"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = ToyNetwork().to(dtype).eval()

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        rows = [
            generator("toy prompt", p).standard_normal((1, 4), dtype=np.float32) for p in prompts
        ]
        embeds_BLD = torch.from_numpy(np.stack(rows))
        empty_BLD = torch.zeros_like(embeds_BLD)
        return Condition(
            caption=Words({"embeds_BLD": embeds_BLD}), empty=Words({"embeds_BLD": empty_BLD})
        )

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        return self.network(x, timestep_B, words["embeds_BLD"])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Red and green are the two numbers squeezed into (0, 1); blue is a half."""
        red_green = torch.sigmoid(latents.flatten(1).float())
        colour = torch.cat([red_green, torch.full_like(red_green[:, :1], 0.5)], dim=1)
        return colour[:, None, :, None, None].expand(-1, 1, 3, SIZE, SIZE)

    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        return torch.logit(media_BFCHW[:, 0, :2].mean((-1, -2)).clamp(1e-3, 1 - 1e-3))[
            :, :, None, None
        ]

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        return (2, 1, 1)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {n: t.contiguous() for n, t in self.network.state_dict().items()},
            folder / "toy.safetensors",
        )


class ToyPolicy(Policy):
    """The toy's policy, made without a recipe."""

    kind: ClassVar[type[ToyFamily]] = ToyFamily

    def __init__(
        self,
        *,
        seed: int = 0,
        lora_rank: int = 0,
        lora_alpha: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        family = self.kind(seed=seed, dtype=dtype)
        if lora_rank:
            targets = family.lora_targets
            network = family.network
            lora.attach(network, rank=lora_rank, alpha=lora_alpha, targets=targets, seed=seed)
        super().__init__(family)


class Toy(PolicyRecipe):
    """The toy denoiser as a recipe. Source: none, a test's own."""

    family = ToyFamily

    seed: int = 0

    def build(self, device: str) -> ToyFamily:
        return ToyFamily(seed=self.seed)


def make_units(
    count: int = 4, *, per_unit: int = 3, plan: Plan = PLAN, seed: int = 0, round: int = 1
) -> list[Unit]:
    """``count`` units of ``per_unit`` samples; sample ids tell the samples of a prompt apart."""
    units = []
    for index in range(count):
        numbers = range(index * per_unit, (index + 1) * per_unit)
        ids = tuple(n % len(PROMPTS) for n in numbers)
        units.append(
            Unit(
                key=UnitKey("train", round, index),
                prompts=tuple(PROMPTS[i] for i in ids),
                prompt_ids=ids,
                sample_ids=tuple(n // len(PROMPTS) for n in numbers),
                seed=seed,
                plan=plan,
            )
        )
    return units


def first_number(final_BCHW: np.ndarray) -> np.ndarray:
    """(B,) the reward most toy tests use: the first number of the final latent."""
    return final_BCHW.reshape(len(final_BCHW), -1)[:, 0]


class MediaScorer:
    """A function of media as rewards with gradients: a ``DifferentiableScorer``."""

    spaces = MEDIA

    def __init__(
        self, function: Callable[[torch.Tensor, Sequence[str]], Mapping[str, torch.Tensor]]
    ) -> None:
        self._function = function

    def __call__(
        self, samples: Mapping[Space, torch.Tensor], prompts: Sequence[str], /
    ) -> Mapping[str, torch.Tensor]:
        return self._function(samples["media"], prompts)


def collect(
    policy: Policy,
    units: Sequence[Unit],
    *,
    reward: Callable[[np.ndarray], np.ndarray] = first_number,
    version: int = 0,
) -> list[Scored]:
    """Rolls out and scores units in this thread; the reward sees the final latents (B, C, H, W)."""
    scored = []
    for unit in units:
        trajectory, media = rollout(policy, unit, version)
        value_B = reward(trajectory.latents_BK1[:, -1]).astype(np.float32)
        scored.append(
            Scored(
                unit=unit,
                policy_version=version,
                raw={"toy": value_B},
                total_B=value_B,
                trajectory=trajectory,
                media_BFCHW=media,
            )
        )
    return scored


def as_float64(batch: StepBatch) -> StepBatch:
    """The same batch in float64, for comparisons that float32 rounding would blur."""
    return replace(
        batch,
        latents=tuple(t.double() for t in batch.latents),
        log_prob=tuple(t.double() for t in batch.log_prob),
        advantage=tuple(t.double() for t in batch.advantage),
        reward=tuple(t.double() for t in batch.reward),
    )


def gradient(value: torch.Tensor, policy: Policy) -> torch.Tensor:
    """The flat gradient of a scalar with respect to the policy's trainable weights."""
    grads = torch.autograd.grad(value, list(policy.trainable().values()), allow_unused=True)
    parts = zip(grads, policy.trainable().values(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in parts])


def written_once(write: Callable[..., Path]) -> Callable[..., Path]:
    """A writer of a folder that makes what its settings say once in a process, and a copy of it
    each time."""
    made = tempfile.TemporaryDirectory(prefix="rlalign-tests-")
    folders: dict[str, Path] = {}

    @functools.wraps(write)
    def copy(folder: Path, **settings: Any) -> Path:
        kind = repr(sorted(settings.items()))
        if kind not in folders:
            folders[kind] = write(Path(made.name) / str(len(folders)), **settings)
        shutil.copytree(folders[kind], folder, dirs_exist_ok=True)
        return folder

    return copy


def _vae(**more: Any) -> Any:
    """An autoencoder of random weights: 16 x 16 pixels, 8 x 8 latents of four channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        **more,
    )


def text_config(**more: Any) -> Any:
    """A CLIP text encoder's settings: two layers of width 16."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **more,
    )


def tokenizer() -> Any:
    """A CLIP tokenizer to which every letter is a token."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16)


@written_once
def save_pipeline(
    folder: Path, *, prediction: str = "epsilon", scheduler: str = "DDIMScheduler", seed: int = 0
) -> Path:
    """Writes a Stable Diffusion pipeline of random weights (some 20 000) that draws 16 x 16 pixels
    from 8 x 8 latents."""
    import diffusers
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        vae = _vae()
        text_encoder = transformers.CLIPTextModel(text_config())
    schedule: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": prediction,
    }
    more = {"clip_sample": False} if scheduler == "DDIMScheduler" else {"skip_prk_steps": True}
    diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer(),
        scheduler=getattr(diffusers, scheduler)(**schedule, **more),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@written_once
def save_flow_pipeline(
    folder: Path, *, shift: float = 3.0, t5: bool = False, seed: int = 0, **scheduler: Any
) -> Path:
    """Writes a Stable Diffusion 3 pipeline of random weights (some 30 000): 16 x 16 pixels, 8 x 8
    latents, 16 patches."""
    import diffusers
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=40,
            caption_projection_dim=16,
            pooled_projection_dim=24,
            pos_embed_max_size=6,
            qk_norm="rms_norm",
        )
        vae = _vae(scaling_factor=1.5, shift_factor=0.06)
        first, second = (
            transformers.CLIPTextModelWithProjection(text_config(projection_dim=12))
            for _ in range(2)
        )
        third = (
            transformers.T5EncoderModel(
                transformers.T5Config(
                    vocab_size=32, d_model=40, d_kv=8, d_ff=32, num_layers=1, num_heads=2
                )
            )
            if t5
            else None
        )
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer(),
        text_encoder_2=second,
        tokenizer_2=tokenizer(),
        text_encoder_3=third,
        tokenizer_3=transformers.T5Tokenizer(vocab=[(p, -1.0) for p in pieces], extra_ids=0)
        if t5
        else None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **scheduler),
    ).save_pretrained(folder, safe_serialization=True)
    return folder
