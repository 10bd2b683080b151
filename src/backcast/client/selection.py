"""Exchanges about the runs that match filters: list, repeat or cancel them. Decides how filters are written."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypedDict, Unpack
from uuid import UUID

from pydantic import BaseModel

from backcast.client import wire
from backcast.client.wire import Ask, Flow, path, read
from backcast.errors import refuse_unknown
from backcast.models import JSON, CancelMany, Matched, Operation, RetryMany, Run, Selection, State

_PAGE = 100


class Filters(TypedDict, total=False):
    """The runs that match all of these; one that is None is not set. `error` is a code, `text` a part of the error's
    detail; a time without an offset is this machine's. A cancel takes no `ended_…`: its runs have not ended."""

    state: State | str | None
    task: str | None
    owner: str | None
    batch: UUID | str | None
    lane: str | None
    worker: UUID | str | None
    error: str | None
    text: str | None
    created_after: datetime | None
    created_before: datetime | None
    ended_after: datetime | None
    ended_before: datetime | None
    metadata: Mapping[str, str]


def retry_many(*, key: str | None = None, **chosen: Unpack[Filters]) -> Flow[Operation]:
    """Repeat all ended runs that match, the failed and expired ones unless `state` is given. The service works through
    them; `operation` shows how far it has come."""
    return (yield from _begin("retry", _written("retry_many", RetryMany, chosen, "key"), key))


def cancel_many(*, key: str | None = None, **chosen: Unpack[Filters]) -> Flow[Operation]:
    """Cancel all runs that match and have not ended."""
    return (yield from _begin("cancel", _written("cancel_many", CancelMany, chosen, "key"), key))


def count_to_retry(**chosen: Unpack[Filters]) -> Flow[Matched]:
    """How many runs `retry_many` would repeat."""
    return (yield from _count("retry", _written("count_to_retry", RetryMany, chosen)))


def count_to_cancel(**chosen: Unpack[Filters]) -> Flow[Matched]:
    """How many runs `cancel_many` would cancel."""
    return (yield from _count("cancel", _written("count_to_cancel", CancelMany, chosen)))


def operation(operation_id: UUID | str) -> Flow[Operation]:
    """How far an operation has come."""
    return read(Operation, (yield from wire.get(path("operations", operation_id))))


def stop_operation(operation_id: UUID | str) -> Flow[Operation]:
    """Let it go no further; what it has done stays done."""
    return read(Operation, (yield from wire.post(path("operations", operation_id, "/cancel"))))


def _begin(kind: str, chosen: dict[str, JSON], key: str | None) -> Flow[Operation]:
    return read(Operation, (yield wire.once(f"/v1/runs/{kind}", wire.encoded(chosen), key)))


def _count(kind: str, chosen: dict[str, JSON]) -> Flow[Matched]:
    return read(Matched, (yield from wire.post(f"/v1/runs/{kind}", wire.encoded(chosen | {"dry_run": True}))))


def _written(call: str, model: type[BaseModel], filters: Filters, *others: str) -> dict[str, JSON]:
    """The filters as JSON values, checked. Raises TypeError, `InvalidInput`."""
    refuse_unknown(call, filters, (*others, *(name for name in model.model_fields if name != "dry_run")))
    given: dict[str, Any] = {name: value for name, value in filters.items() if value is not None}
    local = {name: value.astimezone() for name, value in given.items() if isinstance(value, datetime)}
    return wire.checked(model, given | local)


# Pages of a list


class PageRequest(NamedTuple):
    params: Mapping[str, str]
    left: int | None
    """Runs still wanted; None is all of them."""


class RunPage(BaseModel):
    """Runs, the newest first. A page that is not the last may be short or empty."""

    items: list[Run]
    next_cursor: str | None = None


def page(*, limit: int = 50, cursor: UUID | str | None = None, **filters: Unpack[Filters]) -> Flow[RunPage]:
    """One page of `list`; `next_cursor` leads to the next one."""
    params = _query("page", filters, "limit", "cursor") | {"limit": str(limit)}
    params |= {} if cursor is None else {"cursor": str(cursor)}
    return read(RunPage, (yield Ask("GET", "/v1/runs", params)))


def first_page(filters: Filters, limit: int | None) -> PageRequest | None:
    return _next_page(_query("list", filters, "limit"), limit)


def _query(call: str, filters: Filters, *others: str) -> dict[str, str]:
    given = _written(call, Selection, filters, *others)
    labels = given.pop("metadata", {})
    return given | {f"metadata.{name}": value for name, value in labels.items()}


def _next_page(params: Mapping[str, str], left: int | None) -> PageRequest | None:
    if left is not None and left <= 0:
        return None
    return PageRequest({**params, "limit": str(_PAGE if left is None else min(left, _PAGE))}, left)


def next_page(page: PageRequest) -> Flow[tuple[Sequence[Run], PageRequest | None]]:
    got = read(RunPage, (yield Ask("GET", "/v1/runs", page.params)))
    if got.next_cursor is None:
        return got.items, None
    left = None if page.left is None else page.left - len(got.items)
    return got.items, _next_page({**page.params, "cursor": got.next_cursor}, left)
