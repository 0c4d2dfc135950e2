"""Jobs have owners, priorities and a policy of retries; workers say what they have; API keys"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_SECONDS = sa.Float(precision=53)
# What jobs of earlier versions were tried again after, in their failures' names of today.
_RETRIED = ["infrastructure", "killed", "unknown"]


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("secret_hash", sa.String(64), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("created_at", _SECONDS, nullable=False),
        sa.Column("revoked_at", _SECONDS, nullable=True),
        sa.Column("last_used_at", _SECONDS, nullable=True),
        sa.Column("max_queued", sa.Integer(), nullable=True),
        sa.Column("max_running", sa.Integer(), nullable=True),
        sa.Column("max_device_hours", _SECONDS, nullable=True),
        sa.Column("max_storage_bytes", sa.BigInteger(), nullable=True),
        sa.Column("device_seconds", _SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
    )
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("owner", sa.String(40), server_default="", nullable=False))
        jobs.add_column(sa.Column("idempotency_key", sa.String(255), nullable=True))
        jobs.add_column(sa.Column("request_hash", sa.String(64), nullable=True))
        jobs.add_column(sa.Column("priority", sa.Integer(), server_default="0", nullable=False))
        jobs.add_column(sa.Column("device", sa.String(8), server_default="any", nullable=False))
        jobs.add_column(sa.Column("devices", sa.Integer(), server_default="1", nullable=False))
        jobs.add_column(sa.Column("preempt_requested_at", _SECONDS, nullable=True))
        jobs.add_column(sa.Column("retry_on", sa.JSON(), nullable=True))
        jobs.add_column(sa.Column("backoff_seconds", _SECONDS, server_default="5", nullable=False))
        jobs.add_column(sa.Column("losses", sa.Integer(), server_default="0", nullable=False))
        jobs.add_column(sa.Column("failed_step", sa.Integer(), server_default="0", nullable=False))
        jobs.add_column(sa.Column("charged_until", _SECONDS, nullable=True))
        jobs.add_column(sa.Column("device_seconds", _SECONDS, server_default="0", nullable=False))
        jobs.add_column(sa.Column("storage_bytes", sa.BigInteger(), server_default="0", nullable=False))
    _fill_jobs()
    with op.batch_alter_table("jobs") as jobs:
        jobs.alter_column("retry_on", existing_type=sa.JSON(), nullable=False)
        jobs.create_index(op.f("ix_jobs_owner_state"), ["owner", "state"])
        jobs.create_unique_constraint(op.f("uq_jobs_owner_idempotency_key"), ["owner", "idempotency_key"])
    with op.batch_alter_table("outbox", table_kwargs={"sqlite_autoincrement": True}) as outbox:
        outbox.drop_constraint(op.f("fk_outbox_job_id"), type_="foreignkey")
    with op.batch_alter_table("attempts") as attempts:
        attempts.add_column(sa.Column("retry_at", _SECONDS, nullable=True))
    with op.batch_alter_table("workers") as workers:
        workers.add_column(sa.Column("host", sa.Text(), server_default="", nullable=False))
        workers.add_column(sa.Column("version", sa.String(40), server_default="", nullable=False))
        workers.add_column(sa.Column("device", sa.String(8), server_default="cpu", nullable=False))
        workers.add_column(sa.Column("devices", sa.Integer(), server_default="1", nullable=False))
        workers.add_column(sa.Column("registered_at", _SECONDS, server_default="0", nullable=False))
        workers.add_column(sa.Column("left_at", _SECONDS, nullable=True))
        workers.add_column(sa.Column("drain_requested_at", _SECONDS, nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("workers") as workers:
        for name in ("drain_requested_at", "left_at", "registered_at", "devices", "device", "version", "host"):
            workers.drop_column(name)
    with op.batch_alter_table("attempts") as attempts:
        attempts.drop_column("retry_at")
    op.execute("DELETE FROM outbox WHERE job_id NOT IN (SELECT id FROM jobs)")
    with op.batch_alter_table("outbox", table_kwargs={"sqlite_autoincrement": True}) as outbox:
        outbox.create_foreign_key(op.f("fk_outbox_job_id"), "jobs", ["job_id"], ["id"])
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_constraint(op.f("uq_jobs_owner_idempotency_key"), type_="unique")
        jobs.drop_index(op.f("ix_jobs_owner_state"))
        for name in ("storage_bytes", "device_seconds", "charged_until", "backoff_seconds", "retry_on"):
            jobs.drop_column(name)
        for name in ("failed_step", "losses", "preempt_requested_at", "devices", "device", "priority"):
            jobs.drop_column(name)
        for name in ("request_hash", "idempotency_key", "owner"):
            jobs.drop_column(name)
    op.drop_table("api_keys")


def _fill_jobs() -> None:
    """Columns that follow from what a job is."""
    connection = op.get_bind()
    columns = [sa.column("id", sa.String), sa.column("spec", sa.JSON), sa.column("devices", sa.Integer)]
    jobs = sa.table("jobs", *columns, sa.column("retry_on", sa.JSON))
    for job_id, spec in connection.execute(sa.select(jobs.c.id, jobs.c.spec)).all():
        values = {"devices": spec.get("resources", {}).get("processes", 1), "retry_on": _RETRIED}
        connection.execute(jobs.update().where(jobs.c.id == job_id).values(values))
