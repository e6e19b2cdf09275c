"""Rows of zeros where T5 would stand: what a Stable Diffusion 3 pipeline without T5 tells its
transformer.

``encode_prompt`` appends ``max_sequence_length`` (256) rows of zeros to CLIP's rows. They are all
alike and carry no position, so they stay alike through every block, and one row that counts n times
in the attention does what n rows do: exp(q k) n times is exp(q k + log n). So training sees both
kinds of call, with 256 rows and with none, at the cost of one row.
"""

from __future__ import annotations

import math
from typing import Any

import torch

T5_ROWS = 256


def with_zero_row(
    embeds_BLD: torch.Tensor, image_tokens: int, has_rows_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings with one row of zeros at their end, and the (B, 1, 1, tokens) attention mask that
    makes it count.

    256 times where ``has_rows_B`` (bool) says so, not at all elsewhere. The tokens are the image's,
    then the text's.
    """
    rows, length, width = embeds_BLD.shape
    mask_B11T = embeds_BLD.new_zeros(rows, 1, 1, image_tokens + length + 1)
    mask_B11T[:, 0, 0, -1] = torch.where(has_rows_B, math.log(T5_ROWS), -math.inf)
    return torch.cat([embeds_BLD, embeds_BLD.new_zeros(rows, 1, width)], dim=1), mask_B11T


class MaskedJointAttention:
    """The attention of diffusers' JointAttnProcessor2_0 on image and text tokens, heeding the mask
    that that one ignores."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def heads(x_BLD: torch.Tensor) -> torch.Tensor:
            return x_BLD.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        image, text = hidden_states, encoder_hidden_states

        # the same heads for pictures and text, side by side
        query = [
            attn.norm_q(heads(attn.to_q(image))),
            attn.norm_added_q(heads(attn.add_q_proj(text))),
        ]
        key = [
            attn.norm_k(heads(attn.to_k(image))),
            attn.norm_added_k(heads(attn.add_k_proj(text))),
        ]
        value = [heads(attn.to_v(image)), heads(attn.add_v_proj(text))]
        mixed = torch.nn.functional.scaled_dot_product_attention(
            torch.cat(query, dim=2),
            torch.cat(key, dim=2),
            torch.cat(value, dim=2),
            attn_mask=attention_mask,
        )
        image, text = mixed.transpose(1, 2).flatten(2).split([image.shape[1], text.shape[1]], dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)
