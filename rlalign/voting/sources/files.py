"""Pictures that are there: a run's samples, a Parquet set, a folder. Their bytes are shown as they
are, unless a browser does not know the format.

Torch is not imported here: people can vote on a laptop that has none.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from rlalign.ballots.records import digest
from rlalign.core.clips import decode_clip, encode_clip
from rlalign.core.files import UnreadableText, parse_strict_json, read_text, split_lines
from rlalign.core.media import video_format
from rlalign.core.prompts import Prompt, record_of, with_record
from rlalign.core.registry import UserError, read_reason
from rlalign.voting.pictures import Exhausted, PictureFile

SHOWN = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}
"""Formats of Pillow that every browser shows -> their media types."""
ENDINGS = (".png", ".apng", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
CAPTIONS = ("caption", "text", "prompt")
"""Names of what says a picture's caption, in a table and in metadata.jsonl."""
COLUMNS = ("jpg_0", "jpg_1", "image", "jpg", "picture")
"""Columns of a Parquet set that hold pictures."""
RECORD = "record"
"""Name of a caption's record in both: a JSON object."""
_BATCH = 16
"""Captions of a batch."""


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a picture's bytes are."""

    read: Callable[[], bytes]
    policy: str
    name: str
    """For messages."""
    caption: str
    """With its record, where it has one."""


Found = dict[str, list[Location]]
"""What there is of each caption, by ``key_of``: pictures of one text with different records are not
compared."""


def key_of(caption: str) -> str:
    """A caption's text; where it has a record, with that behind it."""
    record = record_of(caption)
    return f"{caption}\0{json.dumps(dict(record), sort_keys=True)}" if record else str(caption)


def _collect(places: Iterable[Location]) -> Found:
    found: Found = {}
    for one in places:
        found.setdefault(key_of(one.caption), []).append(one)
    return found


def _by_text(side: Mapping[str, Sequence[Location]]) -> Found:
    found: Found = {}
    for key, places in side.items():
        found.setdefault(key.split("\0")[0], []).extend(places)
    return found


class FileSource:
    """Pictures by caption. A batch takes the next captions of a keyed order, and of each the next
    pictures of another; it ends when every picture has been in one."""

    draws = False
    renewed = False
    round: int | None = None
    votes: tuple[int, int] | None = None

    def __init__(
        self, sides: Sequence[Mapping[str, Sequence[Location]]], *, seed: int, count: int
    ) -> None:
        """``sides`` are key of a caption -> pictures: one, or two that are compared blind, by their
        texts alone where one of them has no records. ``count`` pictures of a caption make a group.

        Raises UserError where no caption has enough.
        """
        if any(all(key == key.split("\0")[0] for key in side) for side in sides):
            sides = [_by_text(side) for side in sides]
        self._sides = sides
        self._seed = seed
        self._of_side = count if len(sides) == 1 else 1
        self._next = 0
        enough = [caption for caption in sides[0] if self._fewest(caption) >= self._of_side]
        if not enough:
            which = "each of the two sides" if len(sides) > 1 else "the source"
            raise UserError(
                f"source: a caption must have {self._of_side} pictures or more in {which}, and none"
                f" of {len(sides[0])} has"
            )
        self._captions = enough

    def prompts(self) -> Sequence[str]:
        """See ``PictureSource``."""
        return [self._sides[0][key][0].caption for key in self._captions]

    def take_up(self, plans: Iterator[Mapping[str, Any]]) -> None:
        """See ``PictureSource``."""
        self._next = int(next(plans, {}).get("batch", -1)) + 1

    def batch(self) -> list[list[PictureFile]]:
        """See ``PictureSource``."""
        number = self._next
        self._next += 1
        places = range(number * _BATCH, (number + 1) * _BATCH)
        per_epoch = len(self._captions)
        groups = []
        for epoch, place in (divmod(place, per_epoch) for place in places):
            order = _rng(self._seed, "captions", epoch).permutation(per_epoch)
            group = self._group(self._captions[int(order[place])], epoch, {"batch": number})
            if group:
                groups.append(group)
        if not groups and places[0] // per_epoch > self._longest:
            raise Exhausted
        return groups

    def of_prompt(self, prompt: str, number: int) -> list[PictureFile]:
        """See ``PictureSource``."""
        keys = [key_of(prompt), *(key for key in self._captions if key.split("\0")[0] == prompt)]
        key = next((key for key in keys if key in self._sides[0]), None)
        group = [] if key is None else self._group(key, number, {})
        if not group:
            raise Exhausted
        return group

    def close(self) -> None:
        """See ``PictureSource``."""

    @property
    def _longest(self) -> int:
        """The last epoch in which some caption still has pictures."""
        most = max(max(map(len, side.values())) for side in self._sides)
        return most // self._of_side

    def _fewest(self, caption: str) -> int:
        """Pictures that every side has of a caption."""
        return min(len(side.get(caption, ())) for side in self._sides)

    def _group(self, caption: str, epoch: int, facts: Mapping[str, Any]) -> list[PictureFile]:
        """The pictures of a caption that are new in an epoch; none where too few are left."""
        chosen: list[Location] = []
        for number, side in enumerate(self._sides):
            there = side.get(caption, ())
            order = _rng(self._seed, "pictures", number, caption).permutation(len(there))
            mine = order[epoch * self._of_side : (epoch + 1) * self._of_side]
            if len(mine) < self._of_side:
                return []
            chosen += [there[int(i)] for i in mine]
        return [_read(found, self._seed, facts) for found in chosen]


