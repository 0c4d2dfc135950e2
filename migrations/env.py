"""What Alembic runs: a connection to the URL that `migrations.__main__.upgrade` was given."""

from alembic import context

from jobs.database import Database
from jobs.tables import Base

database = Database(context.config.attributes["url"])
with database.engine.connect() as connection:
    # SQLite cannot alter most things in place: batch mode copies the table.
    context.configure(connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
database.close()
