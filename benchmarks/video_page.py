"""The pictures of docs/video.md, from the folders of its runs.

    python benchmarks/video_page.py GRPO FREE GUARDED

GRPO is a run of configs/tiny_video_grpo.yaml, GUARDED one of configs/tiny_video_frozen.yaml, FREE
the same with `guard.limits=[]`. It writes clips before and after, and the curves of what was
trained and what was held out, to docs/images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from rlalign.core.clips import encode_clip
from rlalign.core.pictures import join_clips, read_grid

IMAGES = Path(__file__).parent.parent / "docs" / "images"
SHOWN = 8
"""Clips of a sheet."""


def main() -> None:
    grpo, free, guarded = map(Path, sys.argv[1:])
    for run, name in ((grpo, "video-grpo"), (free, "video-frozen")):
        grids = sorted((run / "samples").glob("round-*.png"))
        for grid, when in ((grids[0], "before"), (grids[-1], "after")):
            sheet = join_clips(read_grid(grid)[:SHOWN])
            data, _ = encode_clip(sheet.media_FCHW, sheet.rate)
            (IMAGES / f"{name}-{when}.webp").write_bytes(data)
    draw_curves(free, guarded, IMAGES / "video-frozen.png")


def draw_curves(free: Path, guarded: Path, path: Path) -> None:
    """Smoothness, which is trained, and the dynamic degree, which is held out, at each evaluation;
    the guarded run's end is marked."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2))
    measures = (
        ("reward/smoothness/mean", "smoothness (trained)"),
        ("held_out/dynamic_degree/mean", "dynamic degree (held out)"),
    )
    for panel, (key, label) in zip(panels, measures, strict=True):
        for run, name, colour in ((free, "no guard", "C3"), (guarded, "guard", "C0")):
            lines = [json.loads(x) for x in (run / "evaluations.jsonl").read_text().splitlines()]
            rounds = [line["round"] for line in lines]
            values = [line[key] for line in lines]
            panel.plot(rounds, values, color=colour, label=name, lw=1.8)
            if run is guarded:
                panel.plot(rounds[-1], values[-1], "o", color=colour)
        panel.set_xlabel("round")
        panel.set_title(label, fontsize=10)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
