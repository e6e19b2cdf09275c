"""What the actors of a run are for, and the names that each role has in the different places."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Role:
    """What some actors are for. Its names are written here and read nowhere: whoever needs the
    reward of a role asks for it."""

    label: str
    """In messages, tables, status.json and the tags of Ray's metrics."""
    actor: str
    """In an actor's name on the dashboard, before its number."""
    metric: str
    """In the keys of a metrics line."""
    reward: str = ""
    """Title of the reward that is scored; empty for all other roles."""

    def __str__(self) -> str:
        return self.label


def plain_role(name: str) -> Role:
    """A role of one name everywhere."""
    return Role(label=name, actor=name, metric=name)


def reward_role(title: str) -> Role:
    """The role of the workers that score one reward."""
    return Role(
        label=f"reward {title}", actor=f"reward-{title}", metric=f"reward/{title}", reward=title
    )


ROLLOUT = plain_role("rollout")
LEARNER = plain_role("learner")
ENCODER = plain_role("encoder")
COORDINATOR = plain_role("coordinator")
DATA = plain_role("Ray Data")
REPLICA = plain_role("replica")
