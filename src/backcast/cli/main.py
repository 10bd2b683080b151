"""The command line: starts the processes, and talks to a running service over HTTP.

Decides how things look and which exit code a script gets; knows nothing of the database or the queue. The process
commands import their process when called, so that the API never loads prefect or marvin.
"""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer
from pydantic import ValidationError
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from typer.core import TyperGroup

from backcast import __version__, client
from backcast.cli import output
from backcast.errors import BackcastError, ClientError, NoResult, RunError, Unavailable
from backcast.models import JSON, Lane, Limits, Run, State, Submission
from backcast.settings import KEY_VARIABLE, URL_VARIABLE, load

OK, RUN_FAILED, REFUSED, AWAY, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = (
    "Exit codes: 0 fine; 1 the run failed, was cancelled or expired; 2 wrong usage, or the service refused; "
    "3 the service can't be reached, or --timeout has passed."
)

_URL_FILE = Path(".backcast/url")  # written by `up`
_PATIENCE = 3.0  # seconds: a person looks at the screen


class _Readable(TyperGroup):
    """Every error of ours ends as a red sentence on stderr and an exit code, never as a traceback."""

    def invoke(self, ctx: Any) -> object:
        try:
            return super().invoke(ctx)
        except BackcastError as error:
            output.complain(error.detail)
            for field in error.errors if isinstance(error, ClientError) else ():
                if field.detail not in error.detail:
                    output.complain(f"  {field.pointer}: {field.detail}")
            raise typer.Exit(_exit_code(error)) from None
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("backcast"):
                raise
            output.complain(f"{error.name} is not installed, and this command needs it: pip install 'backcast[local]'.")
            raise typer.Exit(REFUSED) from None


def _exit_code(error: BackcastError) -> int:
    match error:
        case RunError() | NoResult():
            return RUN_FAILED
        case Unavailable() | client.WaitTimeout():
            return AWAY
        case _:
            return REFUSED


app = typer.Typer(
    name="backcast", cls=_Readable, no_args_is_help=True, pretty_exceptions_enable=False, epilog=EXIT_CODES
)
_use = partial(app.command, rich_help_panel="Use the service", epilog=EXIT_CODES)
_run = partial(app.command, rich_help_panel="Run the service")

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


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"backcast {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Background tasks you can rely on: what was accepted is finished, and its result waits for you."""


# Processes


@_run()
def up(
    data: Annotated[Path, typer.Option(help="Folder for the database, the results and the logs.")] = Path(".backcast"),
    model: Annotated[bool, typer.Option(help="Serve the embedded model, when no provider is set.")] = True,
    port: Annotated[int, typer.Option(help="Port of the API; the next free one if it is taken.")] = 8000,
    slots: Annotated[
        int | None, typer.Option(help="Runs that are worked on at the same time.", show_default=False)
    ] = None,
) -> None:
    """Run the whole product on this machine."""
    from backcast.local import up

    raise typer.Exit(up.up(data=data, model=model, port=port, slots=slots))


@_run()
def api() -> None:
    """Run the HTTP API."""
    from backcast.api import app

    app.serve(load())


@_run()
def worker() -> None:
    """Run a worker, which claims runs and executes them."""
    from backcast.worker import loop

    loop.main(load())


@_run()
def steward() -> None:
    """Run the steward, which requeues the runs of dead workers and cleans up."""
    from backcast.steward import loop

    loop.main(load())


@_run()
def model() -> None:
    """Run the embedded model's server; its file is downloaded first if need be."""
    from backcast.local import model_server, weights

    settings = load().model
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=output.err, transient=True, disable=not output.err.is_terminal) as bars:
        bar = bars.add_task("model", total=None)

        def show(done: int, total: int, source: str) -> None:
            bars.update(bar, completed=done, total=total, description=f"model from {source}")

        file = settings.weights or weights.fetch(settings.cache, show)
    model_server.main(settings, file)


@_run()
def setup() -> None:
    """Make what the processes need: roles and databases if told to, the schema, the store's folder or bucket."""
    from backcast import provision

    provision.prepare(load(), typer.echo)


@_run()
def check() -> None:
    """Try every call that the processes make to the database and the store, and say what to change."""
    from backcast import provision

    if not provision.check(load(), typer.echo):
        raise typer.Exit(RUN_FAILED)


@_run(hidden=True)
def await_database() -> None:
    """Wait until the Prefect server's database can be used: that server ends when it can't."""
    from backcast import provision

    provision.await_prefect_database(load(), typer.echo)


# Values on the command line


