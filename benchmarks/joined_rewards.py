"""Whether a reward saves time by scoring several units of work in one call of its network, and
whether scores are the same.

    python benchmarks/joined_rewards.py [--threads N] [--of NAME ...] [--device DEVICE]

Units of 4 and of 16 pictures (two prompts each) are scored one by one, and 2, 4 and 8 of them in
one call, in turns in one process; a row is the median of the turns' ratios. ``NAME`` is an
architecture of open_clip, whose CLIP has random weights (time and rounding do not depend on the
values; ``tiny`` is that of the shipped reward), or ``jpeg``, ``tesseract``, or ``judge``: a server
in this process that takes 50 ms for an answer and is asked 8 questions at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

from rlalign.core.registry import build
from rlalign.networks.towers import build_towers
from rlalign.rewards.base import Reward, Scorer, score

UNITS = (4, 16)
"""Pictures of a unit."""
JOINED = (2, 4, 8)
"""Units of a call."""
TURNS = 5


ANSWER_SECONDS = 0.05


def measure(
    reward: Reward, scorer: Scorer, size: int, joined: int, turns: int = TURNS
) -> tuple[float, float, float, float]:
    """(seconds of a unit one by one, ratio of joined to one by one, the largest distance of a turn
    from it, largest difference of a score)."""
    rng = np.random.default_rng([size, joined])
    prompts = [f'a picture of "number {n // max(size // 2, 1)}"' for n in range(joined * size)]

    def drawn() -> np.ndarray:
        # other ones each time: a judge remembers
        return rng.integers(0, 256, (joined * size, 1, 3, 64, 64), dtype=np.uint8)

    def one_by_one(media: np.ndarray) -> np.ndarray:
        parts = [slice(at, at + size) for at in range(0, len(media), size)]
        return np.concatenate([score(reward, scorer, media[p], prompts[p]) for p in parts])

    def together(media: np.ndarray) -> np.ndarray:
        return score(reward, scorer, media, prompts)

    same = drawn()
    difference = float(np.abs(one_by_one(same) - together(same)).max())  # and both are warm
    pairs = [(timed(one_by_one, drawn()), timed(together, drawn())) for _ in range(turns)]
    ratios = [b / a for a, b in pairs]
    ratio = statistics.median(ratios)
    spread = max(abs(r - ratio) for r in ratios)
    return statistics.median(a for a, _ in pairs) / joined, ratio, spread, difference


def timed(work: Callable[[np.ndarray], object], media: np.ndarray) -> float:
    begin = time.perf_counter()
    work(media)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def clip(architecture: str, device: str) -> tuple[Reward, Scorer]:
    """CLIP's cosine with random weights."""
    towers = build_towers(architecture).eval().to(device).requires_grad_(requires_grad=False)

    def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return towers.cosine(media_BFCHW.to(device), prompts).cpu()

    return reward_of("clip"), scorer


def reward_of(name: str, **settings: Any) -> Reward:
    made = build("rewards", {"name": name, **settings})
    assert isinstance(made, Reward)
    return made


class _Judge(BaseHTTPRequestHandler):
    """A chat server that thinks for a while."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(ANSWER_SECONDS)
        said = {"message": {"role": "assistant", "content": "Final Score: 4"}}
        body = json.dumps({"choices": [said], "usage": {"total_tokens": 1}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def subject(name: str, device: str) -> tuple[Reward, Scorer]:
    """What a row measures, by its name."""
    if name == "judge":
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        reward = reward_of("vlm_judge", model="m", url=url, concurrency=8)
    elif name in ("jpeg", "tesseract"):
        reward = reward_of(name)
    else:
        return clip(name, device)
    return reward, reward.load("cpu")


def table(names: Sequence[str], device: str) -> None:
    """Prints a row for each subject, size of unit and number of units."""
    print(
        "| scores | pictures of a unit | units joined | a unit alone, ms | joined / one by one |"
        " largest difference of a score |"
    )
    print("|---|---|---|---|---|---|")
    for name in names:
        reward, scorer = subject(name, device)
        for size in UNITS:
            for joined in JOINED:
                alone, ratio, spread, difference = measure(reward, scorer, size, joined)
                print(
                    f"| {name} | {size} | {joined} | {1000 * alone:.1f} |"
                    f" {ratio:.2f} +- {spread:.2f} | {difference:.1g} |",
                    flush=True,
                )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--of", nargs="+", default=["tiny", "jpeg", "tesseract", "judge"])
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    table(given.of, given.device)


if __name__ == "__main__":
    main()
