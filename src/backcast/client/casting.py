"""Exchanges of the built-in task: cast one value, or many rows. Decides how a wanted shape is asked for, and how its
values are read."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar, Unpack
from uuid import UUID

from pydantic import TypeAdapter, ValidationError

from backcast.client import batches, runs
from backcast.client.batches import BatchResult
from backcast.client.runs import SubmitOptions, Waiting
from backcast.client.wire import Ask, Flow, path, read
from backcast.errors import BodyTooLarge, InvalidInput, RunError, refuse_unknown
from backcast.models import CAST, JSON, Batch, State

_ROWS, _BATCHES = 25, 40
"""Rows that `cast_many` sends in one batch, and batches that are under way: results come often, and workers have enough
to do."""

T = TypeVar("T")


class CastManyOptions(SubmitOptions, total=False):
    progress: Callable[[int, int], object]
    """Called with the number of rows that have ended and of those that were submitted, every now and then."""


class CastResult(NamedTuple, Generic[T]):
    """What became of one row: a value, or the error of its run, or why it has none."""

    id: UUID | None
    """Of the run; a row that is no JSON, or that the service refuses, has none."""
    value: T | None
    error: RunError | None


class Shape:
    """A wanted shape: a name, a JSON Schema or a Python type."""

    def __init__(self, target: Any, instructions: str | None) -> None:
        self._type = None if isinstance(target, str | Mapping) else TypeAdapter[Any](target)
        self._wanted = {"target": target if self._type is None else self._type.json_schema()}
        if instructions is not None:
            self._wanted["instructions"] = instructions

    def input(self, data: JSON) -> dict[str, JSON]:
        return {"data": data, **self._wanted}

    def value(self, value: JSON) -> Any:
        return value if self._type is None else self._type.validate_json(json.dumps(value))


def cast(data: JSON, target: Any, instructions: str | None, waiting: Waiting) -> Flow[Any]:
    refuse_unknown("cast", waiting, ("instructions", *Waiting.__annotations__))
    shape = Shape(target, instructions)
    run = yield from runs.submit(CAST, shape.input(data))
    if progress := waiting.get("progress"):
        progress(run)
    run = yield from runs.wait(run.id, **waiting)
    runs.raise_for_state(run)
    return shape.value((yield from runs.result(run.id)))


class Rows:
    """Rows that are cast, a thousand at a time at most."""

    def __init__(
        self, rows: Iterator[JSON], target: Any, instructions: str | None, **options: Unpack[CastManyOptions]
    ) -> None:
        refuse_unknown("cast_many", options, ("instructions", *CastManyOptions.__annotations__))
        self._progress = options.pop("progress", None)
        self._rows, self._options, self._shape = rows, options, Shape(target, instructions)
        self._under_way = deque[UUID | CastResult[Any]]()
        """Batches, and rows that were refused."""
        self._submitted, self._ended = 0, 0

    def some(self) -> Flow[list[CastResult[Any]]]:
        """The results of the next rows, in their order; none at the end."""
        while len(self._under_way) < _BATCHES and (some := list(islice(self._rows, _ROWS))):
            sent = yield from self._send(some)
            refused = [each for each in sent if isinstance(each, CastResult)]
            if self._submitted == 0 and len(refused) == len(sent):
                raise InvalidInput(f"None of the first rows is taken. The first one: {refused[0].error}")
            self._under_way += sent
            self._submitted += len(some)
            self._show(0)
        if not self._under_way:
            return []
        first = self._under_way.popleft()
        results = [first] if isinstance(first, CastResult) else (yield from self._results(first))
        self._ended += len(results)
        return results

    def _send(self, rows: list[JSON]) -> Flow[list[UUID | CastResult[Any]]]:
        """Submit rows as one batch, or as those around the rows that are refused."""
        try:
            batch = yield from batches.submit_many(CAST, [self._shape.input(row) for row in rows], **self._options)
        except (InvalidInput, BodyTooLarge) as error:
            if error.errors and not any("/input" in each.pointer for each in error.errors):
                raise  # it is about the options of all rows
            if len(rows) == 1:
                return [CastResult(None, None, RunError(error.detail, code=error.code))]
            half = len(rows) // 2
            first = yield from self._send(rows[:half])
            return first + (yield from self._send(rows[half:]))
        return [batch.id]

    def _results(self, batch_id: UUID) -> Flow[list[CastResult[Any]]]:
        while True:
            answer = yield Ask("GET", path("batches", batch_id), timeout=60.0, patience=runs.OUTAGE)
            states = read(Batch, answer).states
            self._show(sum(count for state, count in states.items() if state.is_final))
            if all(state.is_final for state in states):
                return [self._result(each) for each in (yield from batches.results(batch_id))]
            yield 0.5

    def _show(self, more: int) -> None:
        if self._progress is not None:
            self._progress(self._ended + more, self._submitted)

    def _result(self, item: BatchResult) -> CastResult[Any]:
        if item.state is State.COMPLETED and item.error is None:
            try:
                return CastResult(item.id, self._shape.value(item.result), None)
            except ValidationError as error:
                return CastResult(item.id, None, RunError(str(error), code="invalid_result"))
        problem = item.error or {}
        detail = problem.get("detail") or f"Run {item.id} is {item.state}."
        return CastResult(item.id, None, RunError(detail, code=problem.get("code", item.state)))
