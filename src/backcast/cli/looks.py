"""The commands that look into a run: its attempts, its events as they happen, why it waits, its log."""

from typing import Annotated
from uuid import UUID

import typer

from backcast.cli import output, watching
from backcast.cli.app import INTERRUPTED, use
from backcast.cli.service import AsJson, AsLines, RunId, Url, connect
from backcast.cli.watching import BatchView, RunView
from backcast.errors import UnknownRun


@use()
def attempts(run_id: RunId, url: Url = None, as_json: AsJson = False) -> None:
    """Show the attempts of a run: how each ended, on which worker, and its traceback."""
    with connect(url) as service:
        found = service.attempts(run_id)
    if as_json:
        output.print_document(found.model_dump(mode="json"))
        return
    rows = [(str(one.number), one.outcome, one.host or "", output.lasted(one), one.error.code if one.error else "")
            for one in found.items]  # fmt: skip
    output.print_table(("ATTEMPT", "OUTCOME", "HOST", "TOOK", "ERROR"), rows)
    for one in found.items:
        if one.traceback:
            typer.echo(f"\nAttempt {one.number}:\n{one.traceback.rstrip()}")


@use()
def watch(
    which: Annotated[UUID, typer.Argument(metavar="ID", help="The id of a run, or of a batch.")],
    with_logs: Annotated[bool, typer.Option("--logs", help="Also the lines of a run's log.")] = False,
    url: Url = None,
    as_json: AsLines = False,
) -> None:
    """Follow a run or a batch until it has ended.

    On a terminal it is a table that moves, elsewhere a line for each event.
    """
    with connect(url) as service:
        try:
            run = service.get(which)
        except UnknownRun:
            run = None
        try:
            if run is None:
                view = BatchView(service.batch(which), lambda: list(service.list(batch=which, state="failed", limit=8)))
                watching.show(service.stream_batch(which), view, as_json)
            else:
                watching.show(service.stream(which, logs=with_logs), RunView(run), as_json)
        except KeyboardInterrupt:
            output.err.print(f"It goes on: backcast watch {which}", soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None


@use()
def why(run_id: RunId, url: Url = None, as_json: AsJson = False) -> None:
    """Explain where a run is, and what it waits for."""
    with connect(url) as service:
        found = service.why(run_id)
    if as_json:
        output.print_document(found.model_dump(mode="json", exclude_none=True))
    else:
        typer.echo(found.sentence)


@use()
def logs(
    run_id: RunId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    url: Url = None,
    as_json: AsLines = False,
) -> None:
    """Print what the code of a run has logged and printed."""
    with connect(url) as service:
        try:
            for line in service.follow_logs(run_id) if follow else service.logs(run_id):
                output.print_line(line.model_dump(mode="json")) if as_json else output.print_log(line)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
