"""The commands about runs: from cast and submit to retry and cancel."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer
from pydantic import ValidationError

from backcast.cli import arguments, output
from backcast.cli.app import INTERRUPTED, use
from backcast.cli.service import AsJson, RunId, Timeout, Url, connect
from backcast.models import CAST, Run, State, Submission

if TYPE_CHECKING:
    from backcast.client import Client

Input = Annotated[
    Any,
    typer.Option(
        "--input",
        parser=arguments.json_object,
        metavar="JSON",
        help="All parameters as a JSON object, or @FILE (@- is stdin) with one.",
        show_default=False,
    ),
]


@use()
def cast(
    data: Annotated[str, typer.Argument(metavar="DATA", help="The data to cast; - reads it from stdin.")],
    to: Annotated[
        Any,
        typer.Option(
            "--to",
            parser=arguments.target,
            metavar="TARGET",
            help="The wanted shape: int, list\\[str], date, …, a JSON Schema, or @FILE with one.",
            show_default=False,
        ),
    ],
    instructions: Annotated[
        str | None, typer.Option(help="The thing to look for, in words.", show_default=False)
    ] = None,
    timeout: Timeout = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Turn messy data into a value of the wanted shape, and print it."""
    wanted = {"data": arguments.stdin() if data == "-" else data, "target": to}
    if instructions is not None:
        wanted["instructions"] = instructions
    with connect(url) as service:
        _finish(service, service.submit(CAST, wanted), timeout, as_json)


@use()
def submit(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task's name; see `backcast tasks`.")],
    pairs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Parameters; a value that parses as JSON is JSON.", show_default=False
        ),
    ] = None,
    given: Input = None,
    owner: Annotated[str, typer.Option(help="Owner of the run; owners get equal shares of the queue.")] = "default",
    priority: Annotated[int, typer.Option(help="Among the owner's runs, higher ones start first.")] = 0,
    run_at: Annotated[
        Any,
        typer.Option(parser=arguments.moment, metavar="TIME", help="Start no earlier than this.", show_default=False),
    ] = None,
    deadline: Annotated[
        Any,
        typer.Option(
            parser=arguments.moment, metavar="TIME", help="Expire if not started by this time.", show_default=False
        ),
    ] = None,
    lane: Annotated[str | None, typer.Option(help="Lane of the run; see `backcast lanes`.", show_default=False)] = None,
    key: Annotated[
        str | None, typer.Option(help="Idempotency-Key: the same key gives the same run.", show_default=False)
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result and print it instead of the id.")] = False,
    timeout: Timeout = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Queue a run of a task, and print its id."""
    parameters = (given or {}) | arguments.parameters(pairs or ())
    try:
        submission = Submission(
            input=parameters, owner=owner, priority=priority, run_at=run_at, deadline=deadline, lane=lane
        )
    except ValidationError as error:
        raise arguments.wrong_option(error) from None
    with connect(url) as service:
        run = service.submit(task, submission, key=key)
        if wait:
            _finish(service, run, timeout, as_json)
        elif as_json:
            output.print_document(run.model_dump(mode="json"))
        else:
            typer.echo(run.id)


@use()
def get(
    run_id: RunId,
    result: Annotated[bool, typer.Option("--result", help="Print the result.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show a run, or print its result. A run that failed is shown like any other, with exit code 0; `wait` and
    `--result` end with 1 for it.
    """
    with connect(url) as service:
        if result:
            output.print_value(service.result(run_id), as_json)
        else:
            output.print_run(service.get(run_id), as_json)


@use()
def wait(run_id: RunId, timeout: Timeout = None, url: Url = None, as_json: AsJson = False) -> None:
    """Wait until a run has ended, and show it."""
    from backcast.client import raise_for_state

    with connect(url) as service:
        run = _ended(service, run_id, timeout)
    output.print_run(run, as_json)
    raise_for_state(run)


@use("list")
def list_(
    state: Annotated[State | None, typer.Option(help="Only runs in this state.", show_default=False)] = None,
    task: Annotated[str | None, typer.Option(help="Only runs of this task.", show_default=False)] = None,
    owner: Annotated[str | None, typer.Option(help="Only runs of this owner.", show_default=False)] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Another filter, several times: lane, worker, batch, error (its code), text (of the error),"
            " created_after, created_before, ended_after, ended_before (times), metadata.NAME.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="Runs to show at most.", min=1)] = 20,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List runs, the newest first."""
    with connect(url) as service:
        runs = list(service.list(limit=limit, state=state, task=task, owner=owner, **arguments.filters(where or ())))
    if as_json:
        output.print_document([run.model_dump(mode="json") for run in runs])
        return
    now = datetime.now(UTC)
    output.print_table(
        ("ID", "TASK", "STATE", "WHY", "OWNER", "AGE", "TOOK"),
        [
            (
                str(run.id),
                run.task,
                run.state,
                run.why or "",
                run.owner,
                output.span(now - run.created_at),
                output.took(run),
            )
            for run in runs
        ],
    )


@use()
def cancel(run_id: RunId, url: Url = None, as_json: AsJson = False) -> None:
    """Cancel a run: a queued one never starts, a running one is asked to stop."""
    with connect(url) as service:
        run = service.cancel(run_id)
    if as_json:
        output.print_document(run.model_dump(mode="json"))
    elif run.state.is_final:
        typer.echo(f"Run {run.id} is {run.state}.")
    else:
        typer.echo(f"Run {run.id} is {run.state} and was asked to stop.")


@use()
def retry(
    run_id: RunId,
    given: Input = None,
    task: Annotated[str | None, typer.Option(help="Another task.", show_default=False)] = None,
    priority: Annotated[int | None, typer.Option(help="Another priority.", show_default=False)] = None,
    lane: Annotated[str | None, typer.Option(help="Another lane.", show_default=False)] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result and print it instead of the id.")] = False,
    timeout: Timeout = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Repeat a run that has ended as a new one, with its input or another one, and print the new id."""
    changes = {"input": given, "task": task, "priority": priority, "lane": lane}
    stated: Any = {name: value for name, value in changes.items() if value is not None}
    with connect(url) as service:
        run = service.retry(run_id, **stated)
        if wait:
            _finish(service, run, timeout, as_json)
        elif as_json:
            output.print_document(run.model_dump(mode="json"))
        else:
            typer.echo(run.id)


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
    run_id: RunId,
    with_logs: Annotated[bool, typer.Option("--logs", help="Also the lines of its log.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Follow a run until it has ended: its states, its progress, and what its task emits, a line each."""
    with connect(url) as service:
        try:
            for event in service.stream(run_id, logs=with_logs):
                if as_json:
                    output.print_line({"event": event.name, "data": event.data})
                else:
                    output.print_event(event.name, event.data)
        except KeyboardInterrupt:
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
    as_json: AsJson = False,
) -> None:
    """Print what the code of a run has logged and printed."""
    with connect(url) as service:
        try:
            for line in service.follow_logs(run_id) if follow else service.logs(run_id):
                output.print_line(line.model_dump(mode="json")) if as_json else output.print_log(line)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def _finish(service: "Client", run: Run, timeout: float | None, as_json: bool) -> None:
    from backcast.client import raise_for_state

    run = _ended(service, run.id, timeout)
    raise_for_state(run)
    output.print_value(service.result(run.id), as_json)


def _ended(service: "Client", run_id: UUID, timeout: float | None) -> Run:
    try:
        with output.watching(run_id) as progress:
            return service.wait(run_id, timeout=timeout, progress=progress)
    except KeyboardInterrupt:
        output.err.print(f"The run goes on: backcast wait {run_id}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
