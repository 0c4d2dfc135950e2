"""Pages are found by an index: events know the step that came before them, what is removed leaves its place in lists"""

from bisect import bisect_right
from itertools import accumulate

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("events", sa.Column("reached", sa.Integer(), nullable=False, server_default="0"))
    _fill_events()
    op.create_index("ix_events_job_id_reached_id", "events", ["job_id", "reached", "id"])
    op.create_index("ix_jobs_owner_created_at_id", "jobs", ["owner", "created_at", "id"])
    op.create_index("ix_jobs_state_created_at_id", "jobs", ["state", "created_at", "id"])
    op.create_table(
        "removed",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("owner", sa.String(40), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("removed_at", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_removed")),
    )
    op.create_index("ix_removed_removed_at", "removed", ["removed_at"])


def downgrade() -> None:
    op.drop_table("removed")
    op.drop_index("ix_jobs_state_created_at_id", "jobs")
    op.drop_index("ix_jobs_owner_created_at_id", "jobs")
    op.drop_index("ix_events_job_id_reached_id", "events")
    with op.batch_alter_table("events") as events:
        events.drop_column("reached")


def _fill_events() -> None:
    """By their times, which is all that is known of what came first; never less than the event before."""
    connection = op.get_bind()
    events = sa.table("events", *(sa.column(name) for name in ("id", "job_id", "at", "reached")))
    points = sa.table("points", *(sa.column(name) for name in ("job_id", "step", "at")))
    for (job_id,) in connection.execute(sa.select(events.c.job_id).distinct()).all():
        steps = connection.execute(
            sa.select(points.c.step, points.c.at).where(points.c.job_id == job_id).order_by(points.c.step)
        ).all()
        times = list(accumulate((at for _, at in steps), max))
        found = connection.execute(
            sa.select(events.c.id, events.c.at).where(events.c.job_id == job_id).order_by(events.c.id)
        ).all()
        before = [bisect_right(times, at) for _, at in found]
        reached = accumulate((steps[number - 1].step if number else 0 for number in before), max)
        rows = [{"event": event.id, "step": step} for event, step in zip(found, reached, strict=True) if step]
        if rows:
            changed = events.update().where(events.c.id == sa.bindparam("event"))
            connection.execute(changed.values(reached=sa.bindparam("step")), rows)
