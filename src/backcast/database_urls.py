"""The one rule for URLs of PostgreSQL databases: what three drivers understand, which differ in parameters.

No sentence quotes a part of a URL: where a password's odd character divides it, any part may be of the password.
"""

import re

_SHARED = (
    {"application_name", "dbname", "gsslib", "host", "krbsrvname", "options", "passfile", "password", "port", "service"}
    | {"ssl", "ssl_max_protocol_version", "ssl_min_protocol_version", "sslcert", "sslcrl", "sslkey", "sslmode"}
    | {"sslnegotiation", "sslpassword", "sslrootcert", "target_session_attrs", "user"}
)
_OF_LIBPQ = {
    "channel_binding",
    "client_encoding",
    "connect_timeout",
    "gssencmode",
    "keepalives",
    "keepalives_count",
} | {"keepalives_idle", "keepalives_interval", "load_balance_hosts", "sslsni", "tcp_user_timeout"}
"""asyncpg would send them to the server, as settings that it does not know."""
_OF_PREFECT = {"gsslib", "host", "krbsrvname", "passfile", "password", "port", "service", "ssl", "user"} | {
    "target_session_attrs"
}
"""SQLAlchemy passes each parameter to asyncpg, which takes no other."""
_HOST = r"([^\s:/?#@,\[\]]*|\[[^\s/?#@,\[\]]+\])(:\d*)?"
_URL = re.compile(
    rf"postgres(ql)?(\+\w+)?://([^\s:/?#@\[\]]*(:[^\s/?#@\[\]]*)?@)?{_HOST}(,{_HOST})*(/[^\s?#@]*)?(\?[^\s#@]*)?"
)


def check(url: str) -> str:
    """The URL itself. Raises `ValueError`."""
    if not _URL.fullmatch(url) or re.search("%(?![0-9A-Fa-f]{2})", url):
        raise ValueError(
            "a URL is wanted, such as postgresql://user:password@host:5432/database, in which the characters"
            " % / ? # @ [ ] of a password are %25 %2F %3F %23 %40 %5B %5D"
        )
    if any("=" not in each or _name(each) not in _SHARED | _OF_LIBPQ for each in _parameters(url)):
        raise ValueError(f"the parameters of a URL are {', '.join(sorted(_SHARED | _OF_LIBPQ))}: remove all others")
    return url


def check_for_prefect(url: str) -> str:
    """The URL itself, of the Prefect server's database, which that server gets as it is. Raises `ValueError`."""
    before, _, _ = check(url).partition("?")
    if (
        not before.startswith("postgresql+asyncpg://")
        or "," in before.rpartition("@")[2]
        or any(_name(each) not in _OF_PREFECT for each in _parameters(url))
    ):
        raise ValueError(
            "the Prefect server takes only a URL such as postgresql+asyncpg://user:password@host:5432/database?ssl=require,"
            f" of this scheme, with one host and the parameters {', '.join(sorted(_OF_PREFECT))}; in a Secret for the"
            " chart, its key is prefect-database-url"
        )
    return url


def for_libpq(url: str) -> str:
    """As psycopg takes it."""
    return _written(url, _parameters(url))


def for_asyncpg(url: str) -> str:
    return _written(url, [each for each in _parameters(url) if _name(each) not in _OF_LIBPQ])


def _written(url: str, parameters: list[str]) -> str:
    """With a scheme without a driver, and libpq's name of what SQLAlchemy has as `ssl`."""
    query = "&".join(re.sub("^ssl=", "sslmode=", each) for each in parameters)
    return re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", url.partition("?")[0]) + (query and f"?{query}")


def _parameters(url: str) -> list[str]:
    return [each for each in url.partition("?")[2].split("&") if each]


def _name(parameter: str) -> str:
    return parameter.partition("=")[0]
