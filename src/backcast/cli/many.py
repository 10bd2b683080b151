"""Repeats or cancels all runs that match filters: counts them, asks, and follows the operation to its end."""

import time
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from backcast.cli import arguments, output
from backcast.cli.app import INTERRUPTED
from backcast.models import Matched, Operation

if TYPE_CHECKING:
    from backcast.client import Client

_PAUSE = 0.5
"""Seconds between two looks at an operation."""


def carry_out(
    service: "Client", kind: Literal["retry", "cancel"], where: list[str], *, yes: bool, dry_run: bool, as_json: bool
) -> None:
    among = arguments.FILTERS if kind == "retry" else arguments.FILTERS_OF_LIVE_RUNS
    chosen = arguments.filters(where, among)
    matched = None if yes and not dry_run else _count(service, kind, chosen)
    if dry_run and matched is not None:
        output.print_document(matched.model_dump()) if as_json else typer.echo(_runs(matched))
        return
    if matched is not None:
        if not output.err.is_terminal or as_json:
            raise typer.BadParameter(f"{_runs(matched)}: add --yes to {kind} them.")
        typer.confirm(f"{kind.capitalize()} {_runs(matched)}?", abort=True, err=True)
    operation = service.retry_many(**chosen) if kind == "retry" else service.cancel_many(**chosen)
    try:
        operation = _ended(service, operation, matched.runs if matched else None)
    except KeyboardInterrupt:
        output.err.print(f"The operation {operation.id} goes on.", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        output.print_document(operation.model_dump(mode="json"))
        return
    left = [f"{count} {how}" for how, count in (("skipped", operation.skipped), ("failed", operation.failed)) if count]
    done = "repeated" if kind == "retry" else "cancelled, or asked to stop"
    typer.echo(", ".join([f"{operation.done} {done}", *left]) + ".")


def _count(service: "Client", kind: str, chosen: Any) -> Matched:
    return service.count_to_retry(**chosen) if kind == "retry" else service.count_to_cancel(**chosen)


def _runs(matched: Matched) -> str:
    return f"{'more than ' if matched.more else ''}{matched.runs} {'run' if matched.runs == 1 else 'runs'}"


def _ended(service: "Client", operation: Operation, total: int | None) -> Operation:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=output.err, transient=True, disable=not output.err.is_terminal) as bars:
        bar = bars.add_task(operation.kind, total=total)
        while operation.state == "running":
            time.sleep(_PAUSE)
            operation = service.operation(operation.id)
            bars.update(bar, completed=operation.done)
    return operation
