"""Aligns diffusion models with rewards and preferences: on one laptop or on a Ray cluster, with the same numbers.

    run = rlalign.load_run("configs/quickstart.yaml", ["rounds=5"])
    rlalign.train_local(run, Path("runs/mine"), resume=False, on_record=print)

The words that the code uses:

run         everything that one YAML file says; the same run gives the same numbers
recipe      a plug-in: a frozen model whose fields are the settings and whose methods are the behaviour
shelf       a folder of plug-ins: policies, rewards, algorithms, samplers, prompts; the name in the YAML is the file's name
policy      the denoiser that is aligned, with its noise path, its words and its pictures
plan        how a picture is made: steps, step rule, eta, guidance, size
step        one denoising step: a Gaussian over the next latent
unit        a fixed group of prompts with its noise, the smallest piece of work
trajectory  a unit, denoised: its latents and their log-probs
reward      a recipe whose scorer gives one number per picture; larger is better
round       produce, score, learn
update      one step of the optimiser
staleness   how many rounds the policy that made the samples lags behind the learner

Importing rlalign imports neither torch nor Ray nor diffusers: each public name loads its home when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.algorithms.base import Algorithm, Loss
    from rlalign.config import Run, load_run
    from rlalign.data.prompts.base import Prompts
    from rlalign.learner import Learner
    from rlalign.loop import train_local
    from rlalign.policies.base import Policy, PolicyRecipe
    from rlalign.records import Plan, Scored, Trajectory, Unit
    from rlalign.registry import Recipe, UserError
    from rlalign.rewards.base import Reward, Scorer
    from rlalign.runtime import train_on_ray

__version__ = "0.1.0"

_HOMES = {
    "Algorithm": "algorithms.base",
    "Learner": "learner",
    "Loss": "algorithms.base",
    "Plan": "records",
    "Policy": "policies.base",
    "PolicyRecipe": "policies.base",
    "Prompts": "data.prompts.base",
    "Recipe": "registry",
    "Reward": "rewards.base",
    "Run": "config",
    "Scored": "records",
    "Scorer": "rewards.base",
    "Trajectory": "records",
    "Unit": "records",
    "UserError": "registry",
    "load_run": "config",
    "train_local": "loop",
    "train_on_ray": "runtime",
}

__all__ = [
    "Algorithm",
    "Learner",
    "Loss",
    "Plan",
    "Policy",
    "PolicyRecipe",
    "Prompts",
    "Recipe",
    "Reward",
    "Run",
    "Scored",
    "Scorer",
    "Trajectory",
    "Unit",
    "UserError",
    "load_run",
    "train_local",
    "train_on_ray",
]


def __getattr__(name: str) -> Any:
    """A public name, from its home (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rlalign' has no attribute {name!r}")
    return getattr(import_module(f"rlalign.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
