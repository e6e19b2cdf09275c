"""Pipelines of random weights: what tests, benchmarks and a dry run take where published weights
would be too large, or are not at hand.

``FAMILIES`` says what each family is made of, at a small size and at the size of the published
checkpoint; ``write_pipeline`` makes a folder of it that plain diffusers opens, and ``count_family``
and ``count_folder`` count parameters without memory for any.

records.py       what a family is: its networks, tokenizers and scheduler
families.py      the table of families
unets.py, joint_transformers.py, cross_transformers.py  families by what their denoiser is
encoders.py      the text encoders they share
autoencoders.py  the autoencoders they share
tokenizers.py    tokenizers that read letter by letter
empty.py         networks without memory for weights, and their numbers
weights.py       random weights, a file after the other
folder.py        the pipeline folder
"""

from rlalign.networks.random_models.empty import (
    count_family,
    count_folder,
    count_parameters,
    empty_networks,
    empty_pipeline,
    empty_pipeline_of,
)
from rlalign.networks.random_models.families import FAMILIES, HUB_IDS, find_family
from rlalign.networks.random_models.folder import disk_bytes, refuse_small_disk, write_pipeline
from rlalign.networks.random_models.records import Family, Network, Size

__all__ = [
    "FAMILIES",
    "HUB_IDS",
    "Family",
    "Network",
    "Size",
    "count_family",
    "count_folder",
    "count_parameters",
    "disk_bytes",
    "empty_networks",
    "empty_pipeline",
    "empty_pipeline_of",
    "find_family",
    "refuse_small_disk",
    "write_pipeline",
]
