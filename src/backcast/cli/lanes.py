"""The commands about lanes."""

from collections.abc import Sequence
from typing import Annotated

import typer
from pydantic import ValidationError

from backcast.cli import arguments, output
from backcast.cli.app import use
from backcast.cli.service import AsJson, Url, connect, names
from backcast.models import Lane, Limits


@use()
def lanes(url: Url = None, as_json: AsJson = False) -> None:
    """List the lanes that have limits or are paused."""
    with connect(url) as service:
        _print_lanes(service.lanes(), as_json)


@use()
def lane(
    name: Annotated[str, typer.Argument(metavar="LANE", help="The lane's name.", autocompletion=names("lanes"))],
    max_running: Annotated[
        int | None,
        typer.Option(help="Runs that may run at the same time; 0 holds them all.", min=0, show_default=False),
    ] = None,
    max_per_minute: Annotated[
        float | None, typer.Option(help="Runs that may start in a minute.", show_default=False)
    ] = None,
    lift: Annotated[bool, typer.Option("--lift", help="Lift its limits.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show the limits of a lane, or set or lift them. Setting one limit removes the other, unless both are given."""
    is_set = max_running is not None or max_per_minute is not None
    if lift and is_set:
        raise typer.BadParameter("--lift can't be combined with limits.")
    try:
        limits = Limits(max_running=max_running, max_per_minute=max_per_minute)
    except ValidationError as error:
        raise arguments.wrong_option(error) from None
    with connect(url) as service:
        if lift:
            service.lift_lane(name)
            if not as_json:
                typer.echo(f"The lane {name} has no limits any more.")
            return
        found = service.limit_lane(name, limits) if is_set else service.lane(name)
    _print_lanes([found], as_json, one=True)


def _print_lanes(found: Sequence[Lane], as_json: bool, *, one: bool = False) -> None:
    if as_json:
        documents = [lane.model_dump(mode="json") for lane in found]
        output.print_document(documents[0] if one else documents)
        return
    rows = [
        (lane.name, *("" if limit is None else f"{limit:g}" for limit in (lane.max_running, lane.max_per_minute)),
         str(lane.running), str(lane.queued), str(lane.held), lane.paused.reason or "yes" if lane.paused else "")
        for lane in found
    ]  # fmt: skip
    output.print_table(("LANE", "MAX RUNNING", "MAX PER MINUTE", "RUNNING", "QUEUED", "HELD", "PAUSED"), rows)
