"""python -m migrations: bring the database of STIEFEL_DATABASE_URL to the newest schema. Safe to run again.

On the way back to an earlier version of Stiefel, the later version takes the schema back first: --down-to.
"""

import argparse
import sys
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from jobs.database import Database
from jobs.settings import Settings
from trainer import logs


class UnknownSchema(Exception):
    """The database, or whoever asks, names a revision that this version has not."""


def upgrade(url: str) -> None:
    """To the newest schema. Raises UnknownSchema where the database's is newer than this version."""
    check(url)
    command.upgrade(configuration(url), "head")


def downgrade(url: str, revision: str) -> None:
    """What only later schemas hold is lost. Raises UnknownSchema."""
    known = _known(url)
    if revision not in known:
        raise UnknownSchema(f"--down-to {revision}: no such schema; there are {', '.join(known)}")
    present = check(url)
    if present is None or known.index(present) < known.index(revision):
        raise UnknownSchema(f"--down-to {revision}: the database has schema {present}, from which that is not down")
    command.downgrade(configuration(url), revision)


def check(url: str) -> str | None:
    """The database's schema; None for an empty one. Raises UnknownSchema where this version does not know it."""
    database = Database(url)
    try:
        with database.engine.connect() as connection:
            revision = MigrationContext.configure(connection).get_current_revision()
    finally:
        database.close()
    known = _known(url)
    if revision is not None and revision not in known:
        raise UnknownSchema(
            f"the database has schema {revision}, and the newest that this version knows is {known[-1]}: run this "
            f"version after the later one has taken it back, with python -m migrations --down-to {known[-1]}"
        )
    return revision


def configuration(url: str) -> Config:
    """What Alembic's commands take."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["url"] = url
    return config


def _known(url: str) -> list[str]:
    """Oldest first."""
    scripts = ScriptDirectory.from_config(configuration(url))
    return [script.revision for script in scripts.walk_revisions()][::-1]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m migrations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m migrations --down-to 0003",
    )
    parser.add_argument(
        "--down-to",
        metavar="REVISION",
        help="take the schema back to an earlier one; what only later ones hold is lost",
    )
    arguments = parser.parse_args()
    settings = Settings()
    logs.configure(settings.log_format, settings.log_level)
    try:
        if arguments.down_to is None:
            upgrade(settings.url)
        else:
            downgrade(settings.url, arguments.down_to)
        print(f"the database has schema {check(settings.url)}")
    except UnknownSchema as error:
        print(f"migrations: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
