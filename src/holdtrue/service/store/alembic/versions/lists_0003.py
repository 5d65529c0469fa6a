"""Lists and sweeps read no more than they show or remove, however rows are spread over projects and pairs

A job's metadata carry its project and its place, and a job whether it has any. Of files and models, indexes hold those
rows alone that their readers want. ``files`` keeps its table, and so its triggers.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("job_metadata", schema=None) as batch_op:
        batch_op.drop_index("ix_job_metadata_pair")
        batch_op.add_column(sa.Column("project_id", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("seq", sa.BigInteger(), nullable=True))
    for column in ("project_id", "seq"):
        op.execute(
            f"UPDATE job_metadata SET {column} = (SELECT jobs.{column} FROM jobs WHERE jobs.id = job_metadata.job_id)"
        )
    with op.batch_alter_table("job_metadata", schema=None) as batch_op:
        batch_op.alter_column("project_id", existing_type=sa.String(length=64), nullable=False)
        batch_op.alter_column("seq", existing_type=sa.BigInteger(), nullable=False)
    op.create_index("ix_job_metadata_pair", "job_metadata", ["project_id", "key", "value", "seq"])

    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("tagged", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute(
        sa.text("UPDATE jobs SET tagged = :yes WHERE id IN (SELECT job_id FROM job_metadata)").bindparams(
            sa.bindparam("yes", True, sa.Boolean())
        )
    )
    op.create_index("ix_jobs_tagged", "jobs", ["project_id", "tagged", "seq"])
    op.drop_index("ix_jobs_ready", "jobs")
    op.create_index("ix_jobs_ready", "jobs", ["status", "seq"])

    op.drop_index("ix_files_page", "files")
    op.drop_index("ix_files_expires_at", "files")
    _create("ix_files_page", "files", ["project_id", "seq"], "deleted_at IS NULL")
    _create("ix_files_purpose", "files", ["project_id", "purpose", "seq"], "deleted_at IS NULL")
    _create("ix_files_blob", "files", ["blob"], "blob IS NOT NULL")
    _create("ix_files_expires_at", "files", ["expires_at"], "deleted_at IS NULL")
    _create("ix_files_unfinished", "files", ["deleted_at"], "deleted_at IS NOT NULL AND blob IS NOT NULL")
    _create("ix_models_adapters", "models", ["status", "seq"], "adapter IS NOT NULL")

    op.drop_index("ix_uploads_expires_at", "uploads")
    op.create_index("ix_uploads_open", "uploads", ["status", "expires_at"])
    op.create_index("ix_web_sessions_expires_at", "web_sessions", ["expires_at"])
    op.drop_index("ix_api_keys_project_id", "api_keys")
    op.create_index("ix_api_keys_page", "api_keys", ["project_id", "created_at", "id"])
    for table in ("organizations", "projects"):
        op.create_index(f"ix_{table}_page", table, ["created_at", "id"])


def _create(name: str, table: str, columns: list[str], condition: str) -> None:
    op.create_index(name, table, columns, sqlite_where=sa.text(condition), postgresql_where=sa.text(condition))


def downgrade() -> None:
    for table in ("organizations", "projects"):
        op.drop_index(f"ix_{table}_page", table)
    op.drop_index("ix_api_keys_page", "api_keys")
    op.create_index("ix_api_keys_project_id", "api_keys", ["project_id"])
    op.drop_index("ix_web_sessions_expires_at", "web_sessions")
    op.drop_index("ix_uploads_open", "uploads")
    op.create_index("ix_uploads_expires_at", "uploads", ["expires_at"])

    op.drop_index("ix_models_adapters", "models")
    for name in ("unfinished", "expires_at", "blob", "purpose", "page"):
        op.drop_index(f"ix_files_{name}", "files")
    op.create_index("ix_files_expires_at", "files", ["expires_at"])
    op.create_index("ix_files_page", "files", ["project_id", "seq"])

    op.drop_index("ix_jobs_ready", "jobs")
    op.create_index("ix_jobs_ready", "jobs", ["status", "lease_until", "seq"])
    op.drop_index("ix_jobs_tagged", "jobs")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("tagged")

    op.drop_index("ix_job_metadata_pair", "job_metadata")
    with op.batch_alter_table("job_metadata", schema=None) as batch_op:
        batch_op.drop_column("seq")
        batch_op.drop_column("project_id")
    op.create_index("ix_job_metadata_pair", "job_metadata", ["key", "value"])
