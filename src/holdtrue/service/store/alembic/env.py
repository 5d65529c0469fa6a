"""Alembic's way into the schema; the connection is handed in by ``holdtrue.service.store.migrations``."""

from alembic import context

from holdtrue.service.store.schema import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True, compare_type=True)
context.run_migrations()
