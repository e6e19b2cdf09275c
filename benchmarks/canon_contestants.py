"""Who takes part in benchmarks/canon.py, and with which settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """An algorithm as configured in a run file, with what is changed."""

    name: str
    title: str
    config: str
    settings: tuple[str, ...] = ()
    rounds: int = 0
    samples_in_updates: bool = False


# The reward is the verifier's, or, where a gradient is needed, the fitted Bradley-Terry model's;
# both are measured for all.
SHARED = ("evaluate.every=2", "evaluate.prompts=64")
FITTED = "evaluate.rewards=[{name: bradley_terry, label: fitted}]"

CONTESTANTS: tuple[Contestant, ...] = tuple(
    Contestant(
        name=name,
        title=title,
        config=config,
        settings=(*SHARED, *settings),
        samples_in_updates=name == "reward_backprop",
    )
    for name, title, config, settings in (
        ("reinforce", "REINFORCE", "tiny_reinforce", (FITTED,)),
        ("ddpo", "DDPO", "quickstart", (FITTED,)),
        ("dpok", "DPOK", "tiny_dpok_shapes", (FITTED,)),
        ("grpo", "GRPO", "tiny_grpo", (FITTED,)),
        ("rwr", "RWR", "tiny_rwr", (FITTED,)),
        ("d3po", "D3PO", "tiny_d3po", (FITTED,)),
        ("diffusion_dpo", "Diffusion-DPO, online", "tiny_diffusion_dpo", (FITTED,)),
        ("diffusion_nft", "DiffusionNFT", "tiny_diffusion_nft", (FITTED,)),
        ("reward_backprop", "DRaFT", "tiny_draft", ()),
        ("flow_grpo", "Flow-GRPO", "tiny_flow_grpo", (FITTED,)),
        ("flow_nft", "DiffusionNFT", "tiny_flow_nft", (FITTED,)),
    )
)

ALIGNED_BASE = "diffusion_dpo"
"""The contestant whose policy (seed 0) the runs on over-optimisation start from."""

# From an aligned policy: in the shipped base washed-out pictures, small files all of them, are
# in-distribution. At a rate at which DDPO's updates carry noise away from the model as well as
# reward: far below it the two go down one curve, DPOK later.
_CURVE = (
    f"policy.path=runs/canon/{ALIGNED_BASE}-0/policy",
    "evaluate.prompts=64",
    "evaluate.grid=16",
    "evaluate.every=2",
    "learner.lr=1e-3",
    "algorithm.clip_range=1e-2",
)
OVER_OPTIMISATION: tuple[Contestant, Contestant] = (
    Contestant(
        name="compress_ddpo",
        title="DDPO",
        config="tiny_compressibility",
        settings=_CURVE,
        rounds=26,
    ),
    Contestant(
        name="compress_dpok",
        title="DPOK",
        config="tiny_dpok",
        settings=(*_CURVE, "algorithm.kl_weight=0.04"),
        rounds=30,
    ),
)

# Diffusion-DPO from a set of 2,000 pairs, in 31 rounds of 64: each pair is seen once, and 16 are
# left.
OFFLINE_PAIRS = 2000
OFFLINE = Contestant(
    name="dpo_offline",
    title="Diffusion-DPO, offline",
    config="tiny_dpo_offline",
    settings=("evaluate.prompts=128", "preferences.path=runs/canon/pairs/pairs.parquet", FITTED),
    rounds=31,
)
