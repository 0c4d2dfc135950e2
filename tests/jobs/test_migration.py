"""A job that an earlier version stored is one that this version can train."""

from jobs.database import Database


def test_settings_of_checkpoints_move_into_their_section(database: Database) -> None:
    pass
