"""The Run and the settings of its runtime; what must fit together is checked here."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from rlalign.algorithms.base import Algorithm
from rlalign.checkpoint import CheckpointSettings
from rlalign.data.preferences import PreferenceSettings
from rlalign.data.prompts.base import Prompts
from rlalign.evaluate import EvaluateSettings
from rlalign.guard import GuardSettings
from rlalign.learner import LearnerSettings
from rlalign.policies.base import PolicyRecipe
from rlalign.records import Plan
from rlalign.registry import UserError, build
from rlalign.rewards.base import Reward

SMALLEST_SHARE = 1e-4
"""Of a resource: Ray counts in ten-thousandths."""
_RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")


class RuntimeSettings(BaseModel):
    """Who does the work and where. None of it changes the numbers, except ``max_staleness`` and where things compute.

    Policies, in rollout and learner workers alike, compute on ``device``; rewards do where ``reward_gpus`` is above 0, and on
    the CPU otherwise. That holds in one process and on a cluster, so both give the same numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rollout_workers: int = Field(
        default=2, ge=1, description="actors that denoise (threads of the process with --local)"
    )
    reward_workers: int = Field(default=1, ge=1, description="actors per reward")
    reward_spares: int = Field(
        default=0,
        ge=0,
        description="more actors per reward, loaded, that take over at once where one dies (runs on Ray)",
    )
    learner_workers: int = Field(default=1, ge=1, description="Ray Train workers; must divide learner.shards")
    max_staleness: int = Field(
        default=0, ge=0, description="rounds that the samples' policy may lag behind; 0 is synchronous"
    )
    rollout_threads: int = Field(default=1, ge=1, description="torch threads in a rollout or reward worker")
    learner_threads: int = Field(default=1, ge=1, description="torch threads for each shard of the learner")
    rollout_cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray reserves for a rollout worker")
    rollout_gpus: float = Field(
        default=0.0,
        ge=0,
        description="GPUs, or a share of one, for a rollout worker; on Ray above 0 where device is cuda",
    )
    reward_cpus: float = Field(default=0.25, ge=0, description="CPUs that Ray reserves for a reward worker")
    reward_gpus: float = Field(
        default=0.0, ge=0, description="GPUs, or a share of one, for a reward worker; 0 keeps rewards on the CPU"
    )
    learner_cpus: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for a learner worker")
    learner_gpus: float = Field(
        default=0.0,
        ge=0,
        description="GPUs, or a share of one, for a learner worker; on Ray above 0 where device is cuda",
    )
    rollout_resources: dict[str, float] = Field(
        default_factory=dict,
        description="custom resources of a rollout worker, as {rollout: 1}: which nodes it may use",
    )
    reward_resources: dict[str, float] = Field(default_factory=dict, description="the same for a reward worker")
    learner_resources: dict[str, float] = Field(default_factory=dict, description="the same for a learner worker")
    rollout_labels: dict[str, str] = Field(
        default_factory=dict,
        description="labels that a rollout worker's node must have, as {zone: a} or {gpu: in(h100,a100)}",
    )
    reward_labels: dict[str, str] = Field(default_factory=dict, description="the same for a reward worker")
    learner_labels: dict[str, str] = Field(default_factory=dict, description="the same for a learner worker")
    max_rollout_workers: int = Field(
        default=0, ge=0, description="grow up to so many while the learner waits for samples; 0 keeps rollout_workers"
    )
    max_attempts: int = Field(
        default=3, ge=1, description="tries of one unit, and restarts of the learner, before the run ends"
    )
    unit_timeout_seconds: float = Field(default=600.0, gt=0, description="a worker that takes longer is replaced")
    recovery_seconds: float = Field(default=120.0, gt=0, description="how long a dead worker may take to come back")
    start_seconds: float = Field(
        default=600.0, gt=0, description="how long a pool's first worker may wait for a place on the cluster, and load"
    )
    device: str = Field(
        default="cpu",
        pattern=r"^(cpu|cuda(:\d+)?)$",
        description="torch device of policies, and of rewards where reward_gpus is above 0",
    )

    @property
    def reward_device(self) -> str:
        """Where rewards compute."""
        return self.device if self.reward_gpus else "cpu"

    @model_validator(mode="after")
    def _ray_can_reserve_it(self) -> RuntimeSettings:
        gpus = {"rollout": self.rollout_gpus, "reward": self.reward_gpus, "learner": self.learner_gpus}
        cpus = {"rollout": self.rollout_cpus, "reward": self.reward_cpus, "learner": self.learner_cpus}
        custom = {"rollout": self.rollout_resources, "reward": self.reward_resources, "learner": self.learner_resources}
        for role in gpus:
            refuse_share(f"{role}_cpus", cpus[role])
            refuse_share(f"{role}_gpus", gpus[role], of_gpus=True)
            for name, amount in custom[role].items():
                if name in _RAYS_OWN:
                    raise UserError(
                        f"{role}_resources must have names of their own, got {name!r}, which is Ray's; "
                        f"CPUs and GPUs are {role}_cpus and {role}_gpus"
                    )
                refuse_share(f"{role}_resources", amount)
        return self


