"""The Run; what must fit together is checked here."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    model_validator,
)

from rlalign.algorithms.base import Algorithm
from rlalign.config.refit import RefitSettings
from rlalign.config.runtime import RuntimeSettings
from rlalign.core.records import MEDIA, Plan, Space
from rlalign.core.registry import Before, UserError, build, plugin_field
from rlalign.data.pairs.reader import PreferenceSettings
from rlalign.data.prompts.base import Prompts
from rlalign.learning.checkpoint import CheckpointSettings
from rlalign.learning.evaluate import EvaluateSettings
from rlalign.learning.guard import GuardSettings
from rlalign.learning.settings import LearnerSettings
from rlalign.policies.base import LATENTS, WHOLE, Part, PolicyRecipe
from rlalign.rewards.base import Combine, Reward, refuse_constraints, spaces_of
from rlalign.sinks.base import Sink

PLUGINS = {"policy": "policies", "prompts": "prompts", "algorithm": "algorithms"}
"""Field of a Run -> the shelf that its plug-in stands on."""

INSIDE = {"learner.optimizer": "optimizers"}
"""Path of a plug-in in a group, which may be left out -> its shelf."""

LISTS = {
    "evaluate.rewards": ("rewards", "[{name: shapes}]"),
    "guard.limits": ("limits", "[{name: kl, most: 0.01}]"),
    "log": ("sinks", "[{name: tensorboard}]"),
}
"""Path of a list of plug-ins that may be left out -> their shelf, and an example. (``rewards`` is
one that may not.)"""

_TITLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _tensorboard() -> tuple[Any, ...]:
    return (build("sinks", {"name": "tensorboard"}, "log"),)


class Run(BaseModel):
    """Everything that defines a run. Same Run, same numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="also the run folder's name"
    )
    seed: int = Field(default=0, ge=0, description="decides prompts and noise")
    rounds: int = Field(default=30, ge=1, description="produce, score, learn: this many times")
    policy: SerializeAsAny[Annotated[PolicyRecipe, plugin_field("policies")]]
    plan: Plan = Plan()
    prompts: SerializeAsAny[Annotated[Prompts, plugin_field("prompts")]]
    rewards: tuple[SerializeAsAny[Annotated[Reward, plugin_field("rewards")]], ...] = Field(
        min_length=1
    )
    combine: Annotated[Combine, Before("sum")] = Field(
        default="sum",
        description=(
            "how several rewards make one: their weighted sum, the weighted sum of each one's"
            " advantages (normalised), or the product of scores to the power of their weights"
        ),
    )
    algorithm: SerializeAsAny[Annotated[Algorithm, plugin_field("algorithms")]]
    preferences: PreferenceSettings | None = Field(
        default=None,
        description="a set of preference pairs to learn from, in place of samples of one's own",
    )
    refit: Annotated[RefitSettings | None, Before(None)] = Field(
        default=None, description="a reward that is fitted anew on people's votes between rounds"
    )
    write_pairs: Literal["", "best_and_worst", "all"] = Field(
        default="",
        description=(
            "write each round's samples as preference pairs into preferences/ of the run folder"
        ),
    )
    learner: LearnerSettings = LearnerSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    guard: GuardSettings = GuardSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: tuple[SerializeAsAny[Annotated[Sink, plugin_field("sinks")]], ...] = Field(
        default_factory=_tensorboard,
        description="where metrics and pictures go beside the run's own files",
    )
    runtime: RuntimeSettings = RuntimeSettings()
    _as_written: dict[str, Any] = PrivateAttr(default_factory=dict)
    """Settings as the run's config.yaml has them, where ``locate_run`` has made their paths
    absolute."""

    @model_validator(mode="after")
    def _fits_together(self) -> Run:
        prompts = self.prompts
        learner = self.learner
        runtime = self.runtime
        # a round is dealt out evenly, to updates and to learners
        if self.preferences is None and self.units_per_round % learner.updates_per_round:
            raise UserError(
                "learner.updates_per_round must divide the units of a round"
                f" ({self.units_per_round} = prompts.per_round {prompts.per_round} /"
                f" prompts.per_unit {prompts.per_unit}), got {learner.updates_per_round}"
            )
        if learner.shards % runtime.learner.workers:
            raise UserError(
                "learner.shards must be a multiple of runtime.learner.workers"
                f" ({runtime.learner.workers}), got {learner.shards}"
            )
        learner.optimizer.refuse_device(runtime.device)
        # names and kinds of data fit each other
        if self.preferences is not None and not self.algorithm.eats.of_pairs:
            raise UserError(
                f"preferences are for algorithms that learn from pairs, and {self.algorithm.name}"
                " does not"
            )
        if self.write_pairs and not self.rolls_out:
            raise UserError(
                "write_pairs needs rounds of scored samples, and this run makes none; leave it"
                " empty"
            )
        return self

    @model_validator(mode="after")
    def _can_shard(self) -> Run:
        policy = self.policy
        algorithm = self.algorithm
        shard = self.learner.shard
        if shard == "none":
            return self
        adapted = bool(policy.lora_rank or policy.adapter)
        if shard == "base" and not adapted:
            raise UserError(
                "learner.shard base needs a frozen base under an adapter, and all weights are"
                " trained here; take all, or set policy.lora_rank or policy.adapter"
            )
        if shard == "all" and adapted:
            raise UserError(
                "learner.shard all is for runs that train all weights, and an adapter is trained"
                " here, which stays whole; take base, which spreads what is under it"
            )
        if not policy.family.can_spread:
            raise UserError(
                f"learner.shard must be none for policy {policy.name}, whose denoiser is no row of"
                f" transformer blocks, got {shard!r}"
            )
        if not algorithm.passes_are_even:
            raise UserError(
                f"learner.shard must be none for {algorithm.name} as it is set, got {shard!r}: its"
                " passes ask the denoiser unequally often, and learners that share one take theirs"
                " in step"
            )
        if shard == "all":
            self._refuse_whole_parts()
        return self

    def _refuse_whole_parts(self) -> None:
        """Raises UserError for what keeps learners from holding a part of the trained weights
        each."""
        optimizer = self.learner.optimizer
        if not optimizer.can_spread:
            raise UserError(
                "learner.optimizer must be adamw with learner.shard all, which steps a weight by"
                f" its rows, got {optimizer.name}: its state needs whole weights"
            )
        trained = getattr(self.policy, "trained_experts", "both")
        if trained != "both":
            raise UserError(
                f"policy.trained_experts must be both with learner.shard all, got {trained!r}: a"
                " pass that asks the frozen one alone has no gradient to sum"
            )

    @model_validator(mode="after")
    def _can_shard_rollouts(self) -> Run:
        self.policy.refuse_spread("runtime.rollout.shard", self.runtime.rollout.shard, trained=True)
        return self

    @model_validator(mode="after")
    def _can_refit(self) -> Run:
        if self.refit is None:
            return self
        if not self.rolls_out:
            raise UserError(
                "refit is for runs whose samples are scored by rewards (ddpo, grpo and the like),"
                f" and this one, of {self.algorithm.name}, is not"
            )
        fitted = [r.title for r in self.rewards if r.fitted is not None]
        if self.refit.reward not in fitted:
            raise UserError(
                "refit.reward must be one of the run's rewards that fit-reward has written"
                f" ({', '.join(fitted) or 'none'}), got {self.refit.reward!r}"
            )
        return self

    @model_validator(mode="after")
    def _guards_what_it_measures(self) -> Run:
        held_out = [r.title for r in self.evaluate.rewards]
        for number, limit in enumerate(self.guard.limits):
            limit.refuse_unmeasured(f"guard.limits.{number}", held_out, self.plan)
        if self.guard.action == "raise_kl" and not getattr(self.algorithm, "kl_weight", 0.0):
            raise UserError(
                "guard.action raise_kl needs an algorithm with a kl_weight > 0 (dpok, grpo,"
                f" diffusion_nft, reward_backprop), and {self.algorithm.name} has none; set one, or"
                " take halve or stop"
            )
        return self

    @model_validator(mode="after")
    def _is_on_policy_where_it_must(self) -> Run:
        if not self.algorithm.strictly_on_policy:
            return self
        learner = self.learner
        if learner.updates_per_round * learner.epochs != 1:
            raise UserError(
                f"{self._strict_name} is strictly on-policy: learner.updates_per_round and"
                f" learner.epochs must be 1, got {learner.updates_per_round} and {learner.epochs};"
                " or use ddpo with importance_sampling"
            )
        if self.runtime.max_staleness:
            raise UserError(
                f"{self._strict_name} is strictly on-policy: runtime.max_staleness must be 0, "
                f"got {self.runtime.max_staleness}; or use ddpo with importance_sampling"
            )
        return self

    @property
    def _strict_name(self) -> str:
        has_forms = "form" in type(self.algorithm).model_fields
        return "algorithm.form score_function" if has_forms else f"algorithm {self.algorithm.name}"

    @model_validator(mode="after")
    def _titles_tell_rewards_apart(self) -> Run:
        titles = [r.title for r in (*self.rewards, *self.evaluate.rewards)]
        for title in titles:
            if title == "total" or not _TITLE.fullmatch(title):
                raise UserError(
                    "a reward's label must be letters, digits, '.', '_' and '-', and not total"
                    f" (the weighted sum), got {title!r}"
                )
            if titles.count(title) > 1:
                raise UserError(
                    f"rewards: {title!r} appears twice; give one of them a label of its own"
                )
        return self

    @model_validator(mode="after")
    def _combines_what_it_can(self) -> Run:
        name = self.algorithm.name
        has_constraint = any(r.at_least is not None for r in self.rewards)
        refuse_constraints(self.evaluate.rewards, "evaluate.rewards")
        if self.combine == "normalised" and not (self.rolls_out and self.algorithm.normalises):
            raise UserError(
                f"combine must be sum or product for {name} as it is set, got 'normalised': it"
                " divides no reward by its spread; take ddpo or dpok (with an advantage other than"
                " centred), grpo or diffusion_nft"
            )
        if not self.rolls_out and (self.combine == "product" or has_constraint):
            which = "combine must be sum" if self.combine == "product" else "at_least is"
            raise UserError(
                f"{which} {'where' if self.combine == 'product' else 'for runs in which'} rounds of"
                f" scored samples are learned from, and this run of {name} makes none; leave it out"
            )
        light = [r.title for r in self.rewards if r.weight < 0]
        if self.combine == "product" and light:
            raise UserError(
                f"rewards.{light[0]}.weight must be >= 0 under combine: product, where it is a"
                " power; leave it out, or take combine: sum"
            )
        return self

    @property
    def rolls_out(self) -> bool:
        """Whether rounds learn from samples that the rollout workers make."""
        return not self.algorithm.eats.sampled_by_loss and self.preferences is None

    @property
    def samples_itself(self) -> bool:
        """Whether a round makes samples of its own, wherever that happens."""
        return self.preferences is None

    @property
    def learner_parts(self) -> frozenset[Part]:
        """What a learner needs of the policy's checkpoint: the autoencoder where it sees
        pictures."""
        sees_media = self.algorithm.sees_media or self.preferences is not None
        return WHOLE if sees_media else LATENTS

    @property
    def units_per_round(self) -> int:
        """Units of work that one round is made of."""
        return self.prompts.per_round // self.prompts.per_unit

    @property
    def samples_per_unit(self) -> int:
        """Samples in one unit of work: the batch of a rollout's forward pass."""
        return self.prompts.per_unit * self.prompts.samples_per_prompt

    @property
    def samples_per_round(self) -> int:
        """Samples in one round."""
        return self.prompts.per_round * self.prompts.samples_per_prompt

    def rewards_for(self, stream: str) -> tuple[Reward, ...]:
        """The rewards that score a stream: the trained ones, and in evaluations the held-out ones
        too."""
        return self.rewards + (self.evaluate.rewards if stream == "evaluate" else ())

    def spaces_for(self, stream: str) -> frozenset[Space]:
        """Where a stream's samples are wanted: by its rewards, and as media where they are shown to
        people or kept as pairs."""
        is_shown = stream == "evaluate" or bool(self.write_pairs)
        return spaces_of(self.rewards_for(stream)) | (MEDIA if is_shown else frozenset())
