"""The command about counts."""

from typing import Annotated

import typer

from backcast.cli import output
from backcast.cli.app import use
from backcast.cli.service import AsJson, Url, connect
from backcast.models import State, Within


@use()
def counts(
    within: Annotated[Within, typer.Option(help="The last hour, or day.")] = Within.HOUR,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Count the runs of the last hour or day, by task and state, and the errors of those that failed."""
    with connect(url) as service:
        found = service.counts(within)
    if as_json:
        output.print_document(found.model_dump(mode="json"))
        return
    rows = [("all", found.submitted, found.states), *((each.task, each.submitted, each.states) for each in found.tasks)]
    output.print_table(
        ("TASK", "SUBMITTED", *(state.upper() for state in State)),
        [(task, str(submitted), *(str(states.get(state, 0)) for state in State)) for task, submitted, states in rows],
    )
    if found.errors:
        typer.echo()
        errors = [(each.task, each.code, str(each.runs)) for each in found.errors]
        output.print_table(("TASK", "ERROR", "RUNS"), errors)
    if found.approximate:
        output.err.print("The numbers are estimates: there are too many runs to be counted one by one.")
