"""A reward behind HTTP: Ray Serve holds and watches the replicas, this process listens.

    client -> this process: web.front.Front -> Ray Serve -> one of N replicas: read, score, answer

The token stays in this process. What it lets through goes to the replicas as bytes, and each reads
its own requests, so decoding grows with the replicas. A request is scored as it came, never
together with another one: its scores depend on nothing but itself. Ray Serve's own HTTP proxy is
off: it would answer some paths without the token and take in a body before anyone has looked at its
length.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlalign.config.runtime import refuse_share
from rlalign.core.locations import locate
from rlalign.core.registry import UserError
from rlalign.networks import devices
from rlalign.networks.devices import usable
from rlalign.rewards.base import Reward, Scorer, refuse_latents, score
from rlalign.runtime import cluster
from rlalign.runtime.placement import HERE, Bundle, Node, cluster_nodes, place, this_machine
from rlalign.runtime.roles import REPLICA
from rlalign.web.front import MAX_WAITING, Front
from rlalign.web.listening import bound, certificate_files, listen, url_of
from rlalign.web.protocol import read_request, scores_body
from rlalign.web.refused import Refused, error_body
from rlalign.web.token import TOKEN_ENV, digest, is_loopback, read_token

logger = logging.getLogger(__name__)

APPLICATION = "rlalign-reward"


class ServeSettings(BaseModel):
    """How a reward is served; ``server.KEY=VALUE`` on the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="address to listen on; the default is this machine only",
    )
    port: int = Field(default=8900, ge=0, le=65535, description="0 takes a free one")
    replicas: int = Field(default=1, ge=1, le=1000, description="processes that hold the reward")
    with_token: bool = Field(default=True, description="refuse who does not know the token")
    token_env: str = Field(
        default=TOKEN_ENV,
        pattern=r"^[A-Z_][A-Z0-9_]*$",
        description="environment variable that holds the token",
    )
    certificate: str = Field(default="", description="certificate chain (PEM), for https")
    key: str = Field(default="", description="its private key (PEM)")
    device: str = Field(
        default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="torch device of each replica"
    )
    gpus: float = Field(
        default=0.0, ge=0, description="GPUs, or the share of one, that a replica reserves"
    )
    threads: int = Field(default=1, ge=1, description="torch threads of a replica")
    timeout_seconds: float = Field(
        default=120.0,
        gt=0,
        le=3600,
        description="a request that takes longer is given up, and a replica that hangs replaced",
    )
    start_seconds: float = Field(
        default=600.0, gt=0, description="how long the replicas may take to find a place and load"
    )

    @model_validator(mode="after")
    def _device_and_gpus_go_together(self) -> ServeSettings:
        refuse_share("server.gpus", self.gpus, of_gpus=True)
        if self.device not in ("cpu", "cuda"):
            raise UserError(
                f"server.device must be cpu or cuda, got {self.device}: Ray gives every replica a"
                " GPU of its own"
            )
        if self.device == "cuda" and not self.gpus:
            raise UserError(
                "server.gpus must be > 0 where server.device is cuda, got 0; shares of a GPU are"
                " fine"
            )
        return self


class Replica:
    """Holds one reward's scorer and answers one request after the other. Ray Serve replaces it
    where it is not healthy."""

    def __init__(self, reward: Reward, device: str, threads: int, timeout_seconds: float) -> None:
        import torch

        from rlalign.runtime.workers import naming_the_node

        serve_calls_on_loopback()
        torch.set_num_threads(threads)
        self._reward, self._timeout = reward, timeout_seconds
        self._one_at_a_time = threading.Lock()
        self._since = math.inf
        self._mistake = ""
        try:
            with naming_the_node():
                self._scorer: Any = reward.load_scorer(usable(device, "server.device"))
        except UserError as error:
            # said by the driver; an exception here would be tried again and again
            self._mistake = str(error)

    async def mistake(self) -> str:
        """Why the reward could not be loaded, "" where it was."""
        return self._mistake

    async def score(self, body: bytes) -> tuple[int, bytes]:
        """(status, body) of the answer. The thread keeps this process answering while it scores."""
        return await asyncio.to_thread(self._score, body)

    def _score(self, body: bytes) -> tuple[int, bytes]:
        with self._one_at_a_time:
            self._since = time.monotonic()
            try:
                return answer(self._reward, self._scorer, body)
            finally:
                self._since = math.inf

    async def check_health(self) -> None:
        """Asked by Ray Serve. A thread cannot be stopped, so a replica whose reward hangs is
        replaced."""
        if time.monotonic() - self._since > self._timeout:
            raise RuntimeError(
                f"the reward {self._reward.title} has not answered for {self._timeout:g} s"
            )


