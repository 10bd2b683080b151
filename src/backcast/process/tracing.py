"""Sends spans to an OpenTelemetry collector, if one is set: one trace from a request to the end of its run.

Decides which spans are sent. Without a collector nothing of OpenTelemetry is imported, and nothing is recorded.
"""

import contextlib
import importlib.metadata
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from backcast.settings import Tracing

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

FLUSH = 2.0
"""Seconds that the last spans of a process have to leave."""
_provider: "TracerProvider | None" = None
_tracer: "Tracer | None" = None


def start(settings: Tracing, part: str, *, through: "Callable[[SpanExporter], SpanExporter] | None" = None) -> None:
    """Send the spans of this process as the service `backcast-<part>`, if a collector is set, through what `through`
    makes of its exporter.

    Only the API begins traces: all others go on with the trace of a run that has one.
    """
    global _provider, _tracer  # a process has one, as OpenTelemetry has it
    if settings.endpoint is None:
        return
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, TraceIdRatioBased

    version = importlib.metadata.version("backcast")
    exporter: SpanExporter = OTLPSpanExporter(f"{settings.endpoint.rstrip('/')}/v1/traces")
    _provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.sample) if part == "api" else ALWAYS_OFF),
        resource=Resource.create({"service.name": f"backcast-{part}", "service.version": version}),
        shutdown_on_exit=False,  # it would wait for a collector that is away
    )
    _provider.add_span_processor(BatchSpanProcessor(through(exporter) if through else exporter))
    trace.set_tracer_provider(_provider)
    _tracer = trace.get_tracer("backcast", version)


def is_on() -> bool:
    return _tracer is not None


def flush() -> None:
    """Send what is left. It blocks for `FLUSH` seconds at most, which the provider's own way out does not promise."""
    if _provider is not None:
        flushing = threading.Thread(target=_provider.force_flush, daemon=True)
        flushing.start()
        flushing.join(FLUSH)


def parent() -> str | None:
    """The `traceparent` of the current span; none if it is not sent."""
    if _tracer is None:
        return None
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = dict[str, str]()
    if trace.get_current_span().get_span_context().trace_flags.sampled:
        TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


def trace_id() -> str | None:
    """Of the current span, as log lines have it; none if it is not sent."""
    return None if (current := parent()) is None else current.split("-")[1]


@contextlib.contextmanager
def request(headers: Mapping[str, str]) -> "Iterator[Span]":
    """The span of a request, which goes on with its caller's trace if there is one."""
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    assert _tracer is not None
    context = TraceContextTextMapPropagator().extract(headers)
    with _tracer.start_as_current_span("request", context, SpanKind.SERVER, record_exception=False) as span:
        yield span


_NOTHING = contextlib.nullcontext()


def span(name: str, /, **attributes: Any) -> contextlib.AbstractContextManager[object]:
    """A part of the current span, if that is sent."""
    if _tracer is None or parent() is None:
        return _NOTHING
    return _tracer.start_as_current_span(name, attributes=_named(attributes), record_exception=False)


def go_on(traceparent: str) -> None:
    """The spans of this asyncio task, from here on, are parts of that one."""
    if _tracer is not None:
        from opentelemetry import context

        context.attach(_context(traceparent))


class Attempt:
    """The spans of an attempt of a traced run: the wait in the queue, if `waited` gives its seconds, and the attempt
    itself, which becomes the current span of the task that makes one of these."""

    def __init__(self, traceparent: str, *, waited: float | None, **attributes: Any) -> None:
        from opentelemetry import context, trace

        assert _tracer is not None
        caller, named = _context(traceparent), _named(attributes)
        if waited is not None:
            began = time.time_ns() - int(waited * 1e9)
            _tracer.start_span("queued", caller, attributes=named, start_time=began).end()
        self._span = _tracer.start_span("attempt", caller, attributes=named)
        self._inside = trace.set_span_in_context(self._span)
        context.attach(self._inside)
        self._settling: Span | None = None

    def settle(self) -> None:
        """It waits for its settlement to be recorded."""
        assert _tracer is not None
        self._settling = _tracer.start_span("settle", self._inside)

    def end(self, state: str) -> None:
        """`state`: what the attempt leaves its run in."""
        if self._settling is not None:
            self._settling.end()
        self._span.set_attribute("backcast.state", state)
        self._span.end()


def attempt(traceparent: str, **about: Any) -> Attempt | None:
    return None if _tracer is None else Attempt(traceparent, **about)


def _context(traceparent: str) -> "Context":
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"backcast.{name}": str(value) for name, value in attributes.items()}
