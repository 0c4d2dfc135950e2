"""A job that an earlier version stored is one that this version can train."""

import json
from pathlib import Path

from alembic import command
from sqlalchemy import create_engine, text

from migrations.__main__ import configuration, upgrade
from trainer.config import TrainingSpec

# What the first schema's version stored.
OLD = {
    "model": {"preset": "llama-tiny"},
    "dataset": {"source": "python-stdlib"},
    "method": {"name": "full"},
    "optimisation": {"steps": 100, "checkpoint_every": 7, "keep_checkpoints": 3},
}


def test_settings_of_checkpoints_move_into_their_section_and_back(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    command.upgrade(configuration(url), "0001")
    engine = create_engine(url)
    columns = {
        "id": "job", "metadata": "{}", "method": "full", "state": "queued", "created_at": 0, "queued_at": 0,
        "not_before": 0, "fence": 0, "failures": 0, "max_attempts": 3, "step": 0, "steps": 100, "figures": "{}",
        "events_offset": 0, "run_directory": "/runs/job", "spec": json.dumps(OLD),
    }  # fmt: skip
    with engine.begin() as connection:
        names = ", ".join(columns)
        connection.execute(text(f"INSERT INTO jobs ({names}) VALUES (:{', :'.join(columns)})"), columns)

    def stored() -> dict[str, object]:
        with engine.connect() as connection:
            found: dict[str, object] = json.loads(connection.execute(text("SELECT spec FROM jobs")).scalar_one())
            return found

    upgrade(url)
    wanted = TrainingSpec.model_validate(stored()).checkpoints
    assert (wanted.every, wanted.keep, wanted.keep_best) == (7, 3, True)
    command.downgrade(configuration(url), "0001")
    assert stored() == OLD
    engine.dispose()
