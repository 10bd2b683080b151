"""Every metric of every process, by its name: one class a process, each with a registry of its own.

Labels have few values. Names that callers or tasks choose are bounded by `Names`; no owner, no id and no text of an
error is a label.
"""

import bisect
import itertools
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from backcast.texts import storable

NAMES = 100
"""Names of one kind that have labels of their own in one process."""
OTHER = "other"
_LONGEST = 100
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_STATEMENT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LANE = ("lane", "state")
_WORK = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)

HISTORY = {
    "waiting": "Events not yet published to Prefect, the spooled ones included",
    "waiting_bytes": "Bytes of events and log lines in memory",
    "spooled_bytes": "Bytes of events on the disk",
    "lag_seconds": "Time since all events were published, while some wait; of several executors, the longest",
}
"""The figures of a history sink, with their descriptions."""

LEDGER: Mapping[str, tuple[str, *tuple[str, ...]]] = {
    "backlog_ready": ("Runs that a worker could start now, as the autoscaler sees them", "pool"),
    "backlog_running": ("Runs that are running", "pool"),
    "backlog_oldest_age_seconds": ("Age of the oldest ready run", "pool"),
    "pool_workers": ("Workers that are alive and take runs", "pool"),
    "pool_slots": ("Slots of these workers", "pool"),
    "pool_busy": ("Slots of these workers in which code executes", "pool"),
    "runs_parked": ("Runs that wait for a worker that can do them", "pool"),
    "task_runs": ("Runs that are not over, of the first 10,000 in each state: the oldest ones", "task", "state"),
    "task_oldest_age_seconds": ("Age of the oldest of these runs that is ready or parked", "task"),
    "task_workers": ("Workers that are alive, take runs, and serve the task", "task"),
    "lane_runs": ("Runs of the first 50 limited lanes: promoted (queued or running), or held, up to 10,000", *_LANE),
    "lane_oldest_age_seconds": ("Age of the oldest held run, of those that are counted", "lane"),
    "lane_max_running": ("Runs of the lane that may run at the same time", "lane"),
    "database_size_bytes": ("Size of the ledger's database, looked at once a minute",),
    "database_dead_rows": ("Rows of live runs that wait for a vacuum",),
    "database_partitions": ("Partitions of ended runs",),
    "database_oldest_xmin_age_transactions": (
        "Transactions since the oldest snapshot still held; vacuum removes nothing newer",
    ),
}
"""The figures of the whole ledger, with their labels. The leading steward shows them, and no other process."""


class Definition(NamedTuple):
    name: str
    kind: str
    labels: Sequence[str]
    text: str


class Names(dict[str, str]):
    """Labels by name: the first so many have their own, all further ones share `other`."""

    def __init__(self, most: int = NAMES) -> None:
        super().__init__()
        self._most = most

    def __missing__(self, name: str) -> str:
        if len(self) >= self._most:
            return OTHER
        label = self[name] = storable(name[:_LONGEST])
        return label


class Seconds(Collector):
    """A histogram of times. Only the thread of the event loop observes: without a lock, and with its buckets added up
    when they are shown, it takes a fifth of the library's time, which several of them take for every run."""

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = (*bounds, math.inf)
        self._counts = dict[tuple[str, ...], list[int]]()
        self._sums = dict[tuple[str, ...], float]()
        if not labels:  # it is shown before the first
            self._add(())

    def _add(self, of: tuple[str, ...]) -> list[int]:
        self._counts[of], self._sums[of] = [0] * len(self._bounds), 0.0
        return self._counts[of]

    def observe(self, seconds: float, *of: str) -> None:
        """Count one; `of` has the values of its labels."""
        counts = self._counts.get(of) or self._add(of)
        counts[bisect.bisect_left(self._bounds, seconds)] += 1
        self._sums[of] += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        bounds = [floatToGoString(bound) for bound in self._bounds]
        for of, counts in list(self._counts.items()):
            family.add_metric(of, list(zip(bounds, itertools.accumulate(counts), strict=True)), self._sums[of])
        yield family


