"""``rlalign serve-reward``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rlalign.cli.common import override_argument
from rlalign.core.registry import UserError

if TYPE_CHECKING:
    from rlalign.rewards.base import Reward
    from rlalign.runtime.serving import ServeSettings


def serve_reward(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A reward, as in a run file.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        override_argument("Its settings; server.KEY=VALUE is one of the server's."),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="H", help="Address to listen on; 0.0.0.0 is every one.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="P", help="Port to listen on; 0 takes a free one.")
    ] = 8900,
    replicas: Annotated[int, typer.Option(metavar="N", help="Processes that hold the reward.")] = 1,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="A", help="Hold them on the Ray cluster at this address (auto finds one here)."
        ),
    ] = None,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="Serve whoever asks; on a loopback address only.")
    ] = False,
) -> None:
    """Serve a reward over HTTP, for runs in other processes and on other machines (name: http).

    The token is in the environment variable RLALIGN_REWARD_TOKEN, here and where the run computes
    its rewards.
    """
    from rlalign.runtime.serving import serve_reward as serve

    flags = {"host": host, "port": port, "replicas": replicas, "with_token": not no_token}
    reward, settings = _parse(name, overrides or [], flags)

    def print_ready(url: str) -> None:
        token = (
            f"the token is in {settings.token_env}" if settings.with_token else "without a token"
        )
        count = f"{replicas} replica{'s' if replicas > 1 else ''}"
        line = f"serving reward {reward.title} at {url} ({count}); {token}; Ctrl-C ends it"
        print(line, flush=True)

    serve(reward, settings, address=address, on_ready=print_ready)


def _parse(
    name: str, overrides: list[str], flags: dict[str, object]
) -> tuple[Reward, ServeSettings]:
    """The reward and the server's settings, of ``server.KEY=VALUE`` and of the command's own
    options. Raises UserError for a setting that is both."""
    from rlalign.config.files import override, parse
    from rlalign.core.registry import build
    from rlalign.rewards.base import Reward
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
    settings = parse(ServeSettings, {**server, **flags})
    reward = build("rewards", {**given, "name": name}, "reward")
    assert isinstance(reward, Reward)
    return reward, settings
