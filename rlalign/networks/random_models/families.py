"""The table of families, and how one is found.

Published sizes as in the configs that diffusers' conversion scripts write; where a class's own
defaults are those of the checkpoint, the tables say nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from rlalign.core.registry import UserError
from rlalign.networks.random_models import cross_transformers, joint_transformers, unets
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
    "sana": cross_transformers.SANA,
    "pixart": cross_transformers.PIXART,
    "wan": cross_transformers.WAN,
}
"""Name -> family."""


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
