"""Makes the roles and databases of the components, by a role that may. Safe to repeat, and from several places.

Decides ownership: each role owns its own database; the scaler's role owns nothing, and may read one view.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit, urlunsplit

import psycopg
from psycopg.sql import SQL, Identifier, Literal

from backcast.errors import ConfigurationError, LedgerUnavailable
from backcast.ledger import session


def why_not_ready(url: str) -> str | None:
    """Connect once: why the database can't be used yet, or None when it can.

    Raises:
        ConfigurationError: waiting will not help: the server has answered, and it refuses this role or password.
    """
    where = urlsplit(url)
    try:
        with _connect(url):
            return None
    except psycopg.OperationalError as error:
        words = str(error).strip().splitlines()[0].rpartition("failed: ")[2].removeprefix("FATAL:").strip()
        if "authentication failed" in words or "no pg_hba.conf entry" in words:
            raise ConfigurationError(
                f"PostgreSQL at {where.hostname} answers: {words}. Correct the password, or, if its volume was made by "
                "an earlier installation, restore that installation's Secret (or delete the volume and its data)."
            ) from None
        return f"PostgreSQL at {where.hostname or 'its socket'} can't be used yet: {words}"


def provision(admin_url: str, url: str) -> str:
    """Make the role that `url` names, and the database that it owns; return a sentence about the result."""
    role, password, database = _named(url)
    with _locked(admin_url) as connection:
        _make_role(connection, role, password)
        made = _make_database(connection, database, role)
        connection.execute(SQL("revoke all on database {} from public").format(Identifier(database)))
    return f"The database {database} of {role} {'is made' if made else 'was there'}."


def create_database(admin_url: str, database: str) -> None:
    """Make a database of the administrator's own, unless it is there."""
    with _locked(admin_url) as connection:
        _make_database(connection, database)


def provision_reader(admin_url: str, url: str) -> str:
    """Make the role that `url` names, which may read the view `backlog` of that database and nothing else."""
    role, password, database = _named(url)
    with _locked(admin_url) as connection:
        _make_role(connection, role, password)
        connection.execute(SQL("grant connect on database {} to {}").format(Identifier(database), Identifier(role)))
        with _connect(_in_database(admin_url, database)) as inside:  # under the same lock: two grants at once collide
            inside.execute(SQL("grant usage on schema backcast to {}").format(Identifier(role)))
            inside.execute(SQL("grant select on backcast.backlog to {}").format(Identifier(role)))
    return f"The role {role} may read the backlog."


def _make_database(connection: "psycopg.Connection[object]", database: str, owner: str | None = None) -> bool:
    """Whether it had to be made."""
    if connection.execute("select from pg_database where datname = %s", [database]).rowcount:
        return False
    owned = SQL(" owner {}").format(Identifier(owner)) if owner else SQL("")
    connection.execute(SQL("create database {}").format(Identifier(database)) + owned)
    return True


def _make_role(connection: "psycopg.Connection[object]", role: str, password: str) -> None:
    exists = connection.execute("select from pg_roles where rolname = %s", [role]).rowcount
    verb = SQL("alter" if exists else "create")
    connection.execute(SQL("{} role {} login password {}").format(verb, Identifier(role), Literal(password)))


@contextmanager
def _locked(admin_url: str) -> "Iterator[psycopg.Connection[object]]":
    """A connection of the administrator, one at a time: `create` knows no `if not exists` for roles and databases."""
    with _connect(admin_url) as connection:
        connection.execute(session.settings(connection.info.server_version // 10000, hurried=False).encode())
        connection.execute("select pg_advisory_lock(hashtext('backcast.provision'))")
        try:
            yield connection
        except psycopg.Error as error:
            raise LedgerUnavailable(f"Roles and databases can't be made: {str(error).splitlines()[0]}") from None


def _connect(url: str) -> "psycopg.Connection[object]":
    return psycopg.connect(urlunsplit(urlsplit(url)._replace(scheme="postgresql")), autocommit=True, connect_timeout=5)


def _named(url: str) -> tuple[str, str, str]:
    where = urlsplit(url)
    database = where.path.lstrip("/")
    if not (where.username and where.password and database):
        raise ConfigurationError("The URL of a database to be made must name a user, a password and the database.")
    return unquote(where.username), unquote(where.password), unquote(database)


def _in_database(url: str, database: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{database}"))
