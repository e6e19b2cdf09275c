"""A store on each kind of database."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from rlalign.ballots.store import Store
from tests.ballots import postgres

KINDS = ("sqlite", "postgresql")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """One PostgreSQL for all tests of a process. It never has to survive a crash of its own."""
    if postgres.binaries() is None:
        pytest.skip("no PostgreSQL on this machine (Debian: apt-get install postgresql)")
    with postgres.temporary_server("-c fsync=off") as url:
        yield url


@pytest.fixture(scope="session")
def empty_place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """Gives a place of the kind that is named, where no store is yet; on PostgreSQL it may be a
    copy of a database."""
    count = itertools.count()

    def make(kind: str, template: str = "template0") -> str:
        if kind == "sqlite":
            return str(tmp_path_factory.mktemp("store") / "votes.db")
        url = request.getfixturevalue("postgres_url")
        name = f"votes{next(count)}"
        engine = sa.create_engine(
            url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT"
        )
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {template}")
        engine.dispose()
        return url.replace("/postgres?", f"/{name}?")

    return make


@pytest.fixture(scope="session")
def new_place(empty_place: Callable[..., str]) -> Callable[[str], str]:
    """Gives the place of a new store: a copy of one that was migrated once."""
    made: dict[str, str] = {}

    def make(kind: str) -> str:
        if kind not in made:
            made[kind] = empty_place(kind)
            Store.open(made[kind]).close()
        if kind == "sqlite":
            return shutil.copy(made[kind], empty_place(kind))
        return empty_place(kind, template=str(sa.make_url(made[kind]).database))

    return make


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, new_place: Callable[[str], str]) -> str:
    """The place of a new store, one on each kind of database."""
    return new_place(request.param)
