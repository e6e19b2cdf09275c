"""What a long list of prompts costs: the first round's time and the memory, by form of file.

    python benchmarks/long_prompts.py [prompts] [--json]
    python benchmarks/long_prompts.py FILE|FOLDER [--json]

Writes each form with ten prompts and with a million, in GenEval's shape where the form has records
(a tag and a list of objects), and reads each in a process of its own: a round of 64 prompts from
nothing, the next round, a round with a tenth held out by hash, and the search for prompts that are
trained on and held out. Memory is the largest resident set of the process less that with ten
prompts. The files go into a temporary folder. A file of yours, or a folder of shards, is measured
in the same way.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlalign.core.records import Plan
from rlalign.core.registry import build
from rlalign.data.prompts.base import Prompts

FORMS = ("txt", "jsonl", "parquet", "csv", "shards")
MILLION = 1_000_000
FEW = 10
SHARDS = 20
TAGS = ("counting", "colors", "two_object", "position")


def row(n: int) -> dict[str, Any]:
    """A prompt of some 60 characters with its record."""
    return {
        "tag": TAGS[n % 4],
        "include": [{"class": "cat", "count": n % 4 + 1}, {"class": "sign", "count": 1}],
        "prompt": f"a photo of {n % 4 + 1} cats that sit beside a sign of number {n * 7}",
    }


def write(path: Path, count: int) -> None:
    """A file of prompts in the form of its ending, or a folder of shards."""
    if path.suffix == ".shards":
        write_shards(path, count)
        return
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        # as pandas and datasets write them: row groups of a million rows
        pq.write_table(pa.Table.from_pylist([row(n) for n in range(count)]), path)
        return
    with path.open("w", encoding="utf-8") as opened:
        opened.write("prompt,tag\n" if path.suffix == ".csv" else "")
        for n in range(count):
            one = row(n)
            line = {
                ".txt": one["prompt"],
                ".csv": f"{one['prompt']},{one['tag']}",
                ".jsonl": json.dumps(one),
            }[path.suffix]
            opened.write(f"{line}\n")


def write_shards(folder: Path, count: int) -> None:
    """A folder of Parquet shards as the hub has them, each of row groups of 1,000 rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    of = min(SHARDS, count)
    for i in range(of):
        rows = [row(n) for n in range(i * count // of, (i + 1) * count // of)]
        name = f"train-{i:05d}-of-{of:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), folder / name, row_group_size=1000)


def measure(path: Path, held_out: Path) -> dict[str, float]:
    """Seconds of each thing, and the largest resident set of this process so far, in MB."""

    def source(**settings: Any) -> Prompts:
        given = {"name": "file", "path": str(path), "per_round": 64, "per_unit": 4, **settings}
        made = build("prompts", given)
        assert isinstance(made, Prompts)
        return made

    def timed(work: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    found = source()
    first = timed(lambda: found.units(0, 1, Plan()))
    following = timed(lambda: found.units(0, 2, Plan()))
    peak = resident()
    return {
        "first": first,
        "next": following,
        "memory": peak,
        "held_out": timed(lambda: source(held_out_share=0.1).units(0, 1, Plan())),
        "overlap": timed(source(held_out_path=str(held_out)).find_overlap),
        "memory_of_all": resident(),
    }


def resident() -> float:
    """The largest resident set so far, in MB."""
    status = Path("/proc/self/status")
    if status.is_file():  # of this program alone: getrusage counts what started it too
        said = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(said["VmHWM"].split()[0]) / 1000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def measure_apart(path: Path, held_out: Path) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(path), str(held_out)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def measure_all(count: int, folder: Path, forms: tuple[str, ...] = FORMS) -> dict[str, Any]:
    """Form -> what ``count`` prompts cost, their memory above that of ten."""
    held_out = folder / "held_out.txt"
    held_out.write_text("\n".join(row(n)["prompt"] for n in range(64)), encoding="utf-8")
    found = {}
    for form in forms:
        files = {n: folder / f"{n}.{form}" for n in (FEW, count)}
        for n, file in files.items():
            write(file, n)
        found[form] = compare(files[FEW], files[count], held_out)
        shutil.rmtree(files[count]) if files[count].is_dir() else files[count].unlink()
    return found


def compare(few: Path, many: Path, held_out: Path) -> dict[str, float]:
    """What many prompts cost, their memory above that of few."""
    less, found = (measure_apart(path, held_out) for path in (few, many))
    more = {name: found[name] - less[name] for name in ("memory", "memory_of_all")}
    files = [many] if many.is_file() else [file for file in many.rglob("*") if file.is_file()]
    return {**found, **more, "megabytes": sum(file.stat().st_size for file in files) / 1e6}


def measure_own(path: Path, folder: Path) -> dict[str, Any]:
    """The same of a file or folder that is there, against ten prompts of the same form."""
    held_out = folder / "held_out.txt"
    held_out.write_text(row(0)["prompt"], encoding="utf-8")
    few = folder / f"few{path.suffix if path.is_file() else '.shards'}"
    write(few, FEW)
    return {path.name: compare(few, path.absolute(), held_out)}


def main() -> None:
    """Prints the table, or JSON."""
    if "--measure" in sys.argv:
        path, held_out = map(Path, sys.argv[-2:])
        print(json.dumps(measure(path, held_out)))
        return
    numbers = [int(one) for one in sys.argv[1:] if one.isdigit()]
    own = next((Path(one) for one in sys.argv[1:] if Path(one).exists()), None)
    with tempfile.TemporaryDirectory() as folder:
        if own is not None:
            found = measure_own(own, Path(folder))
        else:
            found = measure_all(numbers[0] if numbers else MILLION, Path(folder))
    if "--json" in sys.argv:
        print(json.dumps(found, indent=1))
        return
    print(
        "| form | file MB | first round s | next s | a tenth held out s | overlap s | memory MB |"
    )
    print("|---|---|---|---|---|---|---|")
    for form, one in found.items():
        seconds = [f"{one[name]:.2f}" for name in ("first", "next", "held_out", "overlap")]
        memory = f"{one['memory']:.0f}, in all {one['memory_of_all']:.0f}"
        print(f"| {form} | {one['megabytes']:.0f} | {' | '.join(seconds)} | {memory} |")


if __name__ == "__main__":
    main()
