"""Prints values, runs, tables and progress, for people on a terminal and for scripts without one.

Decides widths, colours, and the characters that must not reach a terminal; knows nothing of HTTP or of commands.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from backcast.client import LogLine
from backcast.models import JSON, Attempt, Run, State, TaskType

_COLOURS = {
    State.QUEUED: "cyan",
    State.RUNNING: "blue",
    State.COMPLETED: "green",
    State.FAILED: "red",
    State.CANCELLED: "magenta",
    State.EXPIRED: "yellow",
}
_WORDS = ("TASK", "OWNER", "PARAMETERS", "DESCRIPTION")  # they give way on a narrow terminal; an id is for pasting

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


@contextmanager
def watching(run_id: UUID) -> Iterator[Callable[[Run], object] | None]:
    """On a terminal, show a moving line while entered: the state of the run and the time that has passed."""
    if not err.is_terminal:
        yield None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bars:
        bar = bars.add_task(f"run {run_id}", total=None)

        def show(run: Run) -> None:
            again = f", attempt {run.attempts}" if run.attempts > 1 else ""
            bars.update(bar, description=f"{run.task} is {run.state}{again}")

        yield show


def complain(sentence: str) -> None:
    err.print(Text(printable(sentence), style="red"), soft_wrap=True)


def printable(text: str) -> str:
    """Replace control characters: text of others must not control the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def print_document(value: JSON) -> None:
    typer.echo(json.dumps(value, indent=2))


def print_value(value: JSON, as_json: bool) -> None:
    if as_json:
        print_document(value)
    elif isinstance(value, str):
        typer.echo(printable(value) if out.is_terminal else value)
    else:
        out.print_json(json.dumps(value))


def print_run(run: Run, as_json: bool) -> None:
    if as_json:
        print_document(run.model_dump(mode="json"))
        return
    facts = {
        "id": str(run.id),
        "task": run.task,
        "state": run.state,
        "owner": run.owner,
        "priority": str(run.priority),
        "lane": run.lane or "",
        "attempts": str(run.attempts),
        "created": _local(run.created_at),
        "not before": _local(run.run_at) if run.run_at > run.created_at else "",
        "deadline": _local(run.deadline),
        "started": _local(run.started_at),
        "finished": _local(run.finished_at),
        "took": took(run),
        "error": f"{run.error.code}: {run.error.detail}" if run.error else "",
        **{f"metadata.{name}": value for name, value in run.metadata.items()},
    }
    _print_facts(facts)


def print_task(task: TaskType, as_json: bool) -> None:
    if as_json:
        print_document(task.model_dump(mode="json"))
        return
    facts = {
        "task": task.name,
        "about": task.description,
        "warning": " ".join(task.warnings),
        "pool": task.pool,
        "version": task.version,
        "retries": str(task.retries),
        "timeout": span(task.timeout) if task.timeout else "",
        "submit": " ".join(["backcast submit", task.name, *usage(task)]),
        "input": json.dumps(task.input_schema, indent=2, ensure_ascii=False),
    }
    _print_facts(facts)


def usage(task: TaskType) -> list[str]:
    required = task.input_schema.get("required", ())
    return [f"{name}=…" if name in required else f"[{name}=…]" for name in task.input_schema.get("properties", ())]


def _print_facts(facts: Mapping[str, str]) -> None:
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        if value and out.is_terminal:
            grid.add_row(Text(printable(name), style="dim"), coloured(value))
        elif value:
            typer.echo(f"{name}\t{value}")
    if out.is_terminal:
        out.print(grid)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; elsewhere lines with tabs, for cut and awk."""
    if not out.is_terminal:
        for row in (columns, *rows):
            typer.echo("\t".join(" ".join(cell.split()) for cell in row))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, no_wrap=column not in _WORDS, overflow="ellipsis")
    for row in rows:
        table.add_row(*map(coloured, row))
    out.print(table)


def coloured(value: str) -> Text:
    """Text in one line; a state has its colour."""
    return Text(printable(value), style=_COLOURS[value] if isinstance(value, State) else "")


def _local(moment: datetime | None) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S") if moment else ""


def print_line(value: JSON) -> None:
    """A line of JSON."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def print_log(line: "LogLine") -> None:
    """A line for people; what was printed has no level."""
    if line.logger in ("stdout", "stderr"):
        out.print(Text(printable(line.message)), soft_wrap=True)
        return
    text = Text(f"{line.at.astimezone():%H:%M:%S} {line.level:7} ", style="dim")
    out.print(text.append(printable(line.message), style=""), soft_wrap=True)


def took(run: Run) -> str:
    return span(run.finished_at - run.started_at) if run.finished_at and run.started_at else ""


def lasted(attempt: Attempt) -> str:
    return span(attempt.ended_at - attempt.started_at) if attempt.ended_at and attempt.started_at else ""


def span(time: timedelta) -> str:
    seconds = time.total_seconds()
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{max(seconds, 0):.1f} s"