def _rng(*key: object) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(int(digest("files", *key), 16)))


def _read(found: Location, seed: int, facts: Mapping[str, Any]) -> PictureFile:
    record = dict(record_of(found.caption))
    plan = {"file": found.name, **facts, **({"record": record} if record else {})}
    known = {"caption": found.caption, "policy": found.policy, "seed": seed, "plan": plan}
    return as_shown(found.read(), found.name, **known)


def as_shown(content: bytes, name: str, **facts: Any) -> PictureFile:
    """A file of a format that every browser shows; another format becomes PNG. A clip is an
    animated WebP, GIF or PNG, which a browser plays. ``facts`` are what else is known of it.

    Raises UserError where it is no picture, or a clip of another format.
    """
    from PIL import Image

    if video := video_format(content):
        raise UserError(
            f"{name} must be a picture, or a clip as animated WebP, GIF or PNG, and is a lossy"
            f" {video}: votes on it would be of other frames than those that were drawn"
        )
    try:
        with Image.open(io.BytesIO(content)) as opened:
            kind = SHOWN.get(opened.format or "")
            frames = getattr(opened, "n_frames", 1)
            if kind is not None:
                opened.verify()
                if kind != "image/jpeg":
                    clip = decode_clip(content)  # a still clip has one picture
                    frames = len(clip.media_FCHW)
                    facts["rate"] = clip.rate if frames > 1 else 0.0
                return PictureFile.of(content, media_type=kind, frames=frames, **facts)
            if frames == 1:
                buffer = io.BytesIO()
                opened.convert("RGB").save(buffer, format="PNG")
                return PictureFile.of(buffer.getvalue(), **facts)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{name} must be a picture, or a clip as animated WebP, GIF or PNG, and is none"
            f" ({read_reason(error)})"
        ) from error
    raise UserError(
        f"{name} has {frames} frames in a format that no browser plays; save it as animated WebP"
    )


# --- what is there -------------------------------------------------------------------------------


def find_samples(folder: Path) -> Found:
    """The pictures of a run's grids (``samples/``), or of what ``rlalign sample`` wrote."""
    grids = sorted(folder.glob("samples/round-*.png")) or sorted(folder.glob("samples*.png"))
    if not grids:
        raise UserError(
            f"source.samples must be a folder of a run or of rlalign sample, got {str(folder)!r},"
            " which has no samples/round-*.png and no samples.png"
        )
    return _collect(
        _bytes(content, f"{folder.name}/{grid.stem}", f"{grid}: {caption}", caption)
        for grid in grids
        for caption, content in _cells(grid)
    )


def _cells(grid: Path) -> Iterator[tuple[str, bytes]]:
    from rlalign.core.pictures import read_grid

    for cell in read_grid(grid):
        yield cell.caption, encode_clip(cell.media_FCHW, cell.rate)[0]


def _bytes(content: bytes, policy: str, name: str, caption: str) -> Location:
    return Location(read=lambda: content, policy=policy, name=name, caption=caption)


def find_pictures(path: str) -> Found:
    """The pictures of a Parquet set, or of a folder. Raises UserError where there is none."""
    folder = Path(path)
    if folder.is_dir() and not any(folder.rglob("*.parquet")):
        return _in_folder(folder)
    from rlalign.data.pairs.columns import pair_files

    files = pair_files(path, "source.pictures")
    return _collect(chain.from_iterable(map(_in_table, files)))


