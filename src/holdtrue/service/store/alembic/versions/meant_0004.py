"""What each policy means with all its defaults, and the tokens of a job that its project has been charged

A policy of before gets its meaning at the next start, from a version that still reads it as it was written.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("policies", schema=None) as batch_op:
        batch_op.add_column(sa.Column("meaning", sa.Text(), nullable=True))
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("charged_tokens", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute("UPDATE jobs SET charged_tokens = coalesce(trained_tokens, 0)")


def downgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("charged_tokens")
    with op.batch_alter_table("policies", schema=None) as batch_op:
        batch_op.drop_column("meaning")
