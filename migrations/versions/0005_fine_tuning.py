"""Files, webhooks, and what fine-tuning adds to jobs and their curves"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("task", sa.String(16), nullable=False, server_default="pretrain"))
        jobs.add_column(sa.Column("tuning", sa.JSON(), nullable=True))
        jobs.add_column(sa.Column("results_due_at", sa.Float(53), nullable=True))
        jobs.add_column(sa.Column("base_run", sa.String(40), nullable=True))
        jobs.add_column(sa.Column("base_step", sa.Integer(), nullable=True))
        jobs.create_index("ix_jobs_base_run", ["base_run"])
        jobs.create_index("ix_jobs_results_due_at", ["results_due_at"])
    with op.batch_alter_table("points") as points:
        points.add_column(sa.Column("accuracy", sa.Float(53), nullable=True))
    with op.batch_alter_table("evaluations") as evaluations:
        evaluations.add_column(sa.Column("accuracy", sa.Float(53), nullable=True))
        evaluations.add_column(sa.Column("metrics", sa.JSON(), nullable=False, server_default="{}"))
    op.create_table(
        "files",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("owner", sa.String(40), nullable=False, server_default=""),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=True),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("status_details", sa.Text(), nullable=True),
        sa.Column("columns", sa.JSON(), nullable=False, server_default="{}"),
        sa.Column("format", sa.String(16), nullable=True),
        sa.Column("examples", sa.Integer(), nullable=True),
        sa.Column("statistics", sa.JSON(), nullable=False, server_default="{}"),
        sa.Column("checked_until", sa.Float(53), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
    )
    op.create_index("ix_files_owner_created_at_id", "files", ["owner", "created_at", "id"])
    op.create_index("ix_files_expires_at", "files", ["expires_at"])
    op.create_table(
        "job_files",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("file_id", sa.String(40), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_files_job_id")),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], name=op.f("fk_job_files_file_id")),
        sa.PrimaryKeyConstraint("job_id", "file_id", name=op.f("pk_job_files")),
    )
    op.create_index("ix_job_files_file_id", "job_files", ["file_id"])
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("owner", sa.String(40), nullable=False, server_default=""),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("events", sa.JSON(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("old_secret", sa.Text(), nullable=True),
        sa.Column("old_secret_until", sa.Float(53), nullable=True),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("updated_at", sa.Float(53), nullable=False),
        sa.Column("gone_at", sa.Float(53), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhooks")),
    )
    op.create_index("ix_webhooks_owner", "webhooks", ["owner"])
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("webhook_id", sa.String(40), nullable=False),
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("due_at", sa.Float(53), nullable=True),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("answered", sa.Text(), nullable=True),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("delivered_at", sa.Float(53), nullable=True),
        sa.ForeignKeyConstraint(
            ["webhook_id"], ["webhooks.id"], name=op.f("fk_deliveries_webhook_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deliveries")),
    )
    op.create_index("ix_deliveries_due_at", "deliveries", ["due_at"])
    op.create_index("ix_deliveries_webhook_id_created_at", "deliveries", ["webhook_id", "created_at"])


def downgrade() -> None:
    for table in ("deliveries", "webhooks", "job_files", "files"):
        op.drop_table(table)
    with op.batch_alter_table("evaluations") as evaluations:
        evaluations.drop_column("metrics")
        evaluations.drop_column("accuracy")
    with op.batch_alter_table("points") as points:
        points.drop_column("accuracy")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_index("ix_jobs_base_run")
        jobs.drop_index("ix_jobs_results_due_at")
        for column in ("results_due_at", "base_step", "base_run", "tuning", "task"):
            jobs.drop_column(column)
