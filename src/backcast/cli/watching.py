"""Shows a run or a batch as it moves, from the events of its stream: as a table that is drawn again, or as lines.

Decides which facts of the events are worth a glance.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from backcast.cli import output
from backcast.models import JSON, Batch, Run, State

if TYPE_CHECKING:
    from backcast.client import Event

_LINES = 8
"""Lines of a run, or errors of a batch, that are shown: the latest."""
_BAR = 40
"""Columns."""


def show(events: "Iterable[Event]", view: "View", as_json: bool) -> None:
    """Show the events until they end."""
    if as_json or not output.out.is_terminal:
        for event in events:
            if as_json:
                output.print_line({"event": event.name, "data": event.data})
            else:
                typer.echo(f"{event.name}\t{' '.join(words(event).split())}")
        return
    with Live(console=output.out, get_renderable=view.drawn, refresh_per_second=4, vertical_overflow="visible") as live:
        for event in events:
            view.takes(event)
            live.refresh()


class View(Protocol):
    def takes(self, event: "Event") -> None:
        """Note what has happened."""
        ...

    def drawn(self) -> RenderableType:
        """The table as it is now."""
        ...


class RunView:
    """A run: its state, its progress, and the latest lines of what its task emits and logs."""

    def __init__(self, run: Run) -> None:
        self._run, self._state, self._attempt = run, State.QUEUED, 0
        self._since, self._took = time.monotonic(), ""
        self._progress: tuple[float | None, str] = (None, "")
        self._lines = deque[str](maxlen=_LINES)

    def takes(self, event: "Event") -> None:
        given = _given(event)
        match event.name:
            case "started":
                self._state, self._attempt, self._since = State.RUNNING, given["attempt"], _moment(given.get("at"))
            case "retrying":
                self._state = State.QUEUED
                self._lines.append(f"attempt {given['attempt']} failed {_problem(given)}")
            case "progress":
                self._progress = given.get("fraction"), str(given.get("message") or "")
            case "ended":
                self._run = Run.model_validate(given["run"], extra="ignore")
                self._state, self._took = self._run.state, output.took(self._run)
                if self._run.error:
                    self._lines.append(f"{self._run.error.code}: {self._run.error.detail}")
            case "output" | "log":
                self._lines.append(words(event))
            case _:
                pass

    def drawn(self) -> RenderableType:
        took = self._took or (f"{time.monotonic() - self._since:.0f} s" if self._state is State.RUNNING else "")
        again = f"attempt {self._attempt}" if self._attempt > 1 else ""
        head = Table.grid(padding=(0, 2))
        head.add_row(output.printable(self._run.task), output.coloured(self._state), again, took)
        fraction, message = self._progress
        rows: list[RenderableType] = [head]
        if not self._state.is_final and (fraction is not None or message):
            rows.append(_bar(fraction, message))
        return Group(*rows, *(Text(output.printable(line), style="dim") for line in self._lines))


class BatchView:
    """A batch: its runs by state, and the latest errors, which `errors` reads."""

    def __init__(self, batch: Batch, errors: Callable[[], list[Run]]) -> None:
        self._batch, self._read, self._errors = batch, errors, list[Run]()

    def takes(self, event: "Event") -> None:
        if event.name in ("states", "ended"):
            failed = self._batch.states.get(State.FAILED)
            self._batch = Batch.model_validate(event.data, extra="ignore")
            if self._batch.states.get(State.FAILED) != failed or event.name == "ended":
                self._errors = self._read()

    def drawn(self) -> RenderableType:
        states, runs = self._batch.states, sum(self._batch.states.values())
        ended = sum(count for state, count in states.items() if state.is_final)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for column in ("STATE", "RUNS", ""):
            table.add_column(column, justify="right" if column == "RUNS" else "left")
        for state in State:
            if count := states.get(state):
                table.add_row(output.coloured(state), str(count), ProgressBar(runs, count, width=_BAR))
        table.add_row("ended", f"{ended} of {runs}", ProgressBar(max(runs, 1), ended, width=_BAR))
        problems = [(run, run.error) for run in self._errors[:_LINES] if run.error]
        lines = [Text(output.printable(f"{run.id}  {error.code}: {error.detail}")) for run, error in problems]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(table, *([Text("\nLatest errors", style="dim"), *lines] if lines else []))


def words(event: "Event") -> str:
    """What of an event is worth a glance."""
    given = _given(event)
    match event.name:
        case "progress":
            fraction = given.get("fraction")
            words = [f"{fraction:.0%}" if isinstance(fraction, int | float) else "", str(given.get("message") or "")]
        case "output":
            kind = given.get("kind")
            words = ["" if kind in (None, "output") else str(kind), json.dumps(given.get("data"), ensure_ascii=False)]
        case "log":
            words = [str(given.get("message") or "")]
        case "states":
            words = [_counted(given)]
        case "runs":
            words = [", ".join(f"{each['id']} {each['state']}" for each in given.get("items", ()))]
        case "ended" if "run" in given:
            words = [str(given["run"].get("state", "")), _problem(given["run"])]
        case "ended":
            words = [_counted(given)]
        case _:
            words = [f"attempt {given['attempt']}" if "attempt" in given else "", _problem(given)]
    return output.printable(" ".join(word for word in words if word))


def _counted(batch: dict[str, JSON]) -> str:
    return ", ".join(f"{count} {state}" for state, count in batch.get("states", {}).items())


def _problem(given: dict[str, JSON]) -> str:
    error = given.get("error")
    return f"{error['code']}: {error['detail']}" if error else ""


def _given(event: "Event") -> dict[str, JSON]:
    return event.data if isinstance(event.data, dict) else {}


def _bar(fraction: float | None, message: str) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    part = "" if fraction is None else f"{fraction:.0%}"
    row.add_row(ProgressBar(1.0, fraction or 0.0, width=_BAR, pulse=fraction is None), part, output.printable(message))
    return row


def _moment(at: str | None) -> float:
    """By our monotonic clock."""
    ago = datetime.now().astimezone() - datetime.fromisoformat(at) if at else None
    return time.monotonic() - (max(0.0, ago.total_seconds()) if ago else 0.0)