def serve_calls_on_loopback() -> None:
    """Keeps the gRPC port that every replica of Ray Serve opens from the network.

    It is for callers that choose gRPC over Ray's own calls; ours do not. Ray opens it on all
    interfaces, and unpickles what comes in. There is no setting for it (Ray 2.60,
    ``ray/serve/_private/replica.py``), so the address is changed where this process would open it.
    """
    from grpc.aio import _server  # type: ignore[attr-defined]

    if getattr(_server.Server, "on_loopback", False):
        return

    # only the host of the address that Ray hands over is replaced
    def narrowed(method: str) -> Callable[..., int]:
        opens = getattr(_server.Server, method)

        def open_on_loopback(self: Any, address: str, *more: Any) -> int:
            return opens(self, f"127.0.0.1:{address.rpartition(':')[2]}", *more)

        return open_on_loopback

    # a second call must not wrap the methods again
    for method in ("add_insecure_port", "add_secure_port"):
        setattr(_server.Server, method, narrowed(method))
    _server.Server.on_loopback = True  # type: ignore[attr-defined]


def serve_reward(
    reward: Reward, settings: ServeSettings, *, address: str | None, on_ready: Callable[[str], None]
) -> None:
    """Serves until SIGINT or SIGTERM; ``on_ready`` gets the URL. Raises UserError on a user's
    mistake."""
    # what can be refused is refused before Ray starts
    refuse_latents([reward], "reward", "a request over HTTP has")
    reward = locate(reward, "reward", here=address is None)
    token = _token(settings)
    certificate = certificate_files(settings.certificate, settings.key, "server")
    made = bound(settings.host, settings.port)
    try:
        # Ray ends before the socket closes
        _start_ray(_bundles(settings), address)
        try:
            handle = _deploy(reward, settings)
            front = Front(
                title=reward.title, score=_asker(handle, settings.timeout_seconds), token=token
            )
            url = url_of(made, encrypted=bool(certificate))
            asyncio.run(listen(front, made, on_ready=lambda: on_ready(url), **certificate))
        finally:
            _end(address)
    finally:
        made.close()


def _token(settings: ServeSettings) -> bytes | None:
    """The token's digest. The variable is taken out of the environment, so that no process started
    from here inherits it."""
    if not settings.with_token:
        if not is_loopback(settings.host):
            raise UserError(
                f"--no-token is for a loopback address, got --host {settings.host}: anybody could"
                " ask there"
            )
        return None
    token = read_token(settings.token_env, "serve-reward")
    os.environ.pop(settings.token_env)
    return digest(token)


def _bundles(settings: ServeSettings) -> list[Bundle]:
    """One for each replica."""
    needs = {"CPU": 1.0} | ({"GPU": settings.gpus} if settings.gpus else {})
    return [Bundle(role=REPLICA, needs=needs)] * settings.replicas


def _start_ray(bundles: Sequence[Bundle], address: str | None) -> None:
    # a cluster that exists must have room
    if address is not None:
        cluster.join_ray(address)
        _refuse_what_cannot_fit(bundles, cluster_nodes(), f"on the cluster at {address}")
        return
    cluster.prepare_environment(None)
    import ray

    if ray.is_initialized():
        return

    # a Ray of our own gets what this machine has
    here = this_machine(bundles, devices.gpus())
    _refuse_what_cannot_fit(bundles, [here], HERE)
    cluster.start_ray(
        cluster.print_note,
        num_cpus=int(here.total["CPU"]),
        num_gpus=int(here.total["GPU"]),
        include_dashboard=False,
    )


def _refuse_what_cannot_fit(bundles: Sequence[Bundle], nodes: Sequence[Node], where: str) -> None:
    if left := place(bundles, nodes):
        raise UserError(
            f"--replicas: {len(left)} of {len(bundles)} replicas, of {left[0]} each, find no place"
            f" {where}; lower --replicas or server.gpus, or name a larger cluster with --address"
        )


