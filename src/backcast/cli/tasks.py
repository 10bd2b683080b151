"""The command about tasks."""

from typing import Annotated

import typer

from backcast.cli import output
from backcast.cli.app import use
from backcast.cli.service import AsJson, Url, connect, names


@use()
def tasks(
    name: Annotated[
        str | None, typer.Argument(help="Show this task.", autocompletion=names("tasks"), show_default=False)
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List the tasks that can be run, or show one with its parameters."""
    with connect(url) as service:
        if name is not None:
            output.print_task(service.task(name), as_json)
            return
        found = service.tasks()
    if as_json:
        output.print_document([task.model_dump(mode="json") for task in found])
    else:
        rows = [(task.name, " ".join(output.usage(task)), task.description.partition("\n")[0]) for task in found]
        output.print_table(("TASK", "PARAMETERS", "DESCRIPTION"), rows)
        for task in found:
            for warning in task.warnings:
                output.err.print(f"{task.name}: {warning}", style="yellow", markup=False, highlight=False)
