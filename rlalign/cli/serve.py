"""``rlalign serve-reward``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlalign.registry import UserError


def serve_reward(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A reward, as in a run file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Its settings; server.KEY=VALUE is one of the server's."),
    ] = None,
    host: Annotated[str, typer.Option(metavar="H", help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="P", help="Port to listen on; 0 takes a free one.")] = 8900,
    replicas: Annotated[int, typer.Option(metavar="N", help="Processes that hold the reward.")] = 1,
    address: Annotated[
        str | None,
        typer.Option(metavar="A", help="Hold them on the Ray cluster at this address (auto finds one here)."),
    ] = None,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="Serve whoever asks; on a loopback address only.")
    ] = False,
) -> None:
    """Serve a reward over HTTP, for runs in other processes and on other machines (name: http).

    The token is in the environment variable RLALIGN_REWARD_TOKEN, here and where the run computes its rewards.
    """
    from rlalign.config.files import override, parse
    from rlalign.registry import build
    from rlalign.rewards.base import Reward
    from rlalign.runtime.serve import ServeSettings
    from rlalign.runtime.serve import serve_reward as serve

    given: dict[str, object] = {}
    for assignment in overrides or []:
        override(given, assignment)
    server = given.pop("server", {})
    if not isinstance(server, dict):
        raise UserError("server must be a mapping of settings, as in server.device=cuda")
    flags = {"host": host, "port": port, "replicas": replicas, "with_token": not no_token}
    if clash := sorted(set(server) & set(flags)):
        raise UserError(f"server.{clash[0]} has an option of its own; rlalign serve-reward --help shows it")
    settings = parse(ServeSettings, {**server, **flags})
    reward = build("rewards", {**given, "name": name}, "reward")
    assert isinstance(reward, Reward)

    def say(url: str) -> None:
        whose = f"the token is in {settings.token_env}" if settings.with_token else "without a token"
        count = f"{replicas} replica{'s' if replicas > 1 else ''}"
        print(f"serving reward {reward.title} at {url} ({count}); {whose}; Ctrl-C ends it", flush=True)

    serve(reward, settings, address=address, on_ready=say)