def _deploy(reward: Reward, settings: ServeSettings) -> Any:
    """The handle of the running replicas. Raises UserError where they do not come up, with the
    reason."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # the import has set it
    others = sorted(serve.status().applications)
    if others:
        raise UserError(
            f"the cluster already serves {', '.join(others)} with Ray Serve; end that first, or"
            " leave --address out"
        )
    serve.start(proxy_location="Disabled")
    application = (
        serve.deployment(Replica)
        .options(
            num_replicas=settings.replicas,
            max_ongoing_requests=MAX_WAITING,
            graceful_shutdown_timeout_s=5.0,
            health_check_period_s=min(5.0, settings.timeout_seconds),
            health_check_timeout_s=30.0,
            max_constructor_retry_count=2,
            ray_actor_options={"num_cpus": 1, "num_gpus": settings.gpus},
        )
        .bind(reward, settings.device, settings.threads, settings.timeout_seconds)
    )
    target = serve.RunTarget(target=application, name=APPLICATION, route_prefix=None)
    [handle] = serve.run_many([target], wait_for_applications_running=False)

    # a replica that cannot start is reported, and one that is slow is waited for
    deadline = time.monotonic() + settings.start_seconds
    while (found := serve.status().applications[APPLICATION]).status != "RUNNING":
        one = next(iter(found.deployments.values()), None)
        said = (one.message if one else "") or found.message
        if found.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise RuntimeError(f"the replicas of {reward.title} failed to start:\n{said}")
        if time.monotonic() > deadline:
            raise UserError(
                f"the replicas did not start within {settings.start_seconds:g} s"
                f" (server.start_seconds): {said}"
            )
        time.sleep(0.1)
    if mistake := handle.mistake.remote().result(timeout_s=60.0):
        raise UserError(mistake)
    return handle


def _asker(handle: Any, timeout_seconds: float) -> Callable[[bytes], Any]:
    import ray.exceptions
    from ray.serve.exceptions import RayServeException

    async def ask(body: bytes) -> tuple[int, bytes]:
        try:
            return await asyncio.wait_for(handle.score.remote(body), timeout_seconds)
        except TimeoutError:
            return 504, error_body(f"the reward has not answered for {timeout_seconds:g} seconds")
        except (ray.exceptions.RayActorError, RayServeException):
            return 503, error_body(
                "the process that scored this has died; another one takes its place"
            )

    return ask


def _end(address: str | None) -> None:
    """Ends what was started: a local Ray as a whole, on a cluster what serves."""
    import ray
    from ray import serve

    quiet = io.StringIO()  # Ray reports that the controller dies of its own shutdown
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        if address is not None:
            serve.shutdown()
        ray.shutdown()


def answer(reward: Reward, scorer: Scorer, body: bytes) -> tuple[int, bytes]:
    """(status, body) of the answer to a request's body: 200 with scores, or one sentence on what is
    wrong with whom.

    Under ``on_error: raise`` a score that is not finite is answered as null, so that the client's
    policy decides; a reward that raises is 500, or 422 where it says itself that the request is the
    mistake.
    """
    # a scorer's failure is kept, so that the answer can name it
    failures: list[Exception] = []

    def heard(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        try:
            return scorer(media_BFCHW, prompts)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a user's scorer raises
            failures.append(error)
            return torch.full((len(prompts),), torch.nan)

    # a request that cannot be read, or a user's mistake, has a status of its own
    try:
        media_BFCHW, prompts = read_request(body)
        if reward.on_error == "raise":
            score_B = score(
                reward.model_copy(update={"on_error": "drop"}), heard, media_BFCHW, prompts
            )
        else:
            score_B = score(reward, scorer, media_BFCHW, prompts)
    except Refused as error:
        return error.status, error_body(error.sentence)
    except UserError as error:
        return 422, error_body(str(error))
    if failures:
        logger.error("the reward %s failed", reward.title, exc_info=failures[0])
        said = ": ".join([type(failures[0]).__name__, *str(failures[0]).strip().splitlines()[:1]])
        return 500, error_body(f"the reward {reward.title} failed: {said[:300]}")
    return 200, scores_body(score_B, reward.title)
