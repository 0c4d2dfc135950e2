"""python -m migrations: bring the database of STIEFEL_DATABASE_URL to the newest schema. Safe to run again."""

import argparse
from pathlib import Path

from alembic import command
from alembic.config import Config

from jobs.settings import Settings
from trainer import logs


def upgrade(url: str) -> None:
    """To the newest schema, in a transaction a step."""
    command.upgrade(configuration(url), "head")


def configuration(url: str) -> Config:
    """What Alembic's commands take."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["url"] = url
    return config


def main() -> None:
    argparse.ArgumentParser(prog="python -m migrations", description=__doc__).parse_args()
    settings = Settings()
    logs.configure(settings.log_format, settings.log_level)
    upgrade(settings.url)
    print("the database has the newest schema")


if __name__ == "__main__":
    main()
