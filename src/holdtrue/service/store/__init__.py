"""The service's memory: SQLite on a laptop, PostgreSQL elsewhere; and the object store beside it."""
