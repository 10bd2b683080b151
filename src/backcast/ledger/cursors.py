"""Records how far a steward has come in its ordered work, so that the next one continues from there."""

from uuid import UUID

from backcast.ledger.connection import Ledger
from backcast.models import uuid7


async def read(ledger: Ledger) -> dict[str, UUID]:
    return {row["name"]: row["value"] for row in await ledger.fetch("select name, value from cursors")}


async def move(ledger: Ledger, name: str, to: UUID) -> None:
    """Move a cursor, forward only: a steward that was stopped and has lost its lead can't move the next one's back."""
    await ledger.execute(
        """insert into cursors as c (name, value) values ($1, $2)
           on conflict (name) do update set value = excluded.value, moved_at = now() where c.value < excluded.value""",
        name,
        to,
    )


async def identity(ledger: Ledger) -> UUID:
    """The id that distinguishes this ledger from every other one; made at the first call."""
    await ledger.execute(
        "insert into cursors (name, value) values ('ledger', $1) on conflict (name) do nothing", uuid7()
    )
    return (await read(ledger))["ledger"]
