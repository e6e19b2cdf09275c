"""A store with made-up pictures of coloured shapes, its desk, and its page on loopback: what the
tests of the page vote on."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from rlalign.ballots.deal import Deal
from rlalign.ballots.records import Campaign, Item, Picture, digest, picture_uid
from rlalign.ballots.store import Store
from rlalign.web.listening import bound, certificate_files, listen, url_of
from rlalign.web.vote.ballots_desk import BallotsDesk, PictureList
from rlalign.web.vote.desk import About
from rlalign.web.vote.people import Secret, read_secret
from rlalign.web.vote.serving import PageSettings, make_page, serve

COLOURS = ("red", "blue", "green", "orange", "purple", "gold", "teal", "pink")
SHAPES = ("circle", "square", "triangle")
REASONS = ("prompt", "looks", "shape", "text")
ALLOWED = {
    "pairs": ("left", "right", "tie", "both_bad", "skip"),
    "chain": ("left", "right", "tie", "both_bad", "skip"),
    "ab": ("left", "right", "tie", "both_bad", "skip"),
    "rank": ("rank", "skip"),
}


def draw(colour: str, shape: str, other: str, side: int, seed: int) -> bytes:
    """A PNG: one shape on a soft background, a small one of another colour beside it."""
    rng = np.random.default_rng(seed)
    top, bottom = rng.integers(150, 245, size=(2, 3))
    blend = np.linspace(0, 1, side)[:, None, None]
    ground = np.broadcast_to(top * (1 - blend) + bottom * blend, (side, side, 3))
    picture = Image.fromarray(ground.astype(np.uint8))
    brush = ImageDraw.Draw(picture)
    for name, size in ((colour, rng.uniform(0.22, 0.3)), (other, rng.uniform(0.08, 0.12))):
        x, y = rng.uniform(0.3, 0.7, size=2) * side
        _put(brush, shape, name, (float(x), float(y)), float(size) * side)
    file = io.BytesIO()
    picture.save(file, "png", optimize=True)
    return file.getvalue()


def _put(brush: ImageDraw.ImageDraw, shape: str, colour: str, at: tuple[float, float], r: float):
    x, y = at
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        brush.ellipse(box, fill=colour, outline="white", width=3)
    elif shape == "square":
        brush.rectangle(box, fill=colour, outline="white", width=3)
    else:
        brush.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=colour, outline="white")


def fill(
    store: Store, mode: str, *, items: int = 12, count: int = 2, side: int = 64, target: int = 5
) -> BallotsDesk:
    """Campaign "shapes" of a mode with ``items`` questions of ``count`` pictures each, for
    ``target`` people each, and its desk. A store that has it already stays as it is."""
    store.create_campaign(Campaign(id="shapes", mode=mode))  # type: ignore[arg-type]
    pictures: dict[str, list[str]] = {}
    for number in range(items):
        colour = COLOURS[number % len(COLOURS)]
        shape = SHAPES[number % len(SHAPES)]
        caption = f"one {colour} {shape} and a small {COLOURS[(number + 3) % len(COLOURS)]} one"
        uids = pictures.setdefault(caption, [])
        for place in range(6 if mode == "chain" else count):
            other = COLOURS[(number + 3 + place) % len(COLOURS)]
            content = draw(colour, shape, other, side, 100 * number + place)
            uid = picture_uid(content)
            policy = f"policy {'AB'[place % 2]}"
            made = Picture(uid=uid, caption=caption, policy=policy, seed=place)
            store.add_picture(made, content)
            uids.append(uid)
    if mode != "chain":
        store.add_items(
            Item(
                id=digest("item", number),
                campaign="shapes",
                caption=caption,
                uids=tuple(uids),
                target=target,
            )
            for number, (caption, uids) in enumerate(pictures.items())
        )
    return desk_of(store, mode, pictures if mode == "chain" else {})


def desk_of(store: Store, mode: str, pictures: dict[str, list[str]]) -> BallotsDesk:
    about = About(
        title="Which shape?",
        mode=mode,
        allowed=ALLOWED[mode],
        reasons=REASONS,
        points=True,
        typing=mode == "chain",
        names_after=mode == "ab",
    )
    deal = Deal(gold=0.0, repeat=0.0, shared=0.0)
    votes = 0 if mode == "chain" else 10
    return BallotsDesk(
        store=store,
        campaign="shapes",
        about=about,
        source=PictureList(pictures=pictures),
        dealer=deal,
        votes_each=votes,
    )


@dataclass(kw_only=True)
class Served:
    """A page that answers at ``url``."""

    url: str
    desk: BallotsDesk
    secret: Secret

    @property
    def store(self) -> Store:
        return self.desk.store


@contextlib.contextmanager
def served(desk: BallotsDesk, folder: Path, **settings: object) -> Iterator[Served]:
    """The page of a desk in a thread of this process, over a real socket."""
    secret = read_secret(folder / "secret")
    usual = {"port": 0, "with_token": False, "person_per_second": 1e6, "address_per_second": 1e6}
    chosen = PageSettings(**{**usual, **settings})  # type: ignore[arg-type]
    certificate = certificate_files(chosen.certificate, chosen.key, "server")
    page = make_page(desk, chosen, secret, encrypted=bool(certificate))
    made = bound(chosen.host, 0)
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    serving = listen(page.application(), made, on_ready=ready.set, on_end=page.end, **certificate)
    task = loop.create_task(serving)

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        ready.wait()
        yield Served(url=url_of(made, encrypted=bool(certificate)), desk=desk, secret=secret)
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        made.close()
        loop.close()


# --- a server that can be killed ------------------------------------------------------------------


class Process:
    """The page of a store, a file or a URL, in a process of its own, at a fixed port."""

    def __init__(
        self, store: Path | str, secret: Path, mode: str = "pairs", *, target: int = 5
    ) -> None:
        self._command = [sys.executable, __file__, str(store), str(secret), mode, str(target)]
        made = bound("127.0.0.1", 0)
        self.port = made.getsockname()[1]
        made.close()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Returns when the page answers."""
        self._process = subprocess.Popen(
            [*self._command, str(self.port)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().startswith("http")

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


if __name__ == "__main__":
    place, its_secret, its_mode, its_target, its_port = sys.argv[1:]
    its_desk = fill(Store.open(place), its_mode, target=int(its_target))
    chosen = PageSettings(
        port=int(its_port), with_token=False, person_per_second=1e6, address_per_second=1e6
    )
    serve(
        its_desk,
        chosen,
        read_secret(Path(its_secret)),
        on_ready=lambda url: print(url, flush=True),
    )