def _address(url: str | None) -> str:
    return url or (_URL_FILE.read_text().strip() if _URL_FILE.is_file() else client.DEFAULT_URL)


def _connect(url: str | None) -> client.Client:
    shown = client.authorization(os.environ.get(KEY_VARIABLE))
    return client.Client(_address(url), headers=shown, patience=_PATIENCE)


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise typer.BadParameter("what comes from stdin is not text.") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_loads = partial(json.loads, parse_constant=_refuse_constant)


def _json_or_file(given: str) -> JSON:
    try:
        if given == "@-":
            return _loads(_stdin())
        return _loads(Path(given[1:]).read_text() if given.startswith("@") else given)
    except OSError as error:
        raise typer.BadParameter(f"{given[1:]} can't be read: {error.strerror}.") from None
    except ValueError as error:
        raise typer.BadParameter(f"this is not JSON ({error}).") from None


def _json_object(given: str) -> dict[str, JSON]:
    value = _json_or_file(given)
    if not isinstance(value, dict):
        raise typer.BadParameter("a JSON object is wanted: the task's parameters by name.")
    return value


def _target(given: str) -> JSON:
    return _json_or_file(given) if given.startswith(("@", "{")) else given


def _moment(given: str) -> datetime:
    try:
        return datetime.fromisoformat(given).astimezone()  # without an offset it is this machine's time
    except ValueError:
        raise typer.BadParameter("a time is wanted, such as 2030-01-31T08:00 or 2030-01-31T08:00Z.") from None


def _wrong_option(error: ValidationError) -> typer.BadParameter:
    first = error.errors(include_url=False)[0]
    return typer.BadParameter(f"{first['msg']}.", param_hint=f"--{str(first['loc'][0]).replace('_', '-')}")


def _parameters(pairs: Iterable[str]) -> dict[str, JSON]:
    parameters: dict[str, JSON] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE.")
        try:
            parameters[name] = _loads(text)
        except ValueError:
            parameters[name] = text
    return parameters


# Runs and tasks


