"""Makes roles and databases, by a role that may, and grants the parts their rights. Safe to repeat, and from several
places.

Decides ownership: backcast and the Prefect server own a database each; the roles of parts own nothing, see `rights`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

import psycopg
from psycopg.sql import SQL, Identifier, Literal

from backcast import database_urls
from backcast.errors import ConfigurationError, LedgerUnavailable
from backcast.ledger import rights, session
from backcast.ledger.connection import NEWEST

_Connection = psycopg.Connection[tuple[str, ...]]


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


def provision_role(admin_url: str, url: str, owner_url: str, part: str) -> str:
    """Make the role that `url` names, and give the steward's the rights that only an administrator can; return a
    sentence about the result."""
    role, password, _ = _named(url)
    lacks = ""
    with _locked(admin_url) as connection:
        _make_role(connection, role, password)
        if part == "steward":
            member = SQL("grant {} to {}")
            if connection.info.server_version < 170000:  # `rights` says why
                owner, _, _ = _named(owner_url)
                connection.execute(member.format(Identifier(owner), Identifier(role)))
            try:
                connection.execute(member.format(Identifier("pg_read_all_stats"), Identifier(role)))
            except psycopg.errors.InsufficientPrivilege:
                lacks = " It may not see the sessions of other roles: the metric of the oldest snapshot omits them."
    return f"The role {role} of the {part} is there.{lacks}"


def grant(owner_url: str, urls: Mapping[str, str]) -> str:
    """Give the roles that these URLs name, by part, exactly the rights of their parts; return a sentence about the
    result.

    One transaction: no statement of a running process meets a moment without its rights.

    Raises:
        ConfigurationError: there is no such role.
    """
    parts: dict[str, list[str]] = {}
    for part, url in urls.items():
        parts.setdefault(_named(url)[0], []).append(part)
    with _locked(owner_url) as connection, connection.transaction():
        version = connection.execute("select version_num from backcast.alembic_version").fetchone()
        if version is not None and str(version[0]) > NEWEST:
            return "The rights are those of the newer release: nothing to do."
        owners = "select pg_get_userbyid(relowner) from pg_class where relnamespace = 'backcast'::regnamespace"
        for row in connection.execute(owners).fetchall():
            parts.pop(str(row[0]), None)  # an owner has every right
        for role, its in parts.items():
            try:
                _grant(connection, role, [rights.RIGHTS[part] for part in its])
            except psycopg.errors.UndefinedObject:
                raise ConfigurationError(
                    f"There is no role {role}: create it, or let BACKCAST_SETUP__ADMIN_URL name a role that may."
                ) from None
    return f"Rights are granted to {', '.join(parts) or 'nobody: every part has the role of the owner'}."


def _grant(connection: _Connection, role: str, parts: list[Mapping[str, str]]) -> None:
    row = connection.execute("select current_database()").fetchone()
    assert row is not None
    database, role = (Identifier(name).as_string(connection) for name in (row[0], role))
    statements = [  # first of all, what an older release has granted goes
        *(
            f"revoke all on {of} backcast from {role}"
            for of in ("all tables in schema", "all functions in schema", "schema")
        ),
        f"grant connect on database {database} to {role}",
        f"grant usage on schema backcast to {role}",
    ]
    for name, granted in (each for part in parts for each in part.items()):
        for right, columns in rights.each(granted):
            if right != "maintain" or connection.info.server_version >= 170000:
                of = f"({', '.join(columns)})" if columns else ""
                kind = "function " if right == "execute" else ""
                statements.append(f"grant {right} {of} on {kind}backcast.{name} to {role}")
    for statement in statements:
        connection.execute(statement.encode())


def _make_database(connection: _Connection, database: str, owner: str | None = None) -> bool:
    """Whether it had to be made."""
    if connection.execute("select from pg_database where datname = %s", [database]).rowcount:
        return False
    owned = SQL(" owner {}").format(Identifier(owner)) if owner else SQL("")
    encoded = SQL(" encoding 'UTF8' template template0")  # the server's default may be another, which template1 has
    connection.execute(SQL("create database {}").format(Identifier(database)) + owned + encoded)
    return True


def _make_role(connection: _Connection, role: str, password: str) -> None:
    exists = connection.execute("select from pg_roles where rolname = %s", [role]).rowcount
    verb = SQL("alter" if exists else "create")
    connection.execute(SQL("{} role {} login password {}").format(verb, Identifier(role), Literal(password)))


@contextmanager
def _locked(admin_url: str) -> Iterator[_Connection]:
    """A connection of the administrator, one at a time: `create` knows no `if not exists` for roles and databases."""
    with _connect(admin_url) as connection:
        connection.execute(session.settings(connection.info.server_version // 10000, hurried=False).encode())
        connection.execute("select pg_advisory_lock(hashtext('backcast.provision'))")
        try:
            yield connection
        except psycopg.Error as error:
            raise LedgerUnavailable(f"The database can't be provisioned: {str(error).splitlines()[0]}") from None


def _connect(url: str) -> _Connection:
    try:
        return psycopg.connect(database_urls.for_libpq(url), autocommit=True, connect_timeout=5)
    except psycopg.ProgrammingError:  # it quotes what may be of the password
        raise ConfigurationError(
            f"The URL of the database at {urlsplit(url).hostname or 'a socket'} can't be read by libpq: correct it."
        ) from None


def _named(url: str) -> tuple[str, str, str]:
    where = urlsplit(url)
    database = where.path.lstrip("/")
    if not (where.username and where.password and database):
        raise ConfigurationError("The URL of a database to be made must name a user, a password and the database.")
    return unquote(where.username), unquote(where.password), unquote(database)
