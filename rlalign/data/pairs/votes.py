"""People's votes as pairs: written in Pick-a-Pic v2's columns, with a card that states the filters.

Of each two pictures that a person compared there is one row; picture 0 is the one that stood left.
Sides were drawn, so a picture's number says nothing about it. Ties and two bad ones are 0.5 each;
skips, gold pairs and repeats are left out, and so are the votes of people who are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from rlalign.ballots.label_studio import Judgement
from rlalign.ballots.quality import Rules, left_out
from rlalign.ballots.records import Outcome, Vote, picture_uid
from rlalign.ballots.store import Store
from rlalign.core.files import write_whole
from rlalign.core.prompts import dump_record, record_of
from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import Extra, write_pairs

LABELS: dict[Outcome, float] = {"left": 1.0, "right": 0.0, "tie": 0.5}
"""``label_0`` of each outcome."""

EXTRAS: dict[str, Extra] = {
    "campaign": "string",
    "choice": "string",
    "decide_ms": "double",
    "kind": "string",
    "propensity": "double",
    "reasons": "string",
    "rule": "string",
    "visible_ms": "double",
}
"""Columns beyond Pick-a-Pic's: what was answered and how, and how the pair was chosen."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which votes are exported."""

    people: Rules = field(default_factory=Rules)
    """Rules that leave people out with all their votes."""
    min_ms: float = 0.0
    """A vote that was decided faster is left out."""
    ties: bool = True
    """Whether ties are written."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The votes that filters let through, and why others are left out."""

    votes: Sequence[Vote]
    cursor: int
    """The log's row up to which votes were read."""
    people: Mapping[str, str]
    """Person -> why all their votes are left out."""
    counts: Mapping[str, int]
    """Votes left out, by reason."""


def select_votes(
    store: Store, campaign: str, filters: Filters | None = None, upto: int | None = None
) -> Selection:
    """The votes of a campaign that a set of pairs is made of, as of a cursor: the same cursor and
    filters give the same votes (until somebody has theirs deleted)."""
    # people first: rules look at all of a person's votes, gold and repeats too
    filters = filters or Filters()
    cursor = store.cursor() if upto is None else upto
    every = list(store.votes(campaign, upto=cursor))
    status = store.standings(cursor)
    by_hand = {p: "left out by hand" for p, status in status.items() if status == "left_out"}
    people = left_out(every, filters.people) | by_hand

    # then each vote
    counts: Counter[str] = Counter()
    votes = []
    for vote in every:
        why = _why_not(vote, people, filters)
        if why:
            counts[why] += 1
        else:
            votes.append(vote)
    return Selection(votes=votes, cursor=cursor, people=people, counts=counts)


def _why_not(vote: Vote, people: Mapping[str, str], filters: Filters) -> str:
    if vote.ballot.annotator in people:
        return "of people who are left out"
    if vote.ballot.item.kind in ("gold", "repeat"):
        return f"on {vote.ballot.item.kind} pairs"
    if vote.answer.choice == "skip":
        return "skips"
    if vote.answer.decide_ms < filters.min_ms:
        return f"decided in under {filters.min_ms:.0f} ms"
    if not filters.ties and vote.answer.choice in ("tie", "both_bad"):
        return "ties"
    return ""


