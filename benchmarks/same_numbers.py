"""Whether two checkouts of rlalign give the same numbers: every run file, two rounds, bit for bit.

    python benchmarks/same_numbers.py OTHER [NAME ...] [--whole]

OTHER is another checkout (`git worktree add OTHER COMMIT`); NAMEs are run files of `configs/`, all
that train by default. Both are run by this Python, one after the other, each in a process of its
own, in one process each (`--local`). Rounds are cut down unless `--whole` is given. What is
compared: each line of metrics.jsonl and evaluations.jsonl without what a clock says, and every
tensor of the last checkpoint. It prints a line for each run file, and exits with 1 where anything
differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parents[1]
ROUNDS = ("rounds=2", "checkpoint.every=2", "evaluate.every=0")
SMALL = (
    "plan.steps=5",
    "prompts.per_round=2",
    "prompts.samples_per_prompt=4",
    "prompts.per_unit=1",
    "learner.updates_per_round=2",
    "evaluate.prompts=4",
    "evaluate.grid=2",
)
OF_PAIRS = ("preferences.pairs_per_round=8", "preferences.pairs_per_pass=4")
OF_A_CLOCK = ("seconds", "driver_bytes", "restarts/", "nodes/", "time")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("other", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--whole", action="store_true", help="rounds of the run file's own size")
    given = parser.parse_args()
    names = given.names or training_files()
    with tempfile.TemporaryDirectory() as scratch:
        pairs = Path(scratch)
        for kind in ("pictures", "clips"):
            draw_pairs(pairs / f"{kind}.parquet", clips=kind == "clips")
        differ = 0
        for name in names:
            folders = []
            for checkout in (HERE, given.other.resolve()):
                folder = Path(scratch) / f"{name}-{len(folders)}"
                run(checkout, name, folder, pairs, whole=given.whole)
                folders.append(folder)
            found = differences(*folders)
            differ += bool(found)
            print(f"{name:24} {'; '.join(found[:4]) or 'the same'}", flush=True)
    sys.exit(differ > 0)


def training_files() -> list[str]:
    """Names of the run files that train a policy by reinforcement or preferences."""
    others = ("pretrain_", "fit_", "sample_", "vote_")
    return sorted(
        p.stem for p in (HERE / "configs").glob("*.yaml") if not p.name.startswith(others)
    )


def draw_pairs(path: Path, *, clips: bool) -> None:
    """Writes sixteen drawn pairs: each caption's picture, or clip, against another's."""
    from rlalign.core.clips import encode_clip
    from rlalign.data import motion, shapes
    from rlalign.data.pairs.columns import write_pairs
    from rlalign.diffusion.noise import generator

    rows = []
    for number in range(16):
        rng = generator("drawn pairs", number)
        if clips:
            right, wrong = motion.random_scene(rng), motion.random_scene(rng)
            media = [motion.draw(scene, rng) for scene in (right, wrong)]
        else:
            right, wrong = (shapes.random_scene(rng, "train") for _ in range(2))
            media = [shapes.draw(scene, rng)[None] for scene in (right, wrong)]
        first, second = (encode_clip(one.transpose(0, 3, 1, 2))[0] for one in media)
        labels = {"label_0": 1.0, "label_1": 0.0}
        rows.append({"caption": right.caption, "jpg_0": first, "jpg_1": second, **labels})
    write_pairs(path, rows)


def run(checkout: Path, name: str, folder: Path, pairs: Path, *, whole: bool) -> None:
    """Trains a run file of a checkout into a folder, in a process of its own."""
    config = checkout / "configs" / f"{name}.yaml"
    text = config.read_text()
    overrides = [*ROUNDS, *(() if whole else SMALL)]
    if "window:" in text and not whole:
        overrides.append("plan.window=2")
    if "\npreferences:" in text:
        overrides += ["preferences.ballots=null"] if "ballots:" in text else []
        kind = "clips" if "frames:" in text else "pictures"
        overrides.append(f"preferences.path={pairs / kind}.parquet")
        overrides += OF_PAIRS
    if "\nrefit:" in text:
        overrides += ["refit=null", "rewards=[{name: bradley_terry}]"]
    if "group" not in text and "updates_per_round: 1," in text:
        overrides.append("learner.updates_per_round=1")
    command = [sys.executable, "-m", "rlalign", "train", str(config), *overrides]
    done = subprocess.run(
        [*command, "--local", "--out", str(folder)],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{name} of {checkout} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two run folders."""
    found = []
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        lines, others = read_lines(one / file), read_lines(other / file)
        if len(lines) != len(others):
            found.append(f"{file} has {len(lines)} and {len(others)} lines")
        for mine, theirs in zip(lines, others, strict=False):
            keys = [k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)]
            found += [f"{file}: {key} {mine.get(key)} and {theirs.get(key)}" for key in keys]
    weights, others_weights = read_tensors(one), read_tensors(other)
    if weights.keys() != others_weights.keys():
        found.append(f"tensors {sorted(weights.keys() ^ others_weights.keys())[:3]}")
    for name in weights.keys() & others_weights.keys():
        if not torch.equal(weights[name], others_weights[name]):
            found.append(f"tensor {name}")
    return found


def read_lines(path: Path) -> list[dict[str, object]]:
    """The lines of a file without what depends on the clock."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(OF_A_CLOCK)} for line in lines]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    newest = max((folder / "checkpoints").glob("round-*"))
    return {k: v for file in newest.glob("*.safetensors") for k, v in load_file(file).items()}


if __name__ == "__main__":
    main()
