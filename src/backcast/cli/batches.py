"""The commands about batches: `batch submit`, `show`, `results`, `errors`, `retry`, `cancel`."""

from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from backcast.cli import output
from backcast.cli.app import group
from backcast.cli.service import AsJson, Url, connect
from backcast.models import Batch

batch = group("batch", "Many runs at once.")
BatchId = Annotated[UUID, typer.Argument(metavar="BATCH", help="The batch's id.")]


@batch.command()
def submit(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON Lines, one run each.", exists=True, dir_okay=False)
    ],
    task: Annotated[str | None, typer.Option(help="The task of lines that name none.", show_default=False)] = None,
    owner: Annotated[str | None, typer.Option(help="The owner of the batch.", show_default=False)] = None,
    skip: Annotated[bool, typer.Option("--skip", help="Go on without the wrong lines.")] = False,
    key: Annotated[
        str | None, typer.Option(help="Idempotency-Key: the same key gives the same batch.", show_default=False)
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Queue the runs of a file, and print the id of their batch."""
    with connect(url) as service:
        made = service.submit_lines(
            file.read_bytes(), task=task, owner=owner, on_error="skip" if skip else "reject", key=key
        )
    if as_json:
        output.print_document(made.model_dump(mode="json"))
        return
    typer.echo(made.id)
    if made.skipped:
        output.complain(f"Lines that were skipped: {made.skipped}. See: backcast batch errors {made.id}")


@batch.command()
def show(batch_id: BatchId, url: Url = None, as_json: AsJson = False) -> None:
    """Show a batch, with its runs counted by state."""
    with connect(url) as service:
        _print(service.batch(batch_id), as_json)


@batch.command()
def results(batch_id: BatchId, url: Url = None) -> None:
    """Print the runs of a batch with their results, as JSON Lines."""
    with connect(url) as service:
        for result in service.batch_results(batch_id):
            output.print_line(result.model_dump(mode="json", exclude_defaults=True))


@batch.command()
def errors(batch_id: BatchId, url: Url = None) -> None:
    """Print the errors of skipped lines, as JSON Lines."""
    with connect(url) as service:
        for error in service.batch_errors(batch_id):
            output.print_line(error)


@batch.command()
def cancel(batch_id: BatchId, url: Url = None, as_json: AsJson = False) -> None:
    """Cancel every run of a batch that has not ended."""
    with connect(url) as service:
        _print(service.cancel_batch(batch_id), as_json)


@batch.command()
def retry(batch_id: BatchId, url: Url = None, as_json: AsJson = False) -> None:
    """Repeat the failed and expired runs of a batch, and print the id of the batch that they make."""
    with connect(url) as service:
        operation = service.retry_batch(batch_id)
    if as_json:
        output.print_document(operation.model_dump(mode="json"))
    else:
        typer.echo(operation.batch_id)


def _print(batch: Batch, as_json: bool) -> None:
    if as_json:
        output.print_document(batch.model_dump(mode="json"))
        return
    states = [(state, str(count)) for state, count in sorted(batch.states.items())]
    output.print_table(("STATE", "RUNS"), [*states, ("skipped", str(batch.skipped))] if batch.skipped else states)
