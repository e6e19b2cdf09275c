"""A family of a test's own on a small random pipeline of diffusers: what a kind of pipeline has to
say beside what all share, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from rlalign.core.records import Plan
from rlalign.diffusion.condition import Words
from rlalign.networks.pipelines.packing import pack, unpack
from rlalign.policies.base import PipelineFamily, PipelineRecipe

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
