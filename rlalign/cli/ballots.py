"""``rlalign ballots``: what a store of votes says, and who counts in it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlalign.core.registry import UserError, nearest

if TYPE_CHECKING:
    from rlalign.ballots.records import Annotator
    from rlalign.ballots.store import Store

VERBS = ("results", "people", "export", "import", "leave-out", "take-in", "delete")

CampaignName = Annotated[
    str, typer.Option(metavar="NAME", help="Of which campaign; needed where there are several.")
]
LeastTime = Annotated[
    int,
    typer.Option(metavar="MS", min=0, help="export: leave out votes given in less than so long."),
]
LeastGold = Annotated[
    float,
    typer.Option(
        metavar="S",
        min=0.0,
        max=1.0,
        help="export: leave out people who find less than this share of 5 or more gold pairs.",
    ),
]

Yes = Annotated[
    bool, typer.Option("--yes", help="delete: do not ask; needed where nobody can answer.")
]


def ballots(
    store: Annotated[
        str,
        typer.Argument(
            metavar="STORE", help="A store's file, or PostgreSQL URL.", show_default=False
        ),
    ],
    verb: Annotated[
        str,
        typer.Argument(metavar="[VERB]", help="One of the words above.", show_default=False),
    ] = "results",
    what: Annotated[
        str,
        typer.Argument(
            metavar="[FILE|NAME]",
            help="A file; or a person's name, or the first letters of their id.",
            show_default=False,
        ),
    ] = "",
    campaign: CampaignName = "",
    min_ms: LeastTime = 0,
    min_gold: LeastGold = 0.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="results: every number, as JSON.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Show what people chose, export it as preference pairs, or say whose votes count.

    \b
    results         votes, agreement, what measures people, strengths of policies (the default)
    people          each person's votes, gold pairs, repeats and time
    export FILE     preference pairs as Parquet, in Pick-a-Pic v2's columns, with a card beside it
    import FILE     votes of Label Studio (pairwise, exported as JSON), into a campaign of their own
    leave-out NAME  a person is no longer asked, and their votes count nowhere
    take-in NAME    the contrary
    delete NAME     blanks a person's votes, name and token, for good; asks first
    """
    from rlalign.ballots.store import Store

    _refuse_missing(store, verb, what)
    if yes and verb != "delete":
        raise UserError(f"--yes is for delete, which asks, got {verb}; leave it out")
    limits = (min_ms, min_gold)
    with contextlib.closing(Store.open(store)) as opened:
        if verb == "results":
            _print_results(opened, campaign, as_json)
        elif verb == "people":
            _print_people(opened, campaign)
        elif verb == "export":
            _export(opened, campaign, Path(what), limits)
        elif verb == "import":
            _import(opened, campaign, Path(what))
        else:
            _change(opened, verb, what, yes)


def _refuse_missing(store: str, verb: str, what: str) -> None:
    """Raises UserError for a verb that there is not, a store that is not there (opening would make
    it), or nothing to do the verb with."""
    if verb not in VERBS:
        raise UserError(
            f"VERB must be one of {', '.join(VERBS)}, got {verb!r}; {nearest(verb, list(VERBS))}"
        )
    if verb != "import" and "://" not in store and not Path(store).is_file():
        raise UserError(
            f"STORE must be the file of a store of votes or a URL, got {store!r}, where"
            " there is none; rlalign vote makes one"
        )
    if (verb in VERBS[2:]) != bool(what):
        needs = {"export": "a file, as votes.parquet", "import": "a file, as export.json"}
        need = needs.get(verb, "a person's name")
        rule = f"{verb} needs {need}" if verb in VERBS[2:] else f"{verb} takes nothing more"
        raise UserError(f"{rule}, got {what!r}")
    if verb == "import" and not Path(what).is_file():
        raise UserError(f"import needs a file that is there, got {what!r}")


def _campaign(store: Store, name: str) -> str:
    """The campaign that is meant. Raises UserError where there is none."""
    from rlalign.data.pairs.campaign import one_campaign

    found = one_campaign(store, name)
    if not found:
        raise UserError("STORE has no campaign yet; rlalign vote makes one")
    return found


# --- what people chose ---------------------------------------------------------------------------


def _print_results(store: Store, campaign: str, as_json: bool) -> None:
    from rlalign.ballots.results import collect_results
    from rlalign.core.files import dump_json

    found = collect_results(store, _campaign(store, campaign), time.time()).to_json()
    if as_json:
        print(dump_json(found, indent=2))
    else:
        _print_page(found)