def rows_of_votes(store: Store, votes: Sequence[Vote]) -> Iterator[dict[str, Any]]:
    """Rows for ``write_pairs`` with ``EXTRAS``, in the order of the votes; a ranking gives a row
    for each two of its pictures, with one ``ranking_id``. Where any caption has a record, each row
    has its caption's. Where clips are among them, each row says its frames and their rate,
    of which two that differ have none."""
    clips = _clips_of(store, votes)
    has_clips = any(count > 1 for count, _ in clips.values())
    numbers = {one.id: number for number, one in enumerate(store.annotators())}
    examples = Counter(vote.ballot.item.caption for vote in votes for _ in vote.pairs)
    items = {vote.ballot.item.id: vote.ballot.item for vote in votes}
    prompts = {number: store.prompt_of(item) for number, item in items.items()}
    has_records = any(record_of(prompt) for prompt in prompts.values())
    for vote in votes:
        item = vote.ballot.item
        record = {"record": dump_record(prompts[item.id])} if has_records else {}
        for left, right, outcome in vote.pairs:
            best = {"left": left, "right": right, "tie": "none"}[outcome]
            yield {
                **_sides(store, left, right),
                **(_of_clips(clips[left], clips[right]) if has_clips else {}),
                "caption": item.caption,
                "label_0": LABELS[outcome],
                "label_1": 1.0 - LABELS[outcome],
                "are_different": left != right,
                "best_image_uid": best,
                "created_at": datetime.fromtimestamp(vote.at, UTC).replace(tzinfo=None),
                "has_label": True,
                "num_example_per_prompt": examples[item.caption],
                "ranking_id": vote.seq,
                "user_id": numbers[vote.ballot.annotator],
                "campaign": item.campaign,
                "choice": vote.answer.choice,
                "decide_ms": vote.answer.decide_ms,
                "kind": item.kind,
                "propensity": vote.ballot.propensity,
                "reasons": ",".join(vote.answer.reasons),
                "rule": vote.ballot.rule,
                "visible_ms": vote.answer.visible_ms,
                **record,
            }


def _sides(store: Store, left: str, right: str) -> dict[str, Any]:
    """The columns of the two pictures."""
    found: dict[str, Any] = {}
    for number, uid in enumerate((left, right)):
        picture = store.picture(uid)
        found[f"jpg_{number}"] = store.content(uid)
        found[f"image_{number}_uid"] = uid
        found[f"image_{number}_url"] = ""
        found[f"model_{number}"] = picture.policy if picture else ""
    return found


def export_votes(
    store: Store,
    campaign: str,
    path: Path,
    filters: Filters | None = None,
    upto: int | None = None,
) -> int:
    """Writes a campaign's votes as Parquet and its card beside it (``NAME.card.md``), and returns
    the number of pairs. Raises UserError where no vote is left."""
    filters = filters or Filters()
    selection = select_votes(store, campaign, filters, upto)
    if not selection.votes:
        why = ", ".join(f"{count} {reason}" for reason, count in selection.counts.items())
        raise UserError(
            f"campaign {campaign!r} has no vote to write ({why or 'nobody has voted'}); loosen the"
            " filters or go on voting"
        )
    count = write_pairs(path, rows_of_votes(store, selection.votes), extras=EXTRAS)
    card = _card(campaign, path, filters, selection, count) + _on_clips(store, selection.votes)
    write_whole(path.with_suffix(".card.md"), card)
    return count


def _clips_of(store: Store, votes: Iterable[Vote]) -> dict[str, tuple[int, float]]:
    """Picture -> its frames and how many of them a second, of all that votes compare."""
    uids = dict.fromkeys(uid for vote in votes for uid in vote.ballot.shown)
    pictures = {uid: store.picture(uid) for uid in uids}
    return {uid: (one.frames, one.rate) if one else (1, 0.0) for uid, one in pictures.items()}


def _of_clips(left: tuple[int, float], right: tuple[int, float]) -> dict[str, Any]:
    """The columns of two clips; None where they differ, or where the rate is not known."""
    frames, rate = (a if a == b else None for a, b in zip(left, right, strict=True))
    return {"frames": frames, "rate": rate or None}


def _on_clips(store: Store, votes: Sequence[Vote]) -> str:
    """What a card says of clips; empty where there are none."""
    frames = {uid: count for uid, (count, _) in _clips_of(store, votes).items()}
    clips = {uid for uid, count in frames.items() if count > 1}
    count = sum(not clips.isdisjoint(vote.ballot.shown) for vote in votes)
    if not count:
        return ""
    uneven = sum(len({frames[uid] for uid in vote.ballot.shown}) > 1 for vote in votes)
    said = f"{count} votes are on clips, whose files the columns hold whole (`frames` of each)."
    if uneven:
        said += f" {uneven} compare different numbers of frames, which no training can use."
    return f"\n{said}\n"


