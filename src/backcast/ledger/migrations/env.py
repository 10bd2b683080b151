"""Alembic's entry: one connection given by `ledger.migration`, plain SQL, version table in our schema."""

from alembic import context
from sqlalchemy import Connection

connection: Connection = context.config.attributes["connection"]
context.configure(connection=connection, version_table_schema="backcast", transaction_per_migration=True)
with context.begin_transaction():
    context.run_migrations()
