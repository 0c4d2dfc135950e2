"""The connection to SQLite or PostgreSQL, and the one clock that all processes share: the database's."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, Float, create_engine, event, func, select
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import make_url
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.expression import FunctionElement

# A host that went silent must not hold a call for longer than a lease can bear.
_IMPATIENT = {
    "connect_timeout": 5,
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "options": "-c statement_timeout=10000",
}

# Of a process. All are kept once they are open: one that is closed after use costs the next request its opening.
_POOL = {"pool_size": 15, "max_overflow": 0}

_BEGIN = "sqlite_begin"  # execution option: how a transaction begins on SQLite


class now(FunctionElement[float]):
    """The database's clock, in Unix seconds. Leases are compared with it alone, so workers' clocks may differ."""

    type = Float()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: Any, compiler: Any, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: Any, compiler: Any, **_: Any) -> str:
    return "extract(epoch from clock_timestamp())::float8"


def clock(session: Session) -> float:
    """The database's own time, Unix seconds."""
    return session.execute(select(now())).scalar_one()


class Database:
    """An engine, and transactions on it."""

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            if parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            self.engine: Engine = create_engine(parsed, connect_args={"timeout": 5}, **_POOL)
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            # pre-ping: a server that was restarted must cost a reconnect, not an error to a user.
            self.engine = create_engine(parsed, pool_pre_ping=True, connect_args=_IMPATIENT, **_POOL)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Commits at the end, rolls back on an exception. Do no network call inside."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """For questions only; on SQLite it waits for no writer."""
        engine = self.engine.execution_options(**{_BEGIN: "BEGIN DEFERRED"})
        with Session(engine, expire_on_commit=False) as session:
            yield session

    def insert(self, table: Any) -> Any:
        """An INSERT that has on_conflict_do_update, which both databases spell alike."""
        return postgresql_insert(table) if self.engine.dialect.name == "postgresql" else sqlite_insert(table)

    def alone(self, session: Session, name: str) -> None:
        """Until the transaction ends, others that say the same name wait here. For what no row can be held for."""
        if self.engine.dialect.name == "postgresql":  # on SQLite one transaction writes at a time, whatever it is about
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
            session.execute(select(func.pg_advisory_xact_lock(key)))

    def close(self) -> None:
        self.engine.dispose()


def _configure_sqlite(connection: Any, _: Any) -> None:
    # The driver's own transaction handling begins too late for SELECT … UPDATE; see _begin_sqlite.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    # Take the write lock at once: a transaction that reads first and writes later can fail without ever waiting.
    connection.exec_driver_sql(connection.get_execution_options().get(_BEGIN, "BEGIN IMMEDIATE"))