def _print_page(found: Mapping[str, Any]) -> None:
    """The numbers of the page's /results, in its words."""
    from rlalign.web.vote.results import lay_out
    from rlalign.web.vote.words import FALLBACK, read_languages

    words = read_languages()[FALLBACK]
    page = lay_out(found, words, str)
    lines = [(card["name"], card["value"], card["note"]) for card in page["cards"]]
    chosen = ", ".join(f"{line['rule']} {line['votes']}" for line in page["rules"])
    waiting = ", ".join(f"{kind} {count}" for kind, count in found["stock"]["items"].items())
    print(f"campaign {found['campaign']}")
    _print_table(
        (), [*lines, ("Pairs chosen by", chosen, ""), ("Pairs waiting", waiting or "none", "")]
    )
    if page["ranking"] is not None:
        names = ("policy", "strength", "interval", "rate", "votes", "more")
        heads = [words[f"results_{name}"] for name in names]
        print()
        _print_table(heads, [[line[n] for n in names] for line in page["ranking"]["lines"]])


def _print_table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, box=None, padding=(0, 2, 0, 0), show_header=bool(heads))
    for line in lines:
        table.add_row(*line)
    # whoever reads a file or a pipe has room for long lines
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def _print_people(store: Store, campaign: str) -> None:
    from rlalign.ballots.quality import measure

    found = {one.annotator: one for one in measure(store.votes(_campaign(store, campaign)))}
    lines = []
    for person in store.annotators():
        one = found.get(person.id)
        shares = (
            [f"{s.count}/{s.of}" for s in (one.gold, one.repeats, one.left)] if one else [""] * 3
        )
        said = [str(one.votes), *shares, f"{one.median_ms:.0f}"] if one else ["0", *shares, ""]
        name = person.name or ("(deleted)" if person.status == "deleted" else "(no name)")
        lines.append((name, person.id[:8], person.status, *said))
    heads = ("name", "id", "status", "votes", "gold", "repeats", "left", "median ms")
    _print_table(heads, lines)


def _export(store: Store, campaign: str, file: Path, limits: tuple[float, float]) -> None:
    from rlalign.ballots.quality import Rules
    from rlalign.data.pairs.votes import Filters, export_votes

    name = _campaign(store, campaign)
    if file.suffix != ".parquet":
        raise UserError(
            f"export writes Parquet: name a file that ends in .parquet, got {str(file)!r}"
        )
    filters = Filters(people=Rules(min_gold=limits[1]), min_ms=limits[0])
    count = export_votes(store, name, file, filters)
    print(f"{count} pairs: {file}\ncard: {file.with_suffix('.card.md')}")


def _import(store: Store, campaign: str, file: Path) -> None:
    from rlalign.voting.imports import import_votes

    count = import_votes(store, campaign, file)
    print(f"{count} votes of {file} are in the store")


# --- who counts ----------------------------------------------------------------------------------


def _change(store: Store, verb: str, name: str, yes: bool) -> None:
    person = _person(store, name)
    now = time.time()
    shown = person.name or person.id[:8]
    if verb == "delete":
        if not yes:
            _ask_to_delete(shown)
        count = store.delete_votes_of(person.id, now)
        print(f"{shown}: {count} votes are blanked, and the name and the token with them")
        return
    if person.status == "deleted":
        raise UserError(f"{name!r} has asked to be deleted, and cannot be taken in or left out")
    status = "left_out" if verb == "leave-out" else "active"
    store.set_status(person.id, status, "rlalign ballots", now)
    print(f"{shown} is {'left out' if status == 'left_out' else 'taken in'}")


def _ask_to_delete(shown: str) -> None:
    """Asks at the terminal. Raises UserError where there is none, or the answer is not yes."""
    if not sys.stdin.isatty():
        raise UserError(
            f"delete asks before it blanks the votes of {shown}, and nobody can answer here; say"
            " --yes to do it unasked"
        )
    question = f"Blank all votes, the name and the token of {shown}? It cannot be undone"
    if not typer.confirm(question, err=True):
        raise UserError(f"nothing is deleted: the votes of {shown} are as they were")


def _person(store: Store, name: str) -> Annotator:
    """Somebody by name, or by the beginning of an id. Raises UserError where nobody or several are
    meant."""
    people = store.annotators()
    found = [one for one in people if one.name == name] or [
        one for one in people if len(name) >= 4 and one.id.startswith(name)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(one.id[:8] for one in found)
        raise UserError(
            f"NAME must mean one person, and {name!r} are {len(found)}; give an id: {ids}"
        )
    raise UserError(
        f"NAME must be a person's, got {name!r};"
        f" {nearest(name, [one.name for one in people if one.name])}"
    )
