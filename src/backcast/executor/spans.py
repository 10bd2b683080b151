"""Takes out of the spans of an executor what must not leave it: secrets, as `redaction` does everywhere else, and the
texts of errors, which may quote the caller's data. The run has these.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import Status

from backcast.executor.redaction import redacted

_QUOTES = ("exception.message", "exception.stacktrace", "prefect.state.message")


class Redacting(SpanExporter):
    """Exports clean copies."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self._exporter.export([_clean(span) for span in spans])

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _clean(span: ReadableSpan) -> ReadableSpan:
    return ReadableSpan(
        name=redacted(span.name),
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=_texts(span.attributes),
        events=[Event(redacted(event.name), _texts(event.attributes), event.timestamp) for event in span.events],
        links=span.links,
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _texts(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: _text(value) for name, value in (attributes or {}).items() if name not in _QUOTES}


def _text(value: Any) -> Any:
    if isinstance(value, str):
        return redacted(value)
    return tuple(map(_text, value)) if isinstance(value, (list, tuple)) else value
