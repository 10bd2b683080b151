"""Makes values from arguments of the command line: JSON, files, times, targets, parameters."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError

from backcast.errors import did_you_mean
from backcast.models import JSON, CancelMany, Selection, parse_json


def stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise typer.BadParameter("the input from stdin is not text.") from None


def _json_or_file(given: str) -> JSON:
    try:
        if given == "@-":
            return parse_json(stdin())
        return parse_json(Path(given[1:]).read_text() if given.startswith("@") else given)
    except OSError as error:
        raise typer.BadParameter(f"{given[1:]} can't be read: {error.strerror}.") from None
    except ValueError as error:
        raise typer.BadParameter(f"this is not JSON ({error}).") from None


def json_object(given: str) -> dict[str, JSON]:
    value = _json_or_file(given)
    if not isinstance(value, dict):
        raise typer.BadParameter("a JSON object is wanted: the task's parameters by name.")
    return value


def target(given: str) -> JSON:
    return _json_or_file(given) if given.startswith(("@", "{")) else given


def moment(given: str) -> datetime:
    try:
        return datetime.fromisoformat(given).astimezone()  # without an offset it is this machine's time
    except ValueError:
        raise typer.BadParameter("a time is wanted, such as 2030-01-31T08:00 or 2030-01-31T08:00Z.") from None
    except OverflowError:
        raise typer.BadParameter("the time is outside of the years 1 to 9999.") from None


def filters(pairs: Iterable[str], among: Sequence[str]) -> Any:
    """Filters of runs, by name; their values are checked by the client."""
    found: dict[str, Any] = {}
    for name, text in _split(pairs):
        if name.startswith(_LABEL):
            found.setdefault("metadata", {})[name.removeprefix(_LABEL)] = text
        elif name in among:
            found[name] = moment(text) if name.endswith(("_after", "_before")) else text
        else:
            hint = did_you_mean(name, among)
            raise typer.BadParameter(f"{name!r} is no filter.{hint} There are {', '.join(among)}, {_LABEL}NAME.")
    return found


_LABEL = "metadata."
FILTERS = tuple(sorted(name for name in Selection.model_fields if name != "metadata"))
FILTERS_OF_LIVE_RUNS = tuple(name for name in FILTERS if name in CancelMany.model_fields)


def labels(pairs: Iterable[str]) -> dict[str, str]:
    return dict(_split(pairs))


def _split(pairs: Iterable[str], word: str = "NAME") -> Iterator[tuple[str, str]]:
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{pair!r} is not {word}=VALUE.")
        yield name, text


def wrong_option(error: ValidationError) -> typer.BadParameter:
    first = error.errors(include_url=False)[0]
    return typer.BadParameter(f"{first['msg']}.", param_hint=f"--{str(first['loc'][0]).replace('_', '-')}")


def parameters(pairs: Iterable[str]) -> dict[str, JSON]:
    parameters: dict[str, JSON] = {}
    for name, text in _split(pairs, "KEY"):
        try:
            parameters[name] = parse_json(text)
        except ValueError:
            parameters[name] = text
    return parameters
