"""Opens the database of a store: SQLite by a path, PostgreSQL by a URL, brought to the newest
schema.

What differs between the two is in this file alone. Writers follow one another on both: SQLite has
one writer (``BEGIN IMMEDIATE``), on PostgreSQL each waits for the row of the log's counter. So a
decision holds that was read in the same transaction, and the log's numbers grow in the order in
which its rows become visible: a reader that has seen ``seq`` has seen all before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from rlalign.ballots import schema
from rlalign.core.registry import UserError, read_reason

LOG = "log"
"""The counter that numbers the log."""

_WAIT_S = 60
"""How long a writer waits for another process's."""

_LOCK_KEY = 5_742_019
"""PostgreSQL's advisory lock while a store is created or migrated."""


def connect(place: str | Path) -> Engine:
    """The engine of a store's database, created or migrated where needed.

    Raises UserError where it cannot be opened, is none of ours, or was written by a newer rlalign.
    """
    url = _url(place)
    name = url.render_as_string(hide_password=True)
    engine = _sqlite(url) if url.get_backend_name() == "sqlite" else _postgresql(url, name)
    try:
        _upgrade(engine, name)
    except DBAPIError as error:
        engine.dispose()
        why = read_reason(error.orig or error)
        raise UserError(f"ballots: {name} cannot be opened as a store of votes ({why})") from error
    except UserError:
        engine.dispose()
        raise
    return engine


def lock(connection: Connection) -> None:
    """Waits until no other writer of this store is in a transaction; this one's end lets go."""
    counter = schema.counter
    statement = sa.select(counter.c.value).where(counter.c.name == LOG).with_for_update()
    connection.execute(statement).one()


def _url(place: str | Path) -> URL:
    """The URL of a path or a URL, with the driver that is used for it."""
    text = str(place)
    if "://" not in text:
        if not text:
            raise UserError("ballots must be a path or a PostgreSQL URL, got ''")
        return URL.create("sqlite", database=str(Path(text).expanduser()))
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise UserError("ballots must be a path or a PostgreSQL URL; this is neither") from error
    if url.drivername in ("postgres", "postgresql"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg") or not url.database:
        raise UserError(
            "ballots must be a path, sqlite:///PATH or postgresql://USER@HOST/DATABASE, got"
            f" {url.render_as_string(hide_password=True)!r}"
        )
    return url


def _sqlite(url: URL) -> Engine:
    path = Path(url.database or "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"ballots: {path.parent} cannot be made ({read_reason(error)})") from error
    engine = sa.create_engine(url, connect_args={"timeout": _WAIT_S}, pool_timeout=_WAIT_S)

    @event.listens_for(engine, "connect")
    def configure(dbapi: Any, _: Any) -> None:
        # the driver begins no transaction by itself: "begin" below does
        dbapi.isolation_level = None
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",  # a commit is on the disk when it returns
            "foreign_keys = ON",
            "secure_delete = ON",
        ):
            dbapi.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(url: URL, name: str) -> Engine:
    try:
        engine = sa.create_engine(
            url, isolation_level="READ COMMITTED", pool_pre_ping=True, pool_timeout=_WAIT_S
        )
    except ImportError as error:
        raise UserError(
            f"ballots: {name} needs the package psycopg; pip install 'rlalign[postgres]'"
        ) from error

    @event.listens_for(engine, "connect")
    def configure(dbapi: Any, _: Any) -> None:
        # a commit is on the disk when it returns, whatever the server's own setting is
        dbapi.execute("SET synchronous_commit TO on")
        dbapi.commit()

    return engine


def _upgrade(engine: Engine, name: str) -> None:
    """Brings the schema to the newest revision; of several processes one does, the others wait."""
    with engine.begin() as connection:
        if _revision(connection) == schema.REVISION:
            return
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY)))
        found = _revision(connection)
        if found == schema.REVISION:
            return
        _migrate(connection, found, name)


def _revision(connection: Connection) -> str:
    """The schema's revision; empty for an empty database. Raises UserError for one of others."""
    tables = sa.inspect(connection).get_table_names()
    if "alembic_version" in tables:
        found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        return str(found or "")
    if tables:
        raise UserError(
            "ballots must name a store of votes or an empty database, got one with the table"
            f" {sorted(tables)[0]!r}"
        )
    return ""


def _migrate(connection: Connection, found: str, name: str) -> None:
    # alembic is loaded where there is something to migrate only
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found and found not in known:
        raise UserError(
            f"ballots: {name} was written by a newer rlalign (schema {found}); install that one"
        )
    command.upgrade(config, "head")
