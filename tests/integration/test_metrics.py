"""The metrics of a real stack in which nearly everything happens once: each of them is there, with its labels, and with
numbers that are true; no port, process or label shows more than it should.
"""

import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import httpx
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from backcast.ledger import figures
from backcast.ledger.connection import Ledger
from backcast.local.postgres import Postgres
from backcast.process.metrics import LEDGER, OTHER, PROCESSES, ApiMetrics, Names
from backcast.testing import Reply, Request, ScriptedModel, extract
from tests.chart.test_alerts import ALERTS
from tests.integration.test_steward import add
from tests.support import databases, generate
from tests.support.dashboards import DASHBOARDS, VARIABLES
from tests.support.prometheus import Prometheus, needs_prometheus
from tests.support.stack import Part, Stack, stack
from tests.support.waiting import PATIENCE, until

UNSEEN = {
    ("worker", "backcast_history_dropped_total"),
    ("steward", "backcast_history_dropped_total"),
    ("steward", "backcast_store_errors_total"),
    ("steward", "backcast_runs_recovered_total"),
}
"""Metrics whose labels have no values in this stack: no history is kept, and no worker is lost."""
DEFINITIONS = {process.process: process().definitions for process in PROCESSES}
SUFFIXES = {"gauge": [""], "counter": [""], "histogram": ["_bucket", "_count", "_sum"]}

REFUSED = "a text that the model's server refuses"

Served = Mapping[str, Sequence[Sample]]
"""Samples by process."""