def _in_folder(folder: Path) -> Found:
    there = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    files = [p for p in there if p.suffix.lower() in ENDINGS]
    _refuse_videos(there, files)
    said = _metadata(folder)
    captions = {
        file: said.get(str(file.relative_to(folder))) or _caption_of(file, folder) for file in files
    }
    found = _collect(
        Location(read=file.read_bytes, policy=folder.name, name=str(file), caption=caption)
        for file, caption in captions.items()
        if caption
    )
    if not found:
        raise UserError(
            f"source.pictures must have pictures with captions, got {str(folder)!r}: a"
            " metadata.jsonl with file_name and text, NAME.txt beside NAME.png, or a folder for"
            " each caption (clips are animated WebP, GIF or PNG)"
        )
    return found


def _refuse_videos(there: Sequence[Path], read: Sequence[Path]) -> None:
    """Raises UserError for a video beside which there is no lossless clip of its name."""
    stems = {file.with_suffix("") for file in read}
    for file in there:
        if file.suffix.lower() in VIDEOS and file.with_suffix("") not in stems:
            raise UserError(
                f"{file} is a lossy video and is not read: its frames are not those that were"
                " drawn; save the clip as lossless animated WebP or PNG beside it or in its place"
            )


def _metadata(folder: Path) -> dict[str, str]:
    """File -> caption, as ``metadata.jsonl`` says it (Hugging Face's imagefolder); its record is
    the object under ``record``."""
    file = folder / "metadata.jsonl"
    if not file.is_file():
        return {}
    said: dict[str, str] = {}
    for number, line in enumerate(split_lines(_text(file)), start=1):
        if not line.strip():
            continue
        try:
            entry = parse_strict_json(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} line {number} must be JSON ({error})") from error
        caption = _first(entry, CAPTIONS)
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("file_name"), str)
            or not caption
        ):
            raise UserError(f"{file} line {number} must have file_name and text")
        record = entry.get(RECORD)
        said[entry["file_name"]] = (
            Prompt(caption, record) if isinstance(record, dict) and record else caption
        )
    return said


def _caption_of(file: Path, folder: Path) -> str:
    beside = file.with_suffix(".txt")
    if beside.is_file():
        return " ".join(_text(beside).split())
    return file.parent.name if file.parent != folder else ""


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except (OSError, UnreadableText) as error:
        raise UserError(f"{file} must be text in UTF-8: {read_reason(error)}") from error


def _first(entry: Any, names: Sequence[str]) -> str:
    """The first text that an entry has under one of the names."""
    if not isinstance(entry, dict):
        return ""
    return next((entry[n] for n in names if isinstance(entry.get(n), str) and entry[n]), "")


# --- a Parquet set -------------------------------------------------------------------------------


def _in_table(file: Path) -> Iterator[Location]:
    """The pictures of every row; bytes are read when they are asked for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} must be a Parquet file ({read_reason(error)})") from error
    caption = next((name for name in CAPTIONS if name in names), "")
    columns = [name for name in COLUMNS if name in names]
    if not caption or not columns:
        raise UserError(
            f"{file} must have a column {' or '.join(CAPTIONS)}, and one of"
            f" {', '.join(COLUMNS)}, got {', '.join(names)}"
        )
    with parquet:
        for group in range(parquet.metadata.num_row_groups):
            more = [name for name in ("model_0", "model_1", RECORD) if name in names]
            table = parquet.read_row_group(group, columns=[caption, *more])
            for row, words in enumerate(table.to_pylist()):
                text = words[caption]
                if not isinstance(text, str) or not text.strip():
                    continue
                prompt = with_record(text, words.get(RECORD))
                for column in columns:
                    made_by = words.get(column.replace("jpg", "model")) or file.stem
                    yield _cell((file, group, row, column), str(made_by), prompt)


def _cell(place: tuple[Path, int, int, str], made_by: str, caption: str) -> Location:
    file, group, row, column = place

    def read() -> bytes:
        import pyarrow.parquet as pq

        with pq.ParquetFile(file) as parquet:
            value = parquet.read_row_group(group, columns=[column])[column][row].as_py()
        if isinstance(value, dict):
            beside = file.parent / value["path"] if value.get("path") else None
            value = value.get("bytes") or (beside.read_bytes() if beside else b"")
        return value or b""

    name = f"{file}:{group}:{row} {column}"
    return Location(read=read, policy=made_by, name=name, caption=caption)
