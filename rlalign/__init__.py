"""Aligns diffusion models with rewards and preferences: on one laptop or on a Ray cluster, with the
same numbers.

    policy = rlalign.load_policy("tiny")
    media = policy.sample(["a red circle"], steps=10, seed=0)
    print(rlalign.load_reward("shapes")(media, ["a red circle"]))

    run = rlalign.load_run("configs/quickstart.yaml", ["rounds=5"])
    rlalign.train_local(run, Path("runs/mine"), resume=False, on_record=print)

The words that the code uses:

run         everything that one YAML file says; the same run gives the same numbers
recipe      a plug-in: a frozen model; its fields are the settings, its methods the behaviour
shelf       a folder of plug-ins (policies, rewards, algorithms, samplers, prompts, sinks, limits,
            optimizers): the name in the YAML is the file's name
sink        where a run's numbers and pictures go beside its own files
family      how the checkpoints of one kind are told words, asked, and decoded; verbs without state
policy      the denoiser that is aligned: a family with weights, a precision and a meter
look        one guided answer of a policy: as many denoiser calls as its family asks for
plan        how a picture is made: steps, step rule, eta, guidance, size
step        one denoising step: a Gaussian over the next latent
unit        a fixed group of prompts with its noise, the smallest piece of work
trajectory  a unit, denoised: its latents and their log-probs
reward      a recipe whose scorer gives one number per picture; larger is better
round       produce, score, learn
update      one step of the optimiser
item        what people can be asked: a caption and pictures; dealt to a person it is a ballot, and
            the answer is a vote
staleness   how many rounds the policy that made the samples lags behind the learner

Importing rlalign imports neither torch nor Ray nor diffusers: each public name loads its home when
it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlalign.core import moved

if TYPE_CHECKING:
    from rlalign.algorithms.base import Algorithm, Loss
    from rlalign.alignment.api import load_policy, load_reward
    from rlalign.alignment.execution import execute_plans
    from rlalign.alignment.loop import train_local
    from rlalign.config import Run, load_run
    from rlalign.core.records import Plan, Scored, Trajectory, Unit
    from rlalign.core.registry import Recipe, UserError
    from rlalign.data.prompts.base import Prompts
    from rlalign.learning.learner import Learner
    from rlalign.policies.base import Policy, PolicyRecipe
    from rlalign.rewards.base import Reward, Scorer
    from rlalign.runtime import train_on_ray

__version__ = "0.1.0"

moved.install()

_HOMES = {
    "Algorithm": "algorithms.base",
    "Learner": "learning.learner",
    "Loss": "algorithms.base",
    "Plan": "core.records",
    "Policy": "policies.base",
    "PolicyRecipe": "policies.base",
    "Prompts": "data.prompts.base",
    "Recipe": "core.registry",
    "Reward": "rewards.base",
    "Run": "config",
    "Scored": "core.records",
    "Scorer": "rewards.base",
    "Trajectory": "core.records",
    "Unit": "core.records",
    "UserError": "core.registry",
    "execute_plans": "alignment.execution",
    "load_policy": "alignment.api",
    "load_reward": "alignment.api",
    "load_run": "config",
    "train_local": "alignment.loop",
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
    "execute_plans",
    "load_policy",
    "load_reward",
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
