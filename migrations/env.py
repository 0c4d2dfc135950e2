"""What Alembic runs: a connection to the URL that `migrations.__main__.upgrade` was given."""

from alembic import context
from sqlalchemy import text

from jobs.database import Database
from jobs.tables import Base

# An arbitrary number, the same in all versions: whoever holds it is migrating.
_LOCK = 5_718_334_023


def migrate(database: Database) -> None:
    with database.engine.connect() as connection:
        sqlite = database.engine.dialect.name == "sqlite"
        if sqlite:
            # SQLite cannot alter most things in place: a table is copied, dropped and renamed, and while it is gone the
            # rows that refer to it refer to nothing. The switch has no effect inside a transaction, so it comes before.
            connection.connection.driver_connection.execute("PRAGMA foreign_keys=OFF")
        else:
            # Whoever migrates may have to wait for a large table; of several at once the later ones find nothing to do.
            connection.execute(text("SET statement_timeout = 0"))
            connection.execute(text(f"SELECT pg_advisory_lock({_LOCK})"))
            connection.commit()
        context.configure(connection, target_metadata=Base.metadata, render_as_batch=True)
        with context.begin_transaction():
            context.run_migrations()
            if sqlite and (broken := connection.execute(text("PRAGMA foreign_key_check")).all()):
                raise RuntimeError(f"after the migration {len(broken)} rows refer to nothing; it is rolled back")
        connection.commit()


_database = Database(context.config.attributes["url"])
try:
    migrate(_database)
finally:
    # Which gives up the lock too.
    _database.close()
