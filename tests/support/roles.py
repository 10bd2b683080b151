"""Gives the parts their database roles, as `backcast setup` does, on a server that asks for no passwords."""

from backcast.ledger import provisioning
from backcast.ledger.rights import PROCESSES


def role_url(database: str, part: str) -> str:
    """The URL of a part's role, of that of the administrator; any other user's URL stays."""
    return database.replace("//postgres@", f"//backcast_{part}:any@")


def give_roles(database: str) -> None:
    """Make the roles, and grant them their rights in this database, which is migrated."""
    roles = {part: role_url(database, part) for part in PROCESSES}
    for part, url in roles.items():
        provisioning.provision_role(database, url, database, part)
    provisioning.grant(database, roles)