class Metrics:
    """What every process has."""

    process = ""

    def __init__(self) -> None:
        disable_created_metrics()  # each would be a second series
        self.registry = CollectorRegistry()
        self.definitions = list[Definition]()
        ProcessCollector(registry=self.registry)
        build = self._gauge("build_info", "1, for the build that runs", "process", "version", "python")
        build.labels(self.process, version("backcast"), platform.python_version()).set(1)
        self._store_seconds = self._seconds("store_seconds", "Time of a call to the store", "operation")
        self._store_errors = self._counter("store_errors", "Calls in which the store was away", "operation")

    def stored(self, operation: str, seconds: float, is_away: bool) -> None:
        """Count a call to the store."""
        self._store_seconds.observe(seconds, operation)
        if is_away:
            self._store_errors.labels(operation).inc()

    def _defined(self, name: str, kind: str, text: str, labels: Sequence[str]) -> str:
        self.definitions.append(Definition(f"backcast_{name}", kind, labels, text))
        return self.definitions[-1].name

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(self._defined(name, "gauge", text, labels), text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        name = self._defined(f"{name}_total", "counter", text, labels)
        return Counter(name, text, labels, registry=self.registry)

    def _seconds(self, name: str, text: str, *labels: str, buckets: Sequence[float] = _STATEMENT) -> Seconds:
        seconds = Seconds(self._defined(name, "histogram", text, labels), text, labels, buckets)
        self.registry.register(seconds)
        return seconds


class ApiMetrics(Metrics):
    process = "api"

    def __init__(self) -> None:
        super().__init__()
        self._requests = self._counter(
            "api_requests", "Requests answered, by the template of their route", "method", "route", "status"
        )
        self._request_seconds = self._seconds(
            "api_request_seconds",
            "Time from a request to the end of its answer; it includes the wait that `Prefer: wait` asks for",
            *("method", "route"),
        )
        self._answers = dict[tuple[str, str, int], Counter]()
        self._submit_seconds = self._seconds(
            "submit_seconds", "Time of a statement that records single submissions, up to 500 at once, and its commit"
        )
        self._submitted = self._counter("runs_submitted", "Runs accepted, those of batches included")
        self._waits = self._gauge("api_waits", "Requests that wait for the end of a run")
        self._streams = self._gauge("api_streams", "Streams of events that are open")

    def show(self, *, waits: Callable[[], float], streams: Callable[[], float]) -> None:
        self._waits.set_function(waits)
        self._streams.set_function(streams)

    def submitted(self, runs: int) -> None:
        self._submitted.inc(runs)

    def submitted_at_once(self, seconds: float, runs: int) -> None:
        """Count a statement for single submissions, and the runs that it has made."""
        self._submit_seconds.observe(seconds)
        self._submitted.inc(runs)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request; status 0: its caller went away first."""
        method = method if method in _METHODS else OTHER
        if (known := self._answers.get((method, route, status))) is None:  # to find them costs more than to count
            known = self._answers[method, route, status] = self._requests.labels(method, route, status)
        known.inc()
        self._request_seconds.observe(seconds, method, route)


class _WithHistory(Metrics):
    """A process with one or more history sinks."""

    def __init__(self) -> None:
        super().__init__()
        self._history = {name: self._gauge(f"history_{name}", text) for name, text in HISTORY.items()}
        self._dropped = self._counter(
            "history_dropped",
            "Events and log lines that Prefect never gets, as it refuses them or there is no room",
            "why",
        )
        self.expired = self._counter("runs_expired", "Runs that were past their deadline when this process looked")

    def show_history(self, figures: Callable[[], Sequence[Mapping[str, float]]]) -> None:
        """Show the figures of these sinks, in sum."""

        def value(name: str) -> float:
            values = [each.get(name, 0.0) for each in figures()]
            return max(values, default=0.0) if name == "lag_seconds" else sum(values)

        for name, gauge in self._history.items():
            gauge.set_function(lambda name=name: value(name))

    def history_dropped(self, why: str, count: float) -> None:
        self._dropped.labels(why).inc(count)


class WorkerMetrics(_WithHistory):
    process = "worker"

    def __init__(self) -> None:
        super().__init__()
        self._names, self._models, self._causes = Names(), Names(20), Names(40)
        self.slots = self._gauge("worker_slots", "Runs that may execute at the same time")
        self.busy = self._gauge("worker_busy", "Runs that execute now")
        self.slots_lost = self._gauge("worker_slots_lost", "Slots that code of runs takes which are over")
        self.unsettled = self._gauge("worker_unsettled", "Runs claimed and not yet settled")
        self.heartbeat_age = self._gauge("worker_heartbeat_age_seconds", "Time since the last heartbeat")
        self.claim_seconds = self._seconds("claim_seconds", "Time of a claim, a statement that takes many runs")
        self.claimed = self._counter("runs_claimed", "Runs claimed")
        self.settle_seconds = self._seconds("settle_seconds", "Time of a statement that settles up to 200 runs")
        self._wait = self._seconds(
            "wait_seconds",
            "Time from the moment at which a run could have started to its first claim",
            "task",
            buckets=_WORK,
        )
        self._run = self._seconds(
            "run_seconds", "Time that an attempt held a slot, retries at once included", "task", buckets=_WORK
        )
        self._attempts = self._counter(
            "attempts",
            "Claims that were settled: succeeded, failed, timed_out, retrying, postponed (it could not begin),"
            " released, cancelled or lost (another worker has the run)",
            *("task", "outcome"),
        )
        self._retries = self._counter(
            "retries",
            "Further attempts, by their reason: at_once and delayed are those of the task; executor: its process has"
            " ended; outage: something was away; same_value: another run computes it; no_worker: this one lacks the"
            " task",
            "kind",
        )
        self.executors_ended = self._counter(
            "executors_ended",
            "Executors that have ended unasked: stall (the loop gave no answer), memory, died; and replaced ones",
            "cause",
        )
        self._model_seconds = self._seconds("model_seconds", "Time of one answer of the model", "model", buckets=_WORK)
        self._tokens = self._counter("model_tokens", "Tokens paid for, as the provider counts them", "model", "kind")
        self._cost = self._counter(
            "model_cost_dollars",
            "Cost of these tokens in US dollars, by the list prices in genai-prices: nothing for a provider that its"
            " list does not know by the address, or a model without a price",
            "model",
        )
        self._failures = self._counter(
            "model_failures", "Casts that failed, by the code of their error", "model", "cause"
        )
        self.events_dropped = self._counter("events_dropped", "Events of runs that were dropped")

    def waited(self, task: str, seconds: float) -> None:
        self._wait.observe(seconds, self._names[task])

    def executed(self, task: str, seconds: float) -> None:
        self._run.observe(seconds, self._names[task])

    def settled(self, attempts: Mapping[tuple[str, str], int], retries: Mapping[str, int]) -> None:
        """Count settled claims by task and outcome, and retries by kind."""
        for (task, outcome), count in attempts.items():
            self._attempts.labels(self._names[task], outcome).inc(count)
        for kind, count in retries.items():
            self._retries.labels(kind).inc(count)

    def asked(
        self,
        usage: Mapping[str, object],
        seconds: Sequence[float],
        dollars: float,
        failures: Sequence[tuple[str, str]],
    ) -> None:
        """Count the answers of a model to one attempt, its usage (the name of the model, and tokens), their cost, and
        the casts that failed, by model and code. Codes are those of `llm`, and bounded all the same."""
        for model, code in failures:
            self._failures.labels(self._models[model], self._causes[code]).inc()
        if not usage:
            return
        name = self._models[str(usage.get("model"))]
        for each in seconds:
            self._model_seconds.observe(each, name)
        for kind in ("input", "output"):
            if isinstance(count := usage.get(f"{kind}_tokens"), int) and count > 0:
                self._tokens.labels(name, kind).inc(count)
        if dollars:
            self._cost.labels(name).inc(dollars)


class StewardMetrics(_WithHistory):
    process = "steward"

    def __init__(self) -> None:
        super().__init__()
        self.leading = self._gauge("steward_leading", "1 for the leader, 0 for those that stand by")
        self.beat_seconds = self._seconds(
            "steward_beat_seconds", "Time of the leader's heartbeat, a small write and its commit"
        )
        self.recovered = self._counter("runs_recovered", "Runs of dead workers, by the state after it", "state")
        self.workers_lost = self._counter("workers_lost", "Workers that were found dead while they held runs")
        for name, (text, *labels) in LEDGER.items():
            self._defined(name, "gauge", text, labels)
        self.ledger = LedgerFigures()
        self.registry.register(self.ledger)


class LedgerFigures(Collector):
    """Shows the figures of the whole ledger as they were measured last; none while this steward stands by, so that
    nothing is counted twice in a sum."""

    def __init__(self) -> None:
        self._values = dict[str, Mapping[tuple[str, ...], float]]()

    def show(self, **values: Mapping[tuple[str, ...], float]) -> None:
        """Replace all values of these metrics, by their labels."""
        self._values |= values

    def clear(self) -> None:
        self._values.clear()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, (text, *labels) in LEDGER.items():
            family = GaugeMetricFamily(f"backcast_{name}", text, labels=labels)
            for of, value in self._values.get(name, {}).items():
                family.add_metric(of, value)
            yield family


PROCESSES = (ApiMetrics, WorkerMetrics, StewardMetrics)
