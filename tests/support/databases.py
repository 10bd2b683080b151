"""Makes the ledger's database on a server that asks for no passwords."""

from backcast.ledger import provisioning
from backcast.ledger.migration import migrate
from backcast.local.postgres import Postgres
from tests.support.roles import give_roles


def create(server: Postgres, name: str = "backcast") -> str:
    """The URL of a new database, migrated, that lets the roles of all parts in."""
    provisioning.create_database(server.url(), name)
    migrate(server.url(name))
    give_roles(server.url(name))
    return server.url(name)