def refuse_share(setting: str, amount: float, *, of_gpus: bool = False) -> None:
    """Raises UserError for an amount of a resource that Ray refuses: negative, too fine, or several GPUs and a bit."""
    if not math.isfinite(amount) or amount < 0 or 0 < amount < SMALLEST_SHARE:
        raise UserError(f"{setting} must be 0 or a finite number >= {SMALLEST_SHARE:g}, got {amount:g}")
    if of_gpus and amount > 1 and amount != int(amount):
        raise UserError(f"{setting} must be a share of one GPU or a whole number of them, got {amount:g}")


PLUGINS = {"policy": "policies", "prompts": "prompts", "algorithm": "algorithms"}
"""Field of a Run -> the shelf that its plug-in stands on. (``rewards`` and ``evaluate.rewards`` are lists from one shelf.)"""

_TITLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _recipe(shelf: str) -> BeforeValidator:
    """A plug-in field: built by name; its own errors already carry a path and pass through."""

    def build_one(value: Any) -> Any:
        return build(shelf, value, shelf)

    return BeforeValidator(build_one)


class Run(BaseModel):
    """Everything that defines a run. Same Run, same numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="also the run folder's name")
    seed: int = Field(default=0, ge=0, description="decides prompts and noise")
    rounds: int = Field(default=30, ge=1, description="produce, score, learn: this many times")
    policy: SerializeAsAny[Annotated[PolicyRecipe, _recipe("policies")]]
    plan: Plan = Plan()
    prompts: SerializeAsAny[Annotated[Prompts, _recipe("prompts")]]
    rewards: tuple[SerializeAsAny[Annotated[Reward, _recipe("rewards")]], ...] = Field(min_length=1)
    algorithm: SerializeAsAny[Annotated[Algorithm, _recipe("algorithms")]]
    preferences: PreferenceSettings | None = Field(
        default=None, description="a set of preference pairs to learn from, in place of samples of one's own"
    )
    write_pairs: Literal["", "best_and_worst", "all"] = Field(
        default="", description="write each round's samples as preference pairs into preferences/ of the run folder"
    )
    learner: LearnerSettings = LearnerSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    guard: GuardSettings = GuardSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> Run:
        prompts, learner, runtime = self.prompts, self.learner, self.runtime
        if self.preferences is None and self.units_per_round % learner.updates_per_round:
            raise UserError(
                f"learner.updates_per_round must divide the units of a round ({self.units_per_round} = prompts.per_round "
                f"{prompts.per_round} / prompts.per_unit {prompts.per_unit}), got {learner.updates_per_round}"
            )
        if learner.shards % runtime.learner_workers:
            raise UserError(
                f"learner.shards must be a multiple of runtime.learner_workers ({runtime.learner_workers}), got {learner.shards}"
            )
        if self.guard.held_out and self.guard.held_out not in [r.title for r in self.evaluate.rewards]:
            held_out = ", ".join(r.title for r in self.evaluate.rewards) or "none"
            raise UserError(
                f"guard.held_out must be one of evaluate.rewards ({held_out}), got {self.guard.held_out!r}; add it there"
            )
        if self.preferences is not None and self.algorithm.eats != "pairs":
            raise UserError(f"preferences are for algorithms that learn from pairs, and {self.algorithm.name} does not")
        if self.write_pairs and not self.rolls_out:
            raise UserError("write_pairs needs rounds of scored samples, and this run makes none; leave it empty")
        strict = self.algorithm.strictly_on_policy
        if strict and learner.updates_per_round * learner.epochs != 1:
            raise UserError(
                f"{self._strict_name} is strictly on-policy: learner.updates_per_round and learner.epochs must be 1, "
                f"got {learner.updates_per_round} and {learner.epochs}; or use ddpo with importance_sampling"
            )
        if strict and runtime.max_staleness:
            raise UserError(
                f"{self._strict_name} is strictly on-policy: runtime.max_staleness must be 0, "
                f"got {runtime.max_staleness}; or use ddpo with importance_sampling"
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
                    f"a reward's label must be letters, digits, '.', '_' and '-', and not total (the weighted sum), got {title!r}"
                )
            if titles.count(title) > 1:
                raise UserError(f"rewards: {title!r} appears twice; give one of them a label of its own")
        return self

    @property
    def rolls_out(self) -> bool:
        """Whether rounds learn from samples that the rollout workers make."""
        return self.algorithm.eats != "prompts" and self.preferences is None

    @property
    def samples_itself(self) -> bool:
        """Whether a round makes samples of its own, wherever that happens."""
        return self.preferences is None

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
        """The rewards that score a stream: the trained ones, and in evaluations the held-out ones too."""
        return self.rewards + (self.evaluate.rewards if stream == "evaluate" else ())
