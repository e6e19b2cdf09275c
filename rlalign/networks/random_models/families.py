"""The table of families, and how one is found.

Published sizes as in the configs that diffusers' conversion scripts write; where a class's own
defaults are those of the checkpoint, the tables say nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from rlalign.core.registry import UserError
from rlalign.networks.random_models import (
    clip_transformers,
    cross_transformers,
    joint_transformers,
    unets,
)
from rlalign.networks.random_models.records import Family

FAMILIES: Mapping[str, Family] = {
    "stable_diffusion": unets.STABLE_DIFFUSION,
    "stable_diffusion_2": unets.STABLE_DIFFUSION_2,
    "sdxl": unets.SDXL,
    "sd3": joint_transformers.SD3,
    "sd35": joint_transformers.SD35,
    "sd35_large": joint_transformers.SD35_LARGE,
    "flux": joint_transformers.FLUX,
    "flux_schnell": joint_transformers.FLUX_SCHNELL,
    "flux2": joint_transformers.FLUX_2,
    "flux2_klein": joint_transformers.FLUX_2_KLEIN,
    "flux2_klein_distilled": joint_transformers.FLUX_2_KLEIN_DISTILLED,
    "qwen_image": joint_transformers.QWEN_IMAGE,
    "z_image": joint_transformers.Z_IMAGE,
    "ltx": clip_transformers.LTX,
    "ltx_091": clip_transformers.LTX_091,
    "hunyuan_video": clip_transformers.HUNYUAN_VIDEO,
    "cogvideox": clip_transformers.COGVIDEOX,
    "cogvideox_2b": clip_transformers.COGVIDEOX_2B,
    "cogvideox_15": clip_transformers.COGVIDEOX_15,
    "sana": cross_transformers.SANA,
    "pixart": cross_transformers.PIXART,
    "wan": cross_transformers.WAN,
    "wan_i2v": cross_transformers.WAN_I2V,
    "wan22": cross_transformers.WAN_22,
    "wan22_i2v": cross_transformers.WAN_22_I2V,
    "wan22_5b": cross_transformers.WAN_22_5B,
}
"""Name -> family."""


HUB_IDS: Mapping[str, str] = {
    "CompVis/stable-diffusion-v1-4": "stable_diffusion",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "stable_diffusion",
    "stabilityai/stable-diffusion-2-1": "stable_diffusion_2",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
    "stabilityai/stable-diffusion-3.5-medium": "sd35",
    "stabilityai/stable-diffusion-3.5-large": "sd35_large",
    "black-forest-labs/FLUX.1-dev": "flux",
    "black-forest-labs/FLUX.1-schnell": "flux_schnell",
    "black-forest-labs/FLUX.2-dev": "flux2",
    "Qwen/Qwen-Image": "qwen_image",
    "Tongyi-MAI/Z-Image-Turbo": "z_image",
    "Lightricks/LTX-Video": "ltx",
    "hunyuanvideo-community/HunyuanVideo": "hunyuan_video",
    "THUDM/CogVideoX-5b": "cogvideox",
    "THUDM/CogVideoX-2b": "cogvideox_2b",
    "THUDM/CogVideoX1.5-5B": "cogvideox_15",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan22",
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "wan22_i2v",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "wan22_5b",
}
"""Hub id of a published checkpoint -> the family of its sizes."""


def find_family(name: str) -> Family:
    """The family of a name, in which a hyphen is as good as an underscore. Raises UserError with
    all names."""
    plain = name.replace("-", "_").lower()
    if plain in FAMILIES:
        return FAMILIES[plain]
    near = difflib.get_close_matches(plain, FAMILIES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"FAMILY must be one that rlalign can make, got {name!r}; {hint}known:"
        f" {', '.join(FAMILIES)}"
    )
