"""Each project's stored bytes, counted as files come and go

Triggers count, so that no way of writing to the table can forget to. Whoever makes the table ``files`` anew, as changes
of a column do in SQLite, makes its triggers anew too.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_ADD = "UPDATE projects SET stored_bytes = stored_bytes + NEW.bytes WHERE id = NEW.project_id;"
_TAKE = "UPDATE projects SET stored_bytes = stored_bytes - OLD.bytes WHERE id = OLD.project_id;"
_DELETED = "OLD.deleted_at IS NULL AND NEW.deleted_at IS NOT NULL"


def upgrade() -> None:
    with op.batch_alter_table("projects", schema=None) as batch_op:
        batch_op.add_column(sa.Column("stored_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute(
        "UPDATE projects SET stored_bytes = (SELECT coalesce(sum(files.bytes), 0) FROM files"
        " WHERE files.project_id = projects.id AND files.deleted_at IS NULL)"
    )
    with op.batch_alter_table("files", schema=None) as batch_op:
        batch_op.drop_index("ix_files_stored")
    if op.get_bind().dialect.name == "sqlite":
        op.execute(f"CREATE TRIGGER files_stored AFTER INSERT ON files WHEN NEW.deleted_at IS NULL BEGIN {_ADD} END")
        op.execute(
            f"CREATE TRIGGER files_deleted AFTER UPDATE OF deleted_at ON files WHEN {_DELETED} BEGIN {_TAKE} END"
        )
        return
    op.execute(
        "CREATE FUNCTION holdtrue_files_stored() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF TG_OP = 'INSERT' THEN IF NEW.deleted_at IS NULL THEN {_ADD} END IF; "
        f"ELSIF {_DELETED} THEN {_TAKE} END IF; RETURN NULL; END $$"
    )
    op.execute(
        "CREATE TRIGGER files_stored AFTER INSERT OR UPDATE OF deleted_at ON files "
        "FOR EACH ROW EXECUTE FUNCTION holdtrue_files_stored()"
    )


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER files_deleted")
        op.execute("DROP TRIGGER files_stored")
    else:
        op.execute("DROP TRIGGER files_stored ON files")
        op.execute("DROP FUNCTION holdtrue_files_stored()")
    with op.batch_alter_table("files", schema=None) as batch_op:
        batch_op.create_index("ix_files_stored", ["project_id", "deleted_at", "bytes"], unique=False)
    with op.batch_alter_table("projects", schema=None) as batch_op:
        batch_op.drop_column("stored_bytes")