def _card(campaign: str, path: Path, filters: Filters, selection: Selection, count: int) -> str:
    """What the file holds and what was left out, as Markdown."""
    choices = Counter(vote.answer.choice for vote in selection.votes)
    voters = {vote.ballot.annotator for vote in selection.votes}
    captions = {vote.ballot.item.caption for vote in selection.votes}
    lines = [
        f"# {path.name}",
        "",
        f"{count} pairs of {len(selection.votes)} votes by {len(voters)} people on"
        f" {len(captions)} captions: campaign `{campaign}`, the log up to row {selection.cursor}.",
        "",
        f"Columns are those of Pick-a-Pic v2, and {', '.join(EXTRAS)}.",
        "Picture 0 stood left; sides were drawn. Ties and two bad ones are 0.5 each.",
        "`user_id` is a pseudonym: the number of a person in the order of joining.",
        "`propensity` is the probability with which the pair was chosen.",
        "",
        "| choice | votes |",
        "|---|---|",
        *(f"| {choice} | {number} |" for choice, number in sorted(choices.items())),
        "",
        "Filters: " + ", ".join(f"{name} {value}" for name, value in _stated(filters)) + ".",
        "",
        "| left out | votes |",
        "|---|---|",
        *(f"| {why} | {number} |" for why, number in sorted(selection.counts.items())),
        "",
        f"People left out: {len(selection.people)}.",
        *(f"- {why}" for why in sorted(selection.people.values())),
    ]
    return "\n".join(lines) + "\n"


def _stated(filters: Filters) -> Iterator[tuple[str, Any]]:
    for name, value in asdict(filters.people).items():
        yield f"people.{name}", value
    yield "min_ms", filters.min_ms
    yield "ties", "kept" if filters.ties else "left out"


# --- Label Studio --------------------------------------------------------------------------------


def rows_of_judgements(judgements: Iterable[Judgement], folder: Path) -> Iterator[dict[str, Any]]:
    """Rows for ``write_pairs`` of an export of Label Studio, whose pictures are files in
    ``folder``. Raises UserError for a picture that is not there."""
    people: dict[str, int] = {}
    for number, one in enumerate(judgements):
        row: dict[str, Any] = {
            "caption": one.caption,
            "label_0": LABELS[one.outcome],
            "label_1": 1.0 - LABELS[one.outcome],
            "created_at": datetime.fromtimestamp(one.at, UTC).replace(tzinfo=None),
            "ranking_id": number,
            "user_id": people.setdefault(one.annotator, len(people)),
        }
        for side, name in enumerate((one.left, one.right)):
            content = _picture_file(name, folder, one.task).read_bytes()
            row |= {f"jpg_{side}": content, f"image_{side}_uid": picture_uid(content)}
        best = {"left": "image_0_uid", "right": "image_1_uid"}.get(one.outcome)
        yield {**row, "best_image_uid": row[best] if best else "none"}


def _picture_file(name: str, folder: Path, task: str) -> Path:
    """The file that an export means: a path, ``/data/upload/PROJECT/FILE`` or
    ``/data/local-files/?d=PATH``, below ``folder``."""
    place = f"task {task}: picture {name!r}"
    address = urlsplit(name)
    if address.scheme in ("http", "https", "s3", "gs") or address.netloc:
        raise UserError(f"{place} is an address; download it and name the file instead")
    inside = parse_qs(address.query).get("d", [""])[0] or unquote(address.path)
    inside = inside.removeprefix("/data/upload").lstrip("/")
    root = folder.resolve()
    for candidate in (root / inside, root / Path(inside).name):
        found = candidate.resolve()
        if found.is_relative_to(root) and found.is_file():
            return found
    raise UserError(f"{place} must be a file below {folder}, and is not there")