def parsed(text: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


async def scraped(part: Part) -> list[Sample]:
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        answer = await client.get(part.metrics_url)
    assert answer.status_code == 200, answer.text
    return parsed(answer.text)


def missing(process: str, samples: Sequence[Sample]) -> set[str]:
    """The metrics of a process without the samples that they should have."""
    seen = {(sample.name, frozenset(sample.labels) - {"le"}) for sample in samples}
    return {
        each.name
        for each in DEFINITIONS[process]
        for suffix in SUFFIXES[each.kind]
        if (each.name + suffix, frozenset(each.labels)) not in seen
    }


def value(samples: Sequence[Sample], name: str, **labels: str) -> float | None:
    found = [sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()]
    return sum(found) if found else None


async def _everything(product: Stack) -> Served:
    """Let everything happen once, and return the metrics when they show it."""
    await product.up("api", "worker", "steward")
    api, worker, _ = product.parts
    await product.result(await product.submit("echo", value=1))
    await product.result(await product.submit("flaky_at_once", name="o", fails=2))
    await product.result(await product.submit("flaky", name="d", fails=1))
    await product.ended(await product.submit("fail", kind="usage"))
    product.release("x")
    await product.ended(await product.submit("log_and_die", name="x"))
    await product.result(await product.submit("create_structured_output", data="31 chairs", target="int"))
    await product.ended(await product.submit("create_structured_output", data=REFUSED, target="int"))
    lines = "".join(f'{{"task": "echo", "input": {{"value": {n}}}}}\n' for n in range(3))
    batch = await product.http.post("/v1/batches", content=lines, headers={"Content-Type": "application/jsonl"})
    assert batch.status_code == 202, batch.text
    lane = await product.http.put("/v1/lanes/quota", json={"max_running": 1})
    assert lane.is_success, lane.text
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    for more in ({}, {}, {"deadline": later}):
        given = {"input": {"name": "lane"}, "lane": "quota", **more}
        answer = await product.http.post("/v1/tasks/linger/runs", json=given)
        assert answer.status_code == 202, answer.text
    ledger = Ledger(product.database)
    await ledger.execute("update runs set deadline = now() where deadline is not null")
    await ledger.aclose()
    await product.state(answer.json()["id"], "expired")
    for _ in range(2):  # for one slot
        await product.submit("linger", name="slot")
    async with httpx.AsyncClient(timeout=PATIENCE) as client:

        async def away() -> bool:
            ready = [await client.get(f"{part.url}/readyz") for part in (api, worker)]
            return all(answer.status_code == 503 for answer in ready)

        (product.folder / "store").rename(product.folder / "gone")
        await until(away)
        (product.folder / "gone").rename(product.folder / "store")

    async def look() -> dict[str, list[Sample]]:
        return {part.name: await scraped(part) for part in product.parts}

    def all_there(served: Served) -> bool:
        absent = {(process, name) for process, samples in served.items() for name in missing(process, samples)}
        assert absent <= UNSEEN, absent
        assert_true(served)
        return True

    return await until(look, all_there)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def product(server: Postgres, _template: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    url = databases.create(server, "metrics")

    def script(request: Request) -> Reply:
        return Reply(status=401) if request.text == REFUSED else extract(request)

    with ScriptedModel(script) as model:
        # It stands in for a provider whose prices are known by its address.
        provider = {"BACKCAST_MODEL__BASE_URL": "http://ours.openai.azure.com/v1", "BACKCAST_MODEL__API_KEY": "any"}
        provider |= {"BACKCAST_MODEL__NAME": "gpt-4o-mini", "HTTP_PROXY": model.url, "NO_PROXY": "127.0.0.1"}
        # No heartbeat and no answer of a slow machine is late.
        provider |= {"BACKCAST_LEASE": "PT10M", "BACKCAST_WORKER__STALL": "PT10M", "BACKCAST_WORKER__SLOTS": "2"}
        async with stack(url, tmp_path_factory.mktemp("metrics"), **provider) as running:
            yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(product: Stack) -> Served:
    """The metrics, once they show everything; the tests look at what was shown then."""
    return await _everything(product)


def test_every_metric_is_served_with_its_labels_and_no_other(served: Served) -> None:
    """That each is there is what the stack was up for."""
    for process, samples in served.items():
        defined = {each.name + suffix for each in DEFINITIONS[process] for suffix in SUFFIXES[each.kind]}
        assert {sample.name for sample in samples if sample.name.startswith("backcast_")} <= defined
        labels = {
            each.name + suffix: set(each.labels) for each in DEFINITIONS[process] for suffix in SUFFIXES[each.kind]
        }
        for sample in samples:
            assert set(sample.labels) - {"le"} == labels.get(sample.name, set(sample.labels) - {"le"})


def assert_true(served: Served) -> None:
    """That the numbers are those of what has happened."""
    api, worker, steward = (served[name] for name in ("api", "worker", "steward"))
    submitted = {"method": "POST", "route": "/v1/tasks/{name}/runs"}
    assert value(api, "backcast_api_requests_total", **submitted, status="202") == 12
    assert value(api, "backcast_api_request_seconds_count", **submitted) == 12
    assert value(api, "backcast_runs_submitted_total") == 12 + 3, "with a batch of three"
    assert value(api, "backcast_submit_seconds_count") == 12
    outcomes = {
        ("echo", "succeeded"): 4,
        ("flaky_at_once", "succeeded"): 1,
        ("flaky", "retrying"): 1,
        ("flaky", "succeeded"): 1,
        ("fail", "failed"): 1,
        ("create_structured_output", "succeeded"): 1,
        ("create_structured_output", "failed"): 1,
    }
    for (task, outcome), count in outcomes.items():
        assert value(worker, "backcast_attempts_total", task=task, outcome=outcome) == count, task
    assert value(worker, "backcast_retries_total", kind="at_once") == 2
    assert value(worker, "backcast_retries_total", kind="delayed") == 1
    assert value(worker, "backcast_wait_seconds_count", task="flaky") == 1, "its first claim alone"
    assert value(worker, "backcast_run_seconds_count", task="flaky") == 2, "both of its attempts"
    assert (value(worker, "backcast_executors_ended_total", cause="died") or 0) > 0
    assert (value(worker, "backcast_retries_total", kind="executor") or 0) > 0
    assert value(worker, "backcast_model_seconds_count") == 1
    assert (value(worker, "backcast_model_tokens_total", kind="input") or 0) > 0
    assert (value(worker, "backcast_model_cost_dollars_total", model="gpt-4o-mini") or 0) > 0
    refused = {"model": "gpt-4o-mini", "cause": "model_refused_key"}
    assert value(worker, "backcast_model_failures_total", **refused) == 1
    expired = [value(served[name], "backcast_runs_expired_total") for name in ("worker", "steward")]
    assert sum(count or 0 for count in expired) == 1
    for process in (api, worker):
        assert (value(process, "backcast_store_errors_total", operation="check") or 0) > 0
    assert value(steward, "backcast_steward_leading") == 1
    assert value(steward, "backcast_task_runs", task="linger", state="running") == 2
    assert value(steward, "backcast_task_runs", task="linger", state="ready") == 1
    assert value(steward, "backcast_backlog_ready", pool="default") == 1
    assert value(steward, "backcast_task_runs", task="linger", state="held") == 1
    assert value(steward, "backcast_task_workers", task="linger") == 1
    assert value(steward, "backcast_lane_runs", lane="quota", state="promoted") == 1
    assert value(steward, "backcast_lane_max_running", lane="quota") == 1
    assert value(steward, "backcast_pool_slots", pool="default") == value(worker, "backcast_worker_slots") == 2
    assert (value(steward, "backcast_database_size_bytes") or 0) > 1e6


def test_the_numbers_are_true(served: Served) -> None:
    assert_true(served)


# Who reads them

QUERIES = [
    *(
        (f"{name}: {panel.title}", query)
        for name, (_, panels, _) in DASHBOARDS.items()
        for panel in panels
        for query in panel.queries.values()
    ),
    *(("variable", query) for query in VARIABLES.values()),
    *((name, rule["expr"]) for name, rule in ALERTS.items()),
]
OF_TARGETS = {"namespace", "pod", "le"}
"""Labels that Prometheus adds, and that of buckets."""


def used(query: str) -> dict[str, set[str]]:
    """The metrics of a query, with the labels that it selects by."""
    found = dict[str, set[str]]()
    for name, selector in re.findall(r"(backcast_\w+)(\{[^}]*\})?", query):
        found.setdefault(name, set()).update(re.findall(r"(\w+)=", selector))
    return found


@pytest.mark.parametrize(("reader", "query"), QUERIES)
def test_every_query_finds_what_it_asks_for(reader: str, query: str, served: Served) -> None:
    there = dict[str, set[str]]()
    for sample in itertools.chain(*served.values()):
        there.setdefault(sample.name, set()).update(sample.labels)
    for process, unseen in UNSEEN:
        [definition] = [each for each in DEFINITIONS[process] if each.name == unseen]
        there.setdefault(unseen, set()).update(definition.labels)
    for name, labels in used(query).items():
        assert name in there, f"{reader} reads {name}, which no process serves"
        assert labels <= there[name] | OF_TARGETS, f"{reader} selects by labels that {name} lacks"
    groups = {label for labels in re.findall(r"(?:by|on) \(([^)]*)\)", query) for label in labels.split(", ")}
    assert groups <= set().union(OF_TARGETS, *(there[name] for name in used(query))), reader


NO_DATA = {"Workers lost, runs recovered: runs {{state}}", "History waiting and dropped: dropped {{why}}"}
"""Queries by a label that has no value in this stack: see UNSEEN."""


@needs_prometheus
@pytest.mark.asyncio(loop_scope="module")
async def test_prometheus_answers_every_query_with_numbers(product: Stack, served: Served) -> None:
    """Everything happens again while a real Prometheus looks, as rates are of what it has seen."""
    chosen = {"namespace": "team", "task": "flaky"}
    queries = {
        f"{panel.title}: {legend}": query
        for _, panels, _ in DASHBOARDS.values()
        for panel in panels
        for legend, query in panel.queries.items()
    }
    async with await Prometheus.start(product, "team") as prometheus:
        await product.submit("flaky", name="waits", fails=0)
        for waiting in ("Oldest held run, by lane: {{lane}}", "Oldest run that waits: age"):
            await until(lambda query=queries[waiting]: prometheus.numbers(query, **chosen))
        product.release("slot")  # the lane's run keeps the other slot
        names = map(str, itertools.count())

        async def without_numbers() -> set[str]:
            await product.result(await product.submit("flaky", name=next(names), fails=1))
            await product.ended(await product.submit("flaky", name=next(names), fails=9))
            await product.result(await product.submit("flaky_at_once", name=next(names), fails=1))
            data = f"{next(names)} chairs"  # another one each time: casts are cached
            await product.result(await product.submit("create_structured_output", data=data, target="int"))
            return {name for name, query in queries.items() if not await prometheus.numbers(query, **chosen)}

        await until(without_numbers, lambda names: names == NO_DATA)
        for name, query in VARIABLES.items():
            assert chosen[name] in await prometheus.label_values(query, **chosen)
        rules = await until(prometheus.rules, lambda rules: all(rule["health"] != "unknown" for rule in rules))
        assert {rule["name"]: rule["health"] for rule in rules} == dict.fromkeys(ALERTS, "ok"), rules


def test_some_dashboard_or_alert_reads_every_metric() -> None:
    read = {name for _, query in QUERIES for name in used(query)}
    for each in itertools.chain(*DEFINITIONS.values()):
        assert {each.name + suffix for suffix in SUFFIXES[each.kind]} & read or each.name in UNREAD, each.name


UNREAD = {
    "backcast_history_spooled_bytes",  # a part of what waits
    "backcast_history_waiting_bytes",
    "backcast_backlog_running",  # the same as busy slots, and what is prefetched
    "backcast_runs_parked",  # by task: backcast_task_runs
    "backcast_lane_max_running",
    "backcast_worker_busy",  # by pool: backcast_pool_busy
    "backcast_worker_slots",
    "backcast_worker_slots_lost",
    "backcast_events_dropped_total",
}


def test_the_page_about_them_is_current() -> None:
    assert (generate.DOCS / "metrics.md").read_text() == generate.metrics(), "run `make gen`"


async def test_the_public_port_of_the_api_serves_no_metrics(database: str, tmp_path: Path) -> None:
    async with stack(database, tmp_path) as product:
        await product.up("api")
        assert (await product.http.get("/metrics")).status_code == 404
        assert await scraped(product.parts[0])
        other = product.start(
            "api", BACKCAST_API__METRICS_PORT=product.parts[0].metrics_url.split(":")[2].split("/")[0]
        )
        assert await other.ended() != 0
        assert "BACKCAST_API__METRICS_PORT" in other.text


def test_labels_have_few_values() -> None:
    names = Names(2)
    assert [names[name] for name in ("a", "b", "c", "a", "\ud800")] == ["a", "b", OTHER, "a", OTHER]
    assert len(Names()["\ud800" + "x" * 1000]) == 100
    api = ApiMetrics()
    for method, route in itertools.product(("GET", "BREW", "PROPFIND"), ("/v1/runs",)):
        api.answered(method, route, 200, 0.1)
    assert api.registry.get_sample_value(
        "backcast_api_requests_total", {"method": OTHER, "route": "/v1/runs", "status": "200"}
    )
    labels = {label for definitions in DEFINITIONS.values() for each in definitions for label in each.labels}
    assert labels <= {
        *("process", "version", "python", "operation", "method", "route", "status", "why", "task", "outcome"),
        *("kind", "cause", "model", "state", "pool", "lane"),
    }


async def test_tasks_beyond_the_first_share_a_label(ledger: Ledger) -> None:
    for n in range(150):
        await ledger.execute(
            """insert into task_types (name, pool, version, description, input_schema, output_schema, retries,
                                       max_attempts) values ($1, 'p', '', '', '{}', '{}', 0, 3)""",
            f"task-{n:03}",
        )
        await ledger.execute(
            "insert into runs (id, task, pool, owner, state, max_attempts, input, metadata)"
            " values (gen_random_uuid(), $1, 'p', 'me', 'queued', 3, '{}', '{}')",
            f"task-{n:03}",
        )
    found = await figures.tasks(ledger)
    assert found["task_runs"]["task-099", "ready"] == 1
    assert found["task_runs"][OTHER, "ready"] == 50
    assert len(found["task_oldest_age_seconds"]) == 101


@pytest.mark.parametrize("figure", [figures.tasks, figures.pools, figures.lanes, figures.database])
async def test_figures_read_no_run_that_has_ended(
    ledger: Ledger, figure: Callable[[Ledger], Awaitable[Mapping[str, figures.Values]]]
) -> None:
    """Nor does a row that only SQL can write keep them from being shown."""
    await add(ledger, "queued", ago=60)
    await ledger.execute("update runs set run_at = '-infinity'")
    await add(ledger, "held", ago=60, lane="l")
    await ledger.execute("update runs set run_at = 'infinity' where state = 'held'")
    await ledger.execute("insert into lanes (name, max_running, promoted) values ('l', 1, -5)")
    admin = await asyncpg.connect(ledger._url)
    for table in ("ended_completed", "ended_otherwise", "ended_late"):
        await admin.execute(f"alter table backcast.{table} rename to gone_{table}")
    if figure is figures.database:  # it counts the partitions of the tables
        for table in ("ended_completed", "ended_otherwise"):
            await admin.execute(f"alter table backcast.gone_{table} rename to {table}")
    await admin.close()
    values = await figure(ledger)
    assert values.keys() <= LEDGER.keys()
    assert all(number >= 0 for each in values.values() for number in each.values())
