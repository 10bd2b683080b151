"""Connects a command to the service: its address, its key, and the options that every command has for them."""

import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from backcast.cli import arguments
from backcast.errors import ConfigurationError
from backcast.variables import KEY_VARIABLE, URL_VARIABLE

if TYPE_CHECKING:
    from backcast.client import Client

_URL_FILE = Path(".backcast/url")  # written by `up`
_PATIENCE = 3.0  # seconds: a person watches the screen
QUICK = 1.0
"""Seconds: a person waits for the completion of a word."""

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        show_default=False,
        help=f"Address of the service; without it, BACKCAST_URL, the one in {_URL_FILE}, or port 8000 of this machine.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
AsLines = Annotated[bool, typer.Option("--json", help="Print JSON Lines and nothing else.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds to wait at most.", min=0, show_default=False)]
RunId = Annotated[UUID, typer.Argument(metavar="ID", help="The run's id.")]


Labels = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="NAME=VALUE", help="A label of the run; several times.", show_default=False),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help=f"Only runs that match; several times: {', '.join(arguments.FILTERS)}, metadata.NAME. `error` is a code,"
        " `text` a part of the error, and `…_after` and `…_before` are times.",
        show_default=False,
    ),
]


def connect(url: str | None) -> "Client":
    from backcast.client import Client  # here, and not for --help: 0.1 s of CPU

    _refuse_misspelt()
    address, headers = _address(url)
    return Client(address, headers=headers, patience=_PATIENCE)


def _address(url: str | None) -> tuple[str, dict[str, str]]:
    from backcast.client import DEFAULT_URL, authorization

    stated = url or os.environ.get(URL_VARIABLE)
    address = stated or (_URL_FILE.read_text().strip() if _URL_FILE.is_file() else DEFAULT_URL)
    return address, authorization(os.environ.get(KEY_VARIABLE))


def names(noun: str) -> Callable[[typer.Context, str], list[str]]:
    """Completes the names of tasks, lanes or pools; nothing while the service does not answer."""

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            import httpx

            from backcast.client.wire import connection

            address, headers = _address(ctx.params.get("url"))
            with httpx.Client(**connection(address, headers), timeout=QUICK) as service:
                found = [item["name"] for item in service.get(f"/v1/{noun}").raise_for_status().json()["items"]]
        except Exception:  # noqa: BLE001  # a shell that waits for names has no use for errors
            return []
        return [name for name in found if name.startswith(incomplete)]

    return complete


def _refuse_misspelt() -> None:
    """A misspelt address or key is not passed over: the command would ask another service, or without a key. Names of
    settings, which are those of processes, may be set beside them."""
    for name in os.environ:
        near = get_close_matches(name.upper(), (URL_VARIABLE, KEY_VARIABLE), n=1, cutoff=0.9)
        if near and name not in (URL_VARIABLE, KEY_VARIABLE) and "__" not in name:
            raise ConfigurationError(f"{name} is not read. Did you mean {near[0]}?")
