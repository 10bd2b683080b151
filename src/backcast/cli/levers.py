"""The commands that stop and go: pause, resume, pauses, drain."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

import typer

from backcast.cli import arguments, output
from backcast.cli.app import use
from backcast.cli.service import AsJson, Url, connect
from backcast.models import PauseKind, Release

Kind = Annotated[PauseKind, typer.Argument(metavar="KIND", help="task, lane or pool.")]
Named = Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]


@use()
def pause(
    kind: Kind,
    name: Named,
    reason: Annotated[str, typer.Option(help="Shown to those who ask why a run waits.", show_default=False)] = "",
    by: Annotated[str, typer.Option(help="Who pauses it.", show_default=False)] = "",
    until: Annotated[
        datetime | None,
        typer.Option(parser=arguments.moment, metavar="TIME", help="When it ends by itself.", show_default=False),
    ] = None,
    release: Annotated[bool, typer.Option("--release", help="Stop what runs as well; it begins again later.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Start nothing new of a task, a lane or a pool."""
    running = Release.RELEASE if release else Release.CONTINUE
    with connect(url) as service:
        paused = service.pause(kind, name, reason=reason, by=by, until=until, running=running)
    if as_json:
        output.print_document(paused.model_dump(mode="json"))
    else:
        typer.echo(f"The {kind} {name} is paused.")


@use()
def resume(kind: Kind, name: Named, url: Url = None) -> None:
    """End the pause of a task, a lane or a pool."""
    with connect(url) as service:
        service.resume(kind, name)
    typer.echo(f"The {kind} {name} goes on.")


@use()
def pauses(url: Url = None, as_json: AsJson = False) -> None:
    """List what is paused."""
    with connect(url) as service:
        found = service.pauses()
    if as_json:
        output.print_document([each.model_dump(mode="json") for each in found])
        return
    rows = [
        (f"{each.kind} {each.name}", each.reason, each.by, f"{each.since:%Y-%m-%d %H:%M}",
         f"{each.until:%Y-%m-%d %H:%M}" if each.until else "")
        for each in found
    ]  # fmt: skip
    output.print_table(("PAUSED", "REASON", "BY", "SINCE", "UNTIL"), rows)


@use()
def drain(worker: Annotated[UUID, typer.Argument(metavar="WORKER", help="The worker's id.")], url: Url = None) -> None:
    """Let a worker finish what it has, and end."""
    with connect(url) as service:
        service.drain(worker)
    typer.echo(f"The worker {worker} drains.")
