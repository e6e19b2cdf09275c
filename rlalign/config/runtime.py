"""The settings of a run's runtime: how many workers each role has, and what Ray reserves for
them."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlalign.core.registry import Before, UserError
from rlalign.core.spread import Spread

SMALLEST_SHARE = 1e-4
"""Of a resource: Ray counts in ten-thousandths."""
_RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")


def refuse_share(setting: str, amount: float, *, of_gpus: bool = False) -> None:
    """Raises UserError for an amount of a resource that Ray refuses: negative, too fine, or several
    GPUs and a bit."""
    if not math.isfinite(amount) or amount < 0 or 0 < amount < SMALLEST_SHARE:
        raise UserError(
            f"{setting} must be 0 or a finite number >= {SMALLEST_SHARE:g}, got {amount:g}"
        )
    if of_gpus and amount > 1 and amount != int(amount):
        raise UserError(
            f"{setting} must be a share of one GPU or a whole number of them, got {amount:g}"
        )


class Reserved(BaseModel):
    """What Ray reserves for a worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray reserves for one of them")
    gpus: float = Field(
        default=0.0,
        ge=0,
        description=(
            "GPUs, or a share of one, for one of them; on Ray above 0 where device is cuda"
        ),
    )
    resources: dict[str, float] = Field(
        default_factory=dict,
        description="custom resources of one of them, as {fast: 1}: which nodes it may use",
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="labels that its node must have, as {zone: a} or {gpu: in(h100,a100)}",
    )

    @model_validator(mode="after")
    def _ray_can_reserve_it(self) -> Reserved:
        refuse_share("cpus", self.cpus)
        refuse_share("gpus", self.gpus, of_gpus=True)
        for name, amount in self.resources.items():
            if name in _RAYS_OWN:
                raise UserError(
                    f"resources must have names of their own, got {name!r}, which is Ray's; CPUs"
                    " and GPUs are cpus and gpus"
                )
            refuse_share("resources", amount)
        return self


class Counted(BaseModel):
    """How many workers there are."""

    workers: int = Field(default=1, ge=1, description="actors of this role")


class Workers(Reserved, Counted):
    """The workers of one role: how many there are, and what Ray reserves for each."""


class TorchWorkers(Workers):
    """Workers that compute with a stated number of torch threads."""

    threads: int = Field(
        default=1,
        ge=1,
        description=(
            "torch threads of one of them, or of one shard of the learner; reward workers have the"
            " rollout's"
        ),
    )


class RolloutWorkers(Spread, TorchWorkers):
    """Those that denoise."""

    workers: int = Field(
        default=2, ge=1, description="actors that denoise (threads of the process with --local)"
    )
    max_workers: int = Field(
        default=0,
        ge=0,
        description="grow up to so many while the learner waits for samples; 0 keeps workers",
    )
    shard: Annotated[int, Before(1)] = Field(
        default=1,
        ge=1,
        description=(
            "on Ray, processes of one of them: its frozen denoiser is spread over them (FSDP2),"
            " each makes samples, and cpus, gpus, resources and labels are for each"
        ),
    )

    @model_validator(mode="after")
    def _spreads_over_whole_gpus(self) -> RolloutWorkers:
        if self.shard > 1 and 0 < self.gpus < 1:
            raise UserError(
                "gpus must be a whole number where shard is above 1, one for each of its processes,"
                f" got {self.gpus:g}; set gpus to 1, or shard to 1"
            )
        return self


class RewardWorkers(Workers):
    """Those that score, of each reward."""

    workers: int = Field(default=1, ge=1, description="actors per reward")
    cpus: float = Field(default=0.25, ge=0, description="CPUs that Ray reserves for one of them")
    gpus: float = Field(
        default=0.0,
        ge=0,
        description="GPUs, or a share of one, for one of them; 0 keeps rewards on the CPU",
    )
    spares: int = Field(
        default=0,
        ge=0,
        description=(
            "more actors per reward, loaded, that take over at once where one dies (runs on Ray)"
        ),
    )


class LearnerWorkers(TorchWorkers):
    """Those that learn."""

    workers: int = Field(
        default=1, ge=1, description="Ray Train workers; must divide learner.shards"
    )
    cpus: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for one of them")


class EncoderWorker(Reserved):
    """The one that encodes prompts, where policy.embeddings is actor."""

    gpus: float = Field(
        default=0.0,
        ge=0,
        description="GPUs, or a share of one; 0 keeps text encoders on the CPU",
    )


class RuntimeSettings(BaseModel):
    """Who does the work and where. None of it changes the numbers, except ``max_staleness`` and
    where things compute.

    Policies, in rollout and learner workers alike, compute on ``device``; rewards do where
    ``reward.gpus`` is above 0, and on the CPU otherwise, and so does the one that encodes prompts,
    by ``encoder.gpus``. That holds in one process and on a
    cluster, so both give the same numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rollout: RolloutWorkers = RolloutWorkers()
    reward: RewardWorkers = RewardWorkers()
    learner: LearnerWorkers = LearnerWorkers()
    encoder: EncoderWorker = EncoderWorker()
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="rounds that the samples' policy may lag behind; 0 is synchronous",
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        description="tries of one unit, and restarts of the learner, before the run ends",
    )
    unit_timeout_seconds: float = Field(
        default=600.0, gt=0, description="a worker that takes longer is replaced"
    )
    start_seconds: float = Field(
        default=600.0,
        gt=0,
        description=(
            "how long a worker may take to find a place on the cluster and load, at first and"
            " after it has died"
        ),
    )
    device: str = Field(
        default="cpu",
        pattern=r"^(cpu|cuda(:\d+)?)$",
        description="torch device of policies, and of rewards where reward.gpus is above 0",
    )

    @property
    def reward_device(self) -> str:
        """Where rewards compute."""
        return self.device if self.reward.gpus else "cpu"

    @property
    def encoder_device(self) -> str:
        """Where a process that encodes prompts for all others computes."""
        return self.device if self.encoder.gpus else "cpu"