@_use()
def cast(
    data: Annotated[str, typer.Argument(metavar="DATA", help="What to cast; - reads it from stdin.")],
    to: Annotated[
        Any,
        typer.Option(
            "--to",
            parser=_target,
            metavar="TARGET",
            help="The wanted shape: int, list\\[str], date, …, a JSON Schema, or @FILE with one.",
            show_default=False,
        ),
    ],
    instructions: Annotated[str | None, typer.Option(help="What to look for, in words.", show_default=False)] = None,
    timeout: Timeout = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Turn messy data into a value of the wanted shape, and print it."""
    wanted = {"data": _stdin() if data == "-" else data, "target": to}
    if instructions is not None:
        wanted["instructions"] = instructions
    with _connect(url) as service:
        _finish(service, service.submit(client.CAST, wanted), timeout, as_json)


@_use()
def submit(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task's name; see `backcast tasks`.")],
    pairs: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Parameters; a value that reads as JSON is JSON.", show_default=False),
    ] = None,
    given: Annotated[
        Any,
        typer.Option(
            "--input",
            parser=_json_object,
            metavar="JSON",
            help="All parameters as a JSON object, or @FILE (@- is stdin) with one.",
            show_default=False,
        ),
    ] = None,
    owner: Annotated[str, typer.Option(help="Whose run it is; owners get equal shares of the queue.")] = "default",
    priority: Annotated[int, typer.Option(help="Among the owner's runs, higher ones start first.")] = 0,
    run_at: Annotated[
        Any, typer.Option(parser=_moment, metavar="TIME", help="Not before this time.", show_default=False)
    ] = None,
    deadline: Annotated[
        Any,
        typer.Option(parser=_moment, metavar="TIME", help="Not if it has not started by then.", show_default=False),
    ] = None,
    lane: Annotated[
        str | None, typer.Option(help="What it draws on; see `backcast lanes`.", show_default=False)
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Idempotency-Key: the same key gives the same run.", show_default=False)
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result and print it instead of the id.")] = False,
    timeout: Timeout = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Queue a run of a task, and print its id."""
    parameters = (given or {}) | _parameters(pairs or ())
    try:
        submission = Submission(
            input=parameters, owner=owner, priority=priority, run_at=run_at, deadline=deadline, lane=lane
        )
    except ValidationError as error:
        raise _wrong_option(error) from None
    with _connect(url) as service:
        run = service.submit(task, submission, key=key)
        if wait:
            _finish(service, run, timeout, as_json)
        elif as_json:
            output.print_document(run.model_dump(mode="json"))
        else:
            typer.echo(run.id)


@_use()
def get(
    run_id: RunId,
    result: Annotated[bool, typer.Option("--result", help="Print the result.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show a run, or print its result."""
    with _connect(url) as service:
        if result:
            output.print_value(service.result(run_id), as_json)
        else:
            output.print_run(service.get(run_id), as_json)


@_use()
def wait(run_id: RunId, timeout: Timeout = None, url: Url = None, as_json: AsJson = False) -> None:
    """Wait until a run has ended, and show it."""
    with _connect(url) as service:
        run = _ended(service, run_id, timeout)
    output.print_run(run, as_json)
    client.raise_for_state(run)


@_use("list")
def list_(
    state: Annotated[State | None, typer.Option(help="Only runs in this state.", show_default=False)] = None,
    task: Annotated[str | None, typer.Option(help="Only runs of this task.", show_default=False)] = None,
    owner: Annotated[str | None, typer.Option(help="Only runs of this owner.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(help="Runs to show at most.", min=1)] = 20,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List runs, the newest first."""
    with _connect(url) as service:
        runs = list(service.list(limit=limit, state=state, task=task, owner=owner))
    if as_json:
        output.print_document([run.model_dump(mode="json") for run in runs])
        return
    now = datetime.now(UTC)
    output.print_table(
        ("ID", "TASK", "STATE", "OWNER", "AGE", "TOOK"),
        [
            (str(run.id), run.task, run.state, run.owner, output.span(now - run.created_at), output.took(run))
            for run in runs
        ],
    )


@_use()
def cancel(run_id: RunId, url: Url = None, as_json: AsJson = False) -> None:
    """Cancel a run: a queued one never starts, a running one is asked to stop."""
    with _connect(url) as service:
        run = service.cancel(run_id)
    if as_json:
        output.print_document(run.model_dump(mode="json"))
    elif run.state.is_final:
        typer.echo(f"Run {run.id} is {run.state}.")
    else:
        typer.echo(f"Run {run.id} is {run.state} and was asked to stop.")


@_use()
def tasks(
    name: Annotated[str | None, typer.Argument(help="Show this one.", show_default=False)] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List the tasks that can be run, or show one with its parameters."""
    with _connect(url) as service:
        if name is not None:
            output.print_task(service.task(name), as_json)
            return
        found = service.tasks()
    if as_json:
        output.print_document([task.model_dump(mode="json") for task in found])
    else:
        rows = [(task.name, " ".join(output.usage(task)), task.description.partition("\n")[0]) for task in found]
        output.print_table(("TASK", "PARAMETERS", "DESCRIPTION"), rows)


# Lanes


@_use()
def lanes(url: Url = None, as_json: AsJson = False) -> None:
    """List the lanes that have limits."""
    with _connect(url) as service:
        _print_lanes(service.lanes(), as_json)


@_use()
def lane(
    name: Annotated[str, typer.Argument(metavar="LANE", help="The lane's name.")],
    max_running: Annotated[
        int | None,
        typer.Option(help="Runs that may run at the same time; 0 holds them all.", min=0, show_default=False),
    ] = None,
    max_per_minute: Annotated[
        float | None, typer.Option(help="Runs that may start in a minute.", show_default=False)
    ] = None,
    lift: Annotated[bool, typer.Option("--lift", help="Take its limits away.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show the limits of a lane, or set or lift them. Limits that are not given are removed."""
    is_set = max_running is not None or max_per_minute is not None
    if lift and is_set:
        raise typer.BadParameter("--lift takes no limits with it.")
    try:
        limits = Limits(max_running=max_running, max_per_minute=max_per_minute)
    except ValidationError as error:
        raise _wrong_option(error) from None
    with _connect(url) as service:
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
         str(lane.admitted), str(lane.held))
        for lane in found
    ]  # fmt: skip
    output.print_table(("LANE", "MAX RUNNING", "MAX PER MINUTE", "ADMITTED", "HELD"), rows)


# Waiting


def _finish(service: client.Client, run: Run, timeout: float | None, as_json: bool) -> None:
    run = _ended(service, run.id, timeout)
    client.raise_for_state(run)
    output.print_value(service.result(run.id), as_json)


def _ended(service: client.Client, run_id: UUID, timeout: float | None) -> Run:
    try:
        with output.watching(run_id) as progress:
            return service.wait(run_id, timeout=timeout, progress=progress)
    except KeyboardInterrupt:
        output.err.print(f"The run goes on: backcast wait {run_id}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
