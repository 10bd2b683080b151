"""The commands that submit, read, list, cancel and retry runs."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer
from pydantic import ValidationError

from backcast.cli import arguments, many, output
from backcast.cli.app import INTERRUPTED, use
from backcast.cli.service import AsJson, Labels, RunId, Timeout, Url, Where, connect, names
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
RunAt = Annotated[
    Any,
    typer.Option(parser=arguments.moment, metavar="TIME", help="Start no earlier than this.", show_default=False),
]
Deadline = Annotated[
    Any,
    typer.Option(
        parser=arguments.moment, metavar="TIME", help="Expire if not started by this time.", show_default=False
    ),
]
MaybeRun = Annotated[UUID | None, typer.Argument(metavar="ID", help="The run's id.", show_default=False)]
Yes = Annotated[bool, typer.Option("--yes", help="With --where: do not ask before.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="With --where: only count the runs.")]


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
    task: Annotated[
        str,
        typer.Argument(metavar="TASK", help="The task's name; see `backcast tasks`.", autocompletion=names("tasks")),
    ],
    pairs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Parameters; a value that parses as JSON is JSON.", show_default=False
        ),
    ] = None,
    given: Input = None,
    owner: Annotated[str, typer.Option(help="Owner of the run; owners get equal shares of the queue.")] = "default",
    priority: Annotated[int, typer.Option(help="Among the owner's runs, higher ones start first.")] = 0,
    run_at: RunAt = None,
    deadline: Deadline = None,
    lane: Annotated[
        str | None,
        typer.Option(help="Lane of the run; see `backcast lanes`.", autocompletion=names("lanes"), show_default=False),
    ] = None,
    metadata: Labels = None,
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
            input=parameters,
            owner=owner,
            priority=priority,
            run_at=run_at,
            deadline=deadline,
            lane=lane,
            metadata=arguments.labels(metadata or ()),
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
    """Show a run, or print its result.

    A run that failed is shown like any other, with exit code 0; `wait` and `--result` end with 1 for it.
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
    task: Annotated[
        str | None, typer.Option(help="Only runs of this task.", autocompletion=names("tasks"), show_default=False)
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Only runs of this owner.", show_default=False)] = None,
    where: Where = None,
    limit: Annotated[int, typer.Option(help="Runs to show at most.", min=1)] = 20,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List runs, the newest first."""
    named = {"state": state, "task": task, "owner": owner}
    chosen = arguments.filters(where or (), arguments.FILTERS) | {
        name: value for name, value in named.items() if value is not None
    }
    with connect(url) as service:
        runs = list(service.list(limit=limit, **chosen))
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
def cancel(
    run_id: MaybeRun = None,
    where: Where = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Cancel a run, or with --where all that match.

    A queued run never starts, a running one is asked to stop.
    """
    one = _one(run_id, where)
    with connect(url) as service:
        if one is None:
            many.carry_out(service, "cancel", where or [], yes=yes, dry_run=dry_run, as_json=as_json)
            return
        run = service.cancel(one)
    if as_json:
        output.print_document(run.model_dump(mode="json"))
    elif run.state.is_final:
        typer.echo(f"Run {run.id} is {run.state}.")
    else:
        typer.echo(f"Run {run.id} is {run.state} and was asked to stop.")


@use()
def retry(
    run_id: MaybeRun = None,
    where: Where = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    given: Input = None,
    task: Annotated[
        str | None, typer.Option(help="Another task.", autocompletion=names("tasks"), show_default=False)
    ] = None,
    priority: Annotated[int | None, typer.Option(help="Another priority.", show_default=False)] = None,
    run_at: RunAt = None,
    deadline: Deadline = None,
    lane: Annotated[
        str | None, typer.Option(help="Another lane.", autocompletion=names("lanes"), show_default=False)
    ] = None,
    metadata: Labels = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result and print it instead of the id.")] = False,
    timeout: Timeout = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Repeat a run that has ended as a new one, and print the new id; or with --where all that match.

    The new run has the input of the old one, unless another is given. --where repeats the failed and expired runs,
    unless it names a state.
    """
    one = _one(run_id, where)
    labels = arguments.labels(metadata) if metadata else None
    changes = {"input": given, "task": task, "priority": priority, "lane": lane, "metadata": labels}
    changes |= {"run_at": run_at, "deadline": deadline}
    stated: Any = {name: value for name, value in changes.items() if value is not None}
    if one is None and (wait or stated):
        raise typer.BadParameter("--where repeats runs as they were: changes and --wait are for one run.")
    with connect(url) as service:
        if one is None:
            many.carry_out(service, "retry", where or [], yes=yes, dry_run=dry_run, as_json=as_json)
            return
        run = service.retry(one, **stated)
        if wait:
            _finish(service, run, timeout, as_json)
        elif as_json:
            output.print_document(run.model_dump(mode="json"))
        else:
            typer.echo(run.id)


def _one(run_id: UUID | None, where: list[str] | None) -> UUID | None:
    if (run_id is None) == (not where):
        raise typer.BadParameter("give the id of one run, or --where for all that match.")
    return run_id


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
