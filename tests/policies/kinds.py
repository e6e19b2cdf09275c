"""Three families of a test's own on small random pipelines of diffusers: what each kind of pipeline
has to say beside what all share, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from rlalign.core.records import Plan
from rlalign.diffusion.condition import Words
from rlalign.diffusion.paths import NoisePath
from rlalign.diffusion.predictions import PredictionType
from rlalign.networks.pipelines.packing import pack, positions, unpack
from rlalign.networks.pipelines.schedulers import read_variance_preserving
from rlalign.policies.base import PipelineFamily, PipelineRecipe
from tests.toy import text_config, tokenizer

# --- a UNet that is told two encoders' words, a pooled vector and sizes; guided away from zeros --


class TwoEncoders(PipelineFamily):
    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    pipeline_settings: ClassVar[Mapping[str, Any]] = {"add_watermarker": False}
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
    }
    part: ClassVar[str] = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def read_path(self) -> tuple[NoisePath, PredictionType]:
        return read_variance_preserving(self.pipeline.scheduler), "epsilon"

    @property
    def trial_side(self) -> int:
        return 8

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        embeds_BLD, _, pooled_BD, _ = self.pipeline.encode_prompt(
            text, device=self.device, do_classifier_free_guidance=False
        )
        return {"embeds_BLD": embeds_BLD, "pooled_BD": pooled_BD}

    def against(self, caption: Words) -> Words | None:
        if self.recipe.negative_prompt or not self.pipeline.config.force_zeros_for_empty_prompt:
            return super().against(caption)
        return Words({name: torch.zeros_like(t) for name, t in caption.tensors.items()})

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        height, width = (side * self.factor for side in x.shape[-2:])
        ids = torch.tensor([[height, width, 0, 0, height, width]] * len(x), device=x.device)
        pooled_BD = words["pooled_BD"]
        return self.network(
            x,
            timestep_B,
            encoder_hidden_states=words["embeds_BLD"],
            added_cond_kwargs={"text_embeds": pooled_BD, "time_ids": ids.to(pooled_BD.dtype)},
            return_dict=False,
        )[0]


class TwoEncodersRecipe(PipelineRecipe):
    family = TwoEncoders


# --- a transformer of packed latents that is told places and a guidance; a shift by size ---------


class Packed(PipelineFamily):
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {"transformer": ("FluxTransformer2DModel",)}
    own_side: ClassVar[int] = 8
    even_levels: ClassVar[bool] = True
    patch = 2
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")

    recipe: PackedRecipe

    @property
    def channels(self) -> int:
        return self.vae.config.latent_channels

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        length = self.recipe.text_tokens
        embeds_BLD, pooled_BD, _ = self.pipeline.encode_prompt(
            text, None, device=self.device, max_sequence_length=length
        )
        return {"embeds_BLD": embeds_BLD, "pooled_BD": pooled_BD}

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        embeds_BLD = words["embeds_BLD"]
        told = self.recipe.embedded_guidance
        guidance = torch.full((len(x),), told, device=x.device)
        tokens = self.network(
            hidden_states=pack(x),
            timestep=timestep_B.float() / 1000,
            guidance=guidance if self.network.config.guidance_embeds else None,
            pooled_projections=words["pooled_BD"],
            encoder_hidden_states=embeds_BLD,
            txt_ids=torch.zeros(embeds_BLD.shape[1], 3, device=x.device),
            img_ids=positions(x),
            return_dict=False,
        )[0]
        return unpack(tokens, x.shape)


class PackedRecipe(PipelineRecipe):
    family = Packed

    embedded_guidance: float = Field(default=3.5, description="what the network is told")
    text_tokens: int = 12


# --- masked words of one width, guidance at the caption's own length, an autoencoder of clips ----


class Masked(PipelineFamily):
    pipeline_classes: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {"text_encoder": ()}
    own_side: ClassVar[int] = 8
    even_levels: ClassVar[bool] = True
    patch = 2
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    recipe: MaskedRecipe

    @property
    def channels(self) -> int:
        return self.vae.config.z_dim

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        embeds_BLD, _ = self.pipeline.encode_prompt(text, device=self.device)
        length = embeds_BLD.shape[1]
        more = self.recipe.text_tokens - length
        mask_BL = torch.arange(self.recipe.text_tokens, device=self.device)[None] < length
        return {
            "embeds_BLD": torch.nn.functional.pad(embeds_BLD, (0, 0, 0, more)),
            "mask_BL": mask_BL,
        }

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        tokens = self.network(
            hidden_states=pack(x),
            timestep=timestep_B.float() / 1000,
            encoder_hidden_states=words["embeds_BLD"],
            encoder_hidden_states_mask=words["mask_BL"],
            img_shapes=[[(1, x.shape[-2] // 2, x.shape[-1] // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(tokens, x.shape)

    def combine(self, cond: torch.Tensor, uncond: torch.Tensor, guidance: float) -> torch.Tensor:
        caption, mixed = pack(cond), pack(super().combine(cond, uncond, guidance))
        length = caption.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)
        return unpack(mixed * length, cond.shape)


class MaskedRecipe(PipelineRecipe):
    family = Masked

    negative_prompt: str = " "
    text_tokens: int = 200


# --- small random pipelines ----------------------------------------------------------------------


def autoencoder(**more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
        **more,
    )


def t5() -> dict[str, Any]:
    import transformers as t

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    config = t.T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    words = t.T5Tokenizer(vocab=[(p, -1.0) for p in pieces], extra_ids=0)
    return {"text_encoder_2": t.T5EncoderModel(config), "tokenizer_2": words}


def two_encoders() -> Any:
    import diffusers as d
    import transformers as t

    unet = d.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 16,
        cross_attention_dim=32,
        norm_num_groups=4,
    )
    return d.StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=t.CLIPTextModel(text_config(projection_dim=16)),
        text_encoder_2=t.CLIPTextModelWithProjection(text_config(projection_dim=16)),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        add_watermarker=False,
        scheduler=d.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
        ),
    )


def packed() -> Any:
    import diffusers as d
    import transformers as t

    transformer = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    vae = autoencoder(
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    return d.FluxPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, base_image_seq_len=8, max_image_seq_len=64
        ),
        vae=vae,
        text_encoder=t.CLIPTextModel(text_config()),
        tokenizer=tokenizer(),
        **t5(),
        transformer=transformer,
    )


def masked() -> Any:
    import diffusers as d
    import transformers as t
    from tokenizers.pre_tokenizers import ByteLevel

    chat = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}"
    )
    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    words = t.Qwen2Tokenizer(
        vocab=letters,
        merges=[],
        unk_token=None,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
    )
    words.chat_template = chat
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(words) + 2}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    encoder = t.Qwen2_5_VLForConditionalGeneration(
        t.Qwen2_5_VLConfig(
            text_config={**text, "rope_scaling": rope, "rope_theta": 1e6},
            vision_config={**vision, "out_hidden_size": 16, "fullatt_block_indexes": [0]},
        )
    )
    vae = d.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.5, 2.0, 1.0, 0.7],
    )
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )
    return d.QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=words, transformer=transformer
    )


def save_small(make: Any, folder: Path) -> Path:
    """Writes a pipeline that ``make`` builds of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = make()
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


PLANS = {
    "own size": Plan(steps=3),
    "oblong": Plan(steps=3, height=24, width=16),
}
