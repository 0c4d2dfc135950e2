"""Jobs know the request and the trace that they came with; workers say how much room they have"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("request_id", sa.String(128), nullable=True))
        jobs.add_column(sa.Column("traceparent", sa.String(64), nullable=True))
    with op.batch_alter_table("workers") as workers:
        workers.add_column(sa.Column("storage_size_bytes", sa.BigInteger(), nullable=True))
        workers.add_column(sa.Column("storage_free_bytes", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("workers") as workers:
        workers.drop_column("storage_free_bytes")
        workers.drop_column("storage_size_bytes")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("traceparent")
        jobs.drop_column("request_id")
