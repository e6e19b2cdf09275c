"""Rewards that a server over HTTP computes: where it listens, and how long it is waited for."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator, model_validator

from rlalign.core.locations import LocalPath
from rlalign.core.registry import UserError
from rlalign.rewards._asking import plain_address, refuse_open_network
from rlalign.rewards.base import Reward


class RemoteReward(Reward):
    """Base of a reward on another machine or in another process. No gradient passes."""

    differentiable: ClassVar[bool] = False
    address: ClassVar[str]
    """An address as ``url`` takes it, for messages."""

    url: str = Field(min_length=1, description="where the server listens")
    token_env: str = Field(
        default="",
        pattern=r"^([A-Z_][A-Z0-9_]*)?$",
        description=(
            "environment variable that holds the server's token or key where rewards are computed;"
            " empty: it wants none"
        ),
    )
    timeout_seconds: float = Field(
        default=60.0, gt=0, le=3600, description="how long one answer may take"
    )
    patience_seconds: float = Field(
        default=300.0,
        ge=0,
        le=86400,
        description="how long a server that is down or overloaded is asked again",
    )
    ca_file: LocalPath = Field(
        default="", description="certificates (PEM) to trust for https in place of the usual ones"
    )
    allow_plain_http: bool = Field(
        default=False,
        description="http to another machine, where the network sees the token and the pictures",
    )

    @field_validator("url")
    @classmethod
    def _is_plain(cls, url: str) -> str:
        return plain_address(url, cls.address)

    @model_validator(mode="after")
    def _hides_the_token(self) -> RemoteReward:
        if not self.allow_plain_http:
            refuse_open_network(self.url)
        return self

    def refuse_missing_certificates(self) -> None:
        """Raises UserError where the certificates are not on this machine."""
        if self.ca_file and not Path(self.ca_file).is_file():
            raise UserError(f"rewards.{self.title}.ca_file: no such file {self.ca_file!r}")
