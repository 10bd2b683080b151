"""Brings the schema up to this release, by the plain SQL of `migrations/`."""

import time
from pathlib import Path

from backcast import database_urls
from backcast.errors import LedgerUnavailable
from backcast.ledger import session

SCRIPTS = Path(__file__).parent / "migrations"
LOCK_TIMEOUT = 2.0
"""Seconds that a migration waits for a table: all later statements on it wait behind it."""
TRIES = 30
PAUSE = 1.0
"""Seconds in which those statements go on."""


def migrate(url: str) -> str:
    """Bring the schema up to this release and return a sentence about the result.

    Safe to run from several places at once (an advisory lock lets one in), and does nothing when the schema is
    already newer, as after a rollback of the code.

    Raises:
        LedgerUnavailable: the database can't be reached, this role may not change it, or somebody has locked a table
            for a minute and a half.
    """
    import psycopg
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import OperationalError, SQLAlchemyError

    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    script = ScriptDirectory.from_config(config)
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(database_urls.for_libpq(url)))
    try:
        with engine.connect() as connection:
            version = connection.scalar(text("select current_setting('server_version_num')::int / 10000"))
            connection.exec_driver_sql(session.settings(int(version or 0), hurried=False))
            connection.commit()
            connection.execute(text("select pg_advisory_lock(hashtext('backcast.migrate'))"))
            connection.execute(text("create schema if not exists backcast"))
            connection.execute(text("set search_path to backcast, public"))
            connection.execute(text(f"set lock_timeout = '{LOCK_TIMEOUT:g}s'"))
            connection.commit()
            table = connection.scalar(text("select to_regclass('backcast.alembic_version')::text"))
            before = connection.scalar(text("select version_num from backcast.alembic_version")) if table else None
            known = {revision.revision for revision in script.walk_revisions()}
            if before is not None and before not in known:
                return f"The schema ({before}) is newer than this release: nothing to do."
            config.attributes["connection"] = connection
            for left in reversed(range(TRIES)):
                try:
                    command.upgrade(config, "head")
                    connection.commit()
                    break
                except OperationalError as error:
                    connection.rollback()
                    if not left or getattr(error.orig, "sqlstate", None) != "55P03":  # a lock that was not given
                        raise
                    time.sleep(PAUSE)
            head = script.get_current_head()
            return f"The schema is up to date ({head})." if before == head else f"The schema is now {head}."
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise LedgerUnavailable(f"The database can't be migrated: {cause}") from None
    finally:
        engine.dispose()
