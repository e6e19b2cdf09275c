"""``rlalign serve-reward``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlalign.cli.common import override_argument
from rlalign.core.registry import UserError

if TYPE_CHECKING:
    from rlalign.runtime.serving import ServeSettings


Env = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Requirements file of packages that this reward needs beside the run's own.",
        show_default=False,
    ),
]
Host = Annotated[str, typer.Option(metavar="H", help="Address to listen on; 0.0.0.0 is every one.")]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="A", help="Hold them on the Ray cluster at this address (auto finds one here)."
    ),
]


def serve_reward(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A reward, as in a run file.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        override_argument("Its settings; server.KEY=VALUE is one of the server's."),
    ] = None,
    host: Host = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="P", help="Port to listen on; 0 takes a free one.")
    ] = 8900,
    replicas: Annotated[int, typer.Option(metavar="N", help="Processes that hold the reward.")] = 1,
    address: Address = None,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="Serve whoever asks; on a loopback address only.")
    ] = False,
    env: Env = None,
) -> None:
    """Serve a reward over HTTP, for runs in other processes and on other machines (name: http).

    The token is in the environment variable RLALIGN_REWARD_TOKEN, here and where the run computes
    its rewards.
    """
    flags = {"host": host, "port": port, "replicas": replicas, "with_token": not no_token}
    given, settings = _parse(overrides or [], flags)
    if env is not None:
        if address is not None:
            raise UserError(
                "--env is for a server that holds its replicas here; with --address the nodes of"
                " the cluster need the packages"
            )
        options = ["--host", host, "--port", str(port), "--replicas", str(replicas)]
        options += ["--no-token"] * no_token
        _go_into(env, [name, *(overrides or []), *options], settings)
    _serve({**given, "name": name}, settings, address)


def _serve(given: Mapping[str, Any], settings: ServeSettings, address: str | None) -> None:
    from rlalign.core.registry import build
    from rlalign.rewards.base import Reward
    from rlalign.runtime.serving import serve_reward as serve

    reward = build("rewards", given, "reward")
    assert isinstance(reward, Reward)

    def print_ready(url: str) -> None:
        token = (
            f"the token is in {settings.token_env}" if settings.with_token else "without a token"
        )
        count = f"{settings.replicas} replica{'s' if settings.replicas > 1 else ''}"
        line = f"serving reward {reward.title} at {url} ({count}); {token}; Ctrl-C ends it"
        print(line, flush=True)

    serve(reward, settings, address=address, on_ready=print_ready)


def _go_into(requirements: Path, arguments: Sequence[str], settings: ServeSettings) -> None:
    """Becomes the same command in the environment of a requirements file. The token stays in an
    environment variable, which the installer does not see."""
    from rlalign.runtime.environments import environment_of, inside, python_of

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    folder = environment_of(requirements, say, hide=[settings.token_env])
    python = str(python_of(folder))
    command = [python, "-m", "rlalign", "serve-reward", *arguments]
    sys.stdout.flush()
    os.execve(python, command, inside(folder, os.environ))


def _parse(overrides: list[str], flags: dict[str, object]) -> tuple[dict[str, Any], ServeSettings]:
    """The reward's settings and the server's, of ``server.KEY=VALUE`` and of the command's own
    options. Raises UserError for a setting that is both."""
    from rlalign.config.files import override, parse
    from rlalign.runtime.serving import ServeSettings

    # settings of the reward, and server.KEY of the server
    given: dict[str, object] = {}
    for assignment in overrides:
        override(given, assignment)
    server = given.pop("server", {})
    if not isinstance(server, dict):
        raise UserError("server must be a mapping of settings, as in server.device=cuda")
    if clash := sorted(set(server) & set(flags)):
        raise UserError(
            f"server.{clash[0]} has an option of its own; rlalign serve-reward --help shows it"
        )
    return given, parse(ServeSettings, {**server, **flags})
