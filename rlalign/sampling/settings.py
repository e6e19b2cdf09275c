"""A sample file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from rlalign.alignment.models import Model, find_model
from rlalign.config import RuntimeSettings, load_mapping, parse, parse_plugins
from rlalign.core.locations import URL, NamesFile
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import UserError, build, plugin_field
from rlalign.data.prompts.base import Prompts
from rlalign.policies.base import PolicyRecipe
from rlalign.rewards.base import Reward, refuse_constraints
from rlalign.samplers.base import Sampler


class Budget(BaseModel):
    """What a picture may cost, in place of the method's own numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    denoiser_calls: int = Field(
        ge=1,
        description=(
            "denoiser calls a picture; a guided pass counts twice, and a gradient back through one"
            " as two more"
        ),
    )


def _policy(value: Any) -> Any:
    return value if isinstance(value, str) else build("policies", value, "policy")


class Sample(BaseModel):
    """Everything that defines the pictures. Same Sample, same pictures, on one process or a
    cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="also the folder's name")
    seed: int = Field(default=0, ge=0, description="decides all noise")
    policy: Annotated[
        str | SerializeAsAny[PolicyRecipe],
        BeforeValidator(_policy),
        NamesFile(never=URL, unless=r"\w+"),
    ] = Field(
        description="a policy's settings, or the path or URL of a run folder or pipeline folder"
    )
    interpolation: float = Field(
        default=1.0,
        description=(
            "w in base + w * (aligned - base), of a run folder's policy; 1 is the aligned one"
        ),
    )
    plan: Plan = Plan()
    prompts: SerializeAsAny[Annotated[Prompts, plugin_field("prompts")]]
    pictures: int = Field(default=16, ge=1, description="held-out prompts, one picture each")
    rewards: tuple[SerializeAsAny[Annotated[Reward, plugin_field("rewards")]], ...] = Field(
        min_length=1
    )
    held_out: tuple[SerializeAsAny[Annotated[Reward, plugin_field("rewards")]], ...] = Field(
        default=(), description="rewards that are measured and not followed"
    )
    sampler: SerializeAsAny[Annotated[Sampler, plugin_field("samplers")]]
    budget: Budget | None = Field(default=None, description="decides the method's width")
    compare: bool = Field(
        default=True, description="plain sampling and best-of-N at the same cost beside it"
    )
    rows: int = Field(
        default=16, ge=1, description="samples in a piece of work: the batch of a forward pass"
    )
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="after")
    def _titles_tell_rewards_apart(self) -> Sample:
        titles = [r.title for r in (*self.rewards, *self.held_out)]
        for title in titles:
            if titles.count(title) > 1:
                raise UserError(
                    f"rewards: {title!r} appears twice; give one of them a label of its own"
                )
        refuse_constraints(self.rewards, "rewards")
        refuse_constraints(self.held_out, "held_out")
        followed = self.sampler.needs_gradient or getattr(self.sampler, "follows_reward", False)
        flat = [r.title for r in self.rewards if not r.differentiable]
        if followed and flat:
            raise UserError(
                f"rewards: {self.sampler.name} follows the gradient, and {flat[0]} has none; "
                "use one that has, such as bradley_terry"
            )
        return self

    @model_validator(mode="after")
    def _can_shard_rollouts(self) -> Sample:
        count = self.runtime.rollout.shard
        if count > 1 and self.sampler.needs_whole(self.plan):
            raise UserError(
                f"runtime.rollout.shard must be 1 for sampler {self.sampler.name} as it is set, got"
                f" {count}: its gradients go through the denoiser, or it needs a copy of it, and"
                " no process has the whole; take another sampler"
            )
        return self

    def rewards_for(self, stream: str) -> tuple[Reward, ...]:
        """The rewards that are followed, and, at the end, the held-out ones too."""
        return self.rewards + (self.held_out if stream == "evaluate" else ())

    @cached_property
    def model(self) -> Model:
        """The policy that was named."""
        if isinstance(self.policy, str):
            return find_model(self.policy)
        return Model(title=self.policy.name, recipe=self.policy)

    @property
    def method(self) -> Sampler:
        """The sampler, as wide as the budget allows."""
        return (
            self.sampler.within(self.budget.denoiser_calls, self.plan, self.calls_per_look)
            if self.budget
            else self.sampler
        )

    @property
    def calls_per_look(self) -> int:
        """Denoiser calls of one sample at one step; of the aligned and of its base where both are
        asked."""
        recipe: Any = self.model.recipe
        models = 1 if self.interpolation == 1.0 else 2
        return models * recipe.calls_per_look(self.plan)

    @property
    def unit(self) -> Unit:
        """One row a picture."""
        prompts = self.prompts.held_out(self.pictures)
        rows = [(number, text, sample) for sample, (number, text) in enumerate(prompts)]
        return Unit.of_rows(UnitKey("sample", 0, 0), rows, self.seed, self.plan)


def load_sample(path: Path | str, overrides: Sequence[str] = ()) -> Sample:
    """The Sample of a YAML file with overrides applied."""
    return parse_sample(load_mapping(path, overrides))


def parse_sample(data: Mapping[str, Any]) -> Sample:
    """The Sample of a mapping; errors say where in the file they are."""
    plugins = {"prompts": "prompts", "sampler": "samplers"}
    if not isinstance(data.get("policy"), str):
        plugins["policy"] = "policies"
    return parse(Sample, parse_plugins(data, plugins, ("rewards", "held_out")))
