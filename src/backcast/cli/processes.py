"""The commands that run the service. Each imports its process when it is called, so that none loads another's."""

import logging
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from backcast.cli import output
from backcast.cli.app import RUN_FAILED, run

if TYPE_CHECKING:
    from backcast.settings import Settings


def _settings() -> "Settings":
    from backcast.settings import load

    return load()


@run("local")
def up(
    data: Annotated[Path, typer.Option(help="Folder for the database, the results and the logs.")] = Path(".backcast"),
    model: Annotated[
        str | None, typer.Option(help="The embedded model: 0.5b, or 1.5b, which is better.", show_default="0.5b")
    ] = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Serve no embedded model.")] = False,
    port: Annotated[int, typer.Option(help="Port of the API; the next free one if it is taken.")] = 8000,
    prefect_port: Annotated[
        int, typer.Option(help="Port of the Prefect server; the next free one if it is taken.")
    ] = 4200,
    slots: Annotated[
        int | None, typer.Option(help="Runs that are executed at the same time.", show_default=False)
    ] = None,
) -> None:
    """Run the whole product on this machine."""
    from backcast.local import up

    raise typer.Exit(
        up.up(data=data, model=model, no_model=no_model, port=port, prefect_port=prefect_port, slots=slots)
    )


@run("api")
def api() -> None:
    """Run the HTTP API."""
    from backcast.api.main import main

    main(_settings())


@run("worker")
def worker() -> None:
    """Run a worker, which claims runs and executes them."""
    from backcast.worker.main import main

    main(_settings())


@run("api")
def steward() -> None:
    """Run the steward, which requeues the runs of dead workers and cleans up."""
    from backcast.steward.main import main

    main(_settings())


@run("llm")
def model() -> None:
    """Run the embedded model's server; its file is downloaded first if it is missing."""
    from backcast.local import model_server, weights
    from backcast.process.logs import configure_logging

    everything = _settings()
    configure_logging(everything.log_level, everything.log_format)
    settings = everything.model
    if settings.weights is None and weights.find(settings.cache, weights.MODELS[settings.size]) is None:
        logging.getLogger("backcast.model").info("downloading the model's file to %s", settings.cache)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=output.err, transient=True, disable=not output.err.is_terminal) as bars:
        bar = bars.add_task("model", total=None)

        def show(done: int, total: int, source: str) -> None:
            bars.update(bar, completed=done, total=total, description=f"model from {source}")

        file = settings.weights or weights.fetch(settings.cache, show, weights.MODELS[settings.size])
    model_server.main(settings, file)


@run("api")
def setup() -> None:
    """Provision roles and databases (with an admin URL), the schema, the store's folder or bucket."""
    from backcast import provision

    provision.prepare(_settings(), typer.echo)


class Part(StrEnum):
    API = "api"
    WORKER = "worker"
    STEWARD = "steward"


@run("api")
def check(
    part: Annotated[
        list[Part] | None, typer.Argument(help="The parts whose rights in the database are tried; none: all.")
    ] = None,
) -> None:
    """Try every call that the processes make to the database and the store, and print what to change."""
    from backcast import provision

    if not provision.check(_settings(), typer.echo, part or list(Part)):
        raise typer.Exit(RUN_FAILED)


@run("api")
def copy_objects() -> None:
    """Copy the objects that only the fallback has (BACKCAST_STORE__FALLBACK__URL) into the store."""
    from backcast import provision

    provision.copy_objects(_settings(), typer.echo)


@run("api", hidden=True)
def await_database() -> None:
    """Wait until the Prefect server's database can be used: without it that server ends."""
    from backcast import provision

    provision.await_prefect_database(_settings(), typer.echo)
