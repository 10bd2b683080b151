"""Connects a command to the service: its address, its key, and the options that every command has for them."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from backcast.errors import ConfigurationError
from backcast.variables import KEY_VARIABLE, URL_VARIABLE

if TYPE_CHECKING:
    from backcast.client import Client

_URL_FILE = Path(".backcast/url")  # written by `up`
_PATIENCE = 3.0  # seconds: a person watches the screen

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        show_default=False,
        help=f"Address of the service; without it, BACKCAST_URL, the one in {_URL_FILE}, or port 8000 of this machine.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds to wait at most.", min=0, show_default=False)]
RunId = Annotated[UUID, typer.Argument(metavar="ID", help="The run's id.")]


def connect(url: str | None) -> "Client":
    from backcast.client import DEFAULT_URL, Client, authorization  # here, and not for --help: 0.1 s of CPU

    _refuse_misspelt()
    stated = url or os.environ.get(URL_VARIABLE)
    address = stated or (_URL_FILE.read_text().strip() if _URL_FILE.is_file() else DEFAULT_URL)
    return Client(address, headers=authorization(os.environ.get(KEY_VARIABLE)), patience=_PATIENCE)


def _refuse_misspelt() -> None:
    """A misspelt address or key is not passed over: the command would ask another service, or without a key. Names of
    settings, which are those of processes, may be set beside them."""
    for name in os.environ:
        near = get_close_matches(name.upper(), (URL_VARIABLE, KEY_VARIABLE), n=1, cutoff=0.9)
        if near and name not in (URL_VARIABLE, KEY_VARIABLE) and "__" not in name:
            raise ConfigurationError(f"{name} is not read. Did you mean {near[0]}?")
