"""Checkpoints say what they cost and how good they are; their settings have a section of their own"""

import json

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_MOVED = {"checkpoint_every": "every", "keep_checkpoints": "keep"}


def upgrade() -> None:
    with op.batch_alter_table("checkpoints", schema=None) as batch_op:
        batch_op.add_column(sa.Column("stalled_seconds", sa.Float(precision=53), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("loss", sa.Float(precision=53), nullable=True))

    def move(spec: dict) -> None:
        checkpoints = spec.setdefault("checkpoints", {})
        for old, new in _MOVED.items():
            if old in spec["optimisation"]:
                checkpoints[new] = spec["optimisation"].pop(old)

    _each_spec(move)


def downgrade() -> None:
    with op.batch_alter_table("checkpoints", schema=None) as batch_op:
        batch_op.drop_column("loss")
        batch_op.drop_column("stalled_seconds")

    def move_back(spec: dict) -> None:
        checkpoints = spec.pop("checkpoints", {})
        spec["optimisation"] |= {old: checkpoints[new] for old, new in _MOVED.items() if new in checkpoints}

    _each_spec(move_back)


def _each_spec(change) -> None:
    connection = op.get_bind()
    jobs = sa.table("jobs", sa.column("id", sa.String), sa.column("spec", sa.JSON))
    for job_id, spec in connection.execute(sa.select(jobs.c.id, jobs.c.spec)).all():
        spec = json.loads(json.dumps(spec))
        change(spec)
        connection.execute(jobs.update().where(jobs.c.id == job_id).values(spec=spec))
