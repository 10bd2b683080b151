"""The application that commands are declared on. Decides which exit code each error becomes."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from backcast import __version__
from backcast.cli import output
from backcast.errors import BackcastError, ClientError, NoResult, RunError, Unauthorized, Unavailable, WaitTimeout
from backcast.variables import KEY_VARIABLE

Command = TypeVar("Command", bound=Callable[..., None])

OK, RUN_FAILED, REFUSED, AWAY, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = (
    "Exit codes: 0 fine; 1 the run failed, was cancelled or expired; 2 wrong usage, or the service refused; "
    "3 the service can't be reached, or --timeout has passed. BACKCAST_URL is the address of the service, "
    "BACKCAST_API_KEY the key that it asks for."
)


class _Readable(TyperGroup):
    """Every error of ours ends as a red sentence on stderr and an exit code, never as a traceback."""

    def invoke(self, ctx: Any) -> object:
        try:
            return super().invoke(ctx)
        except BackcastError as error:
            if isinstance(error, Unauthorized):
                output.complain(f"The service asks for a key: set {KEY_VARIABLE} to one of its keys.")
                raise typer.Exit(REFUSED) from None
            output.complain(str(error))  # with the reason, which callers of the API do not see
            for field in error.errors if isinstance(error, ClientError) else ():
                if field.detail not in error.detail:
                    output.complain(f"  {field.pointer}: {field.detail}")
            raise typer.Exit(_exit_code(error)) from None
        except ModuleNotFoundError as error:
            command = ctx.invoked_subcommand
            if error.name is None or error.name.startswith("backcast") or command not in _EXTRAS:
                raise
            extra = f"pip install 'backcast[{_EXTRAS[command]}]'"
            output.complain(f"backcast {command} needs {error.name}, which is not installed: {extra}.")
            raise typer.Exit(REFUSED) from None


def _exit_code(error: BackcastError) -> int:
    match error:
        case RunError() | NoResult():
            return RUN_FAILED
        case Unavailable() | WaitTimeout():
            return AWAY
        case _:
            return REFUSED


app = typer.Typer(
    name="backcast", cls=_Readable, no_args_is_help=True, pretty_exceptions_enable=False, epilog=EXIT_CODES
)
use = partial(app.command, rich_help_panel="Use the service", epilog=EXIT_CODES)


def group(name: str, about: str) -> typer.Typer:
    """Declare a command that has commands of its own."""
    made = typer.Typer(name=name, help=about, no_args_is_help=True, pretty_exceptions_enable=False)
    app.add_typer(made, rich_help_panel="Use the service")
    return made


_EXTRAS: dict[str, str] = {}
"""By command: the extra of the package that has all that it imports."""


def run(extra: str, *, hidden: bool = False) -> Callable[[Command], Command]:
    """Declare a command that runs the service, and the extra that it needs."""

    def declare(command: Command) -> Command:
        _EXTRAS[command.__name__.replace("_", "-")] = extra
        return app.command(rich_help_panel="Run the service", hidden=hidden)(command)

    return declare


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
    """Background tasks you can rely on: an accepted run is finished, and its result is kept for you."""
