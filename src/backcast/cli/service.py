"""How a command reaches the service: its address, its key, and the options that every command has for them."""

import os
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from backcast import client
from backcast.settings import KEY_VARIABLE, URL_VARIABLE

_URL_FILE = Path(".backcast/url")  # written by `up`
_PATIENCE = 3.0  # seconds: a person looks at the screen

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar=URL_VARIABLE,
        show_default=False,
        help=f"Address of the service; without it, the one in {_URL_FILE} or {client.DEFAULT_URL}.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds to wait at most.", min=0, show_default=False)]
RunId = Annotated[UUID, typer.Argument(metavar="ID", help="The run's id.")]


def _address(url: str | None) -> str:
    return url or (_URL_FILE.read_text().strip() if _URL_FILE.is_file() else client.DEFAULT_URL)


def connect(url: str | None) -> client.Client:
    shown = client.authorization(os.environ.get(KEY_VARIABLE))
    return client.Client(_address(url), headers=shown, patience=_PATIENCE)
