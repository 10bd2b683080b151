"""Traces, through the real processes to a real OTLP receiver."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backcast.models import CAST
from backcast.testing import Reply, ScriptedModel
from tests.support.otlp import Collector, Span
from tests.support.stack import Stack, free_port, stack
from tests.support.waiting import until

KEY = "sk-very-secret-key"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{CALLER}-01", f"00-{TRACE}-{CALLER}-00"
CHAIRS = {"data": "We put 31 chairs in the hall", "instructions": "how many chairs", "target": "int"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


def traced(collector: Collector, **more: str) -> dict[str, str]:
    ours = {"BACKCAST_TRACING__ENDPOINT": collector.url, "BACKCAST_TRACING__SAMPLE": "0"}
    return {**ours, "OTEL_BSP_SCHEDULE_DELAY": "100", **more}


async def finished(collector: Collector, product: Stack, run_id: str, *names: str) -> dict[str, Span]:
    """The spans of a run by their names, once these have come."""
    await product.ended(run_id)

    async def look() -> dict[str, Span]:
        return {span.name: span for span in collector.spans}

    return await until(look, lambda spans: set(names) <= set(spans))


async def submit(product: Stack, task: str, traceparent: str | None = SAMPLED, **given: Any) -> str:
    headers = {} if traceparent is None else {"traceparent": traceparent}
    answer = await product.http.post(f"/v1/tasks/{task}/runs", json={"input": given}, headers=headers)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def test_one_trace_leads_from_the_caller_to_the_model_and_the_settlement(
    database: str, tmp_path: Path, collector: Collector
) -> None:
    with ScriptedModel() as model:
        env = traced(
            collector,
            BACKCAST_MODEL__BASE_URL=model.url,
            BACKCAST_MODEL__API_KEY=KEY,
            BACKCAST_PREFECT__HISTORY="true",
            BACKCAST_PREFECT__API_URL=f"http://127.0.0.1:{free_port()}/api",  # away: the engine is Prefect's even so
            OTEL_EXPORTER_OTLP_HEADERS="x-token=abc",
        )
        async with stack(database, tmp_path, **env) as product:
            await product.up("api", "worker")
            run = await submit(product, CAST, **CHAIRS)
            route = "POST /v1/tasks/{name}/runs"
            spans = await finished(collector, product, run, route, "queued", "attempt", "store", "settle")

            async def of_prefect() -> list[Span]:  # the executor sends its spans by itself, those below this one first
                return [span for span in collector.spans if "prefect.run.id" in span.attributes]

            [ours] = await until(of_prefect)
            model_spans = [span for span in collector.spans if "gen_ai.request.model" in span.attributes]
            api, worker = (part.text for part in product.parts)
    assert {span.trace for span in collector.spans} == {TRACE}
    request, attempt = spans[route], spans["attempt"]
    assert (request.parent, request.service) == (CALLER, "backcast-api")
    assert request.attributes["http.response.status_code"] == 202
    assert request.attributes["backcast.run"] == run
    for name in ("queued", "attempt"):
        assert (spans[name].parent, spans[name].service) == (request.id, "backcast-worker")
        assert (spans[name].attributes["backcast.run"], spans[name].attributes["backcast.task"]) == (run, CAST)
    assert attempt.attributes["backcast.state"] == "completed"
    for name in ("store", "settle"):
        assert spans[name].parent == attempt.id
    assert (ours.parent, ours.service, ours.scope) == (attempt.id, "backcast-executor", "prefect")
    assert ours.attributes["prefect.run.id"] == run
    by_id = {span.id: span for span in collector.spans}
    assert model_spans
    for span in model_spans:
        above = span
        while above.parent in by_id and above is not ours:
            above = by_id[above.parent]
        assert above is ours, "the model is asked inside of Prefect's run"
    assert spans["queued"].began <= spans["queued"].ended <= attempt.ended
    assert attempt.began <= ours.began <= ours.ended <= spans["store"].began <= spans["settle"].ended <= attempt.ended
    assert collector.headers["x-token"] == "abc"
    assert f" trace={TRACE}" in api
    assert "31 chairs" not in "".join(span.body for span in collector.spans), "no data of the caller"
    assert KEY not in "".join(span.body for span in collector.spans) + api + worker


async def test_log_lines_and_a_failure_of_a_traced_run(database: str, tmp_path: Path, collector: Collector) -> None:
    async with stack(database, tmp_path, **traced(collector)) as product:
        await product.up("api", "worker")
        run = await submit(product, "fail", kind="ValueError")
        await product.ended(run)

        async def look() -> list[Span]:
            return [span for span in collector.spans if span.name == "attempt"]

        attempts = await until(look, lambda found: len(found) == 4)
        worker = product.parts[1].text
    assert [span.attributes["backcast.state"] for span in attempts] == ["scheduled"] * 3 + ["failed"]
    assert [span.attributes["backcast.number"] for span in attempts] == ["1", "2", "3", "4"]
    assert len([span for span in collector.spans if span.name == "queued"]) == 1
    assert any(f"run={run}" in line and f"trace={TRACE}" in line for line in worker.splitlines())


@pytest.mark.parametrize("history", ["true", "false"])
async def test_a_span_has_the_kind_of_an_error_and_not_its_text(
    database: str, tmp_path: Path, collector: Collector, history: str
) -> None:
    with ScriptedModel([Reply(status=401, message=f"your key {KEY} for 'We put 31 chairs' is wrong")]) as model:
        env = traced(
            collector,
            BACKCAST_MODEL__BASE_URL=model.url,
            BACKCAST_MODEL__API_KEY=KEY,
            BACKCAST_PREFECT__HISTORY=history,
            BACKCAST_PREFECT__API_URL=f"http://127.0.0.1:{free_port()}/api",
        )
        async with stack(database, tmp_path, **env) as product:
            await product.up("api", "worker")
            run = await submit(product, CAST, **CHAIRS)
            await finished(collector, product, run, "attempt")

            async def look() -> list[Span]:
                return [span for span in collector.spans if "gen_ai.request.model" in span.attributes]

            await until(look)
    text = "".join(span.body for span in collector.spans)
    assert "exception.type" in text
    assert KEY not in text
    assert "31 chairs" not in text


async def test_who_begins_a_trace(database: str, tmp_path: Path, collector: Collector) -> None:
    async with stack(database, tmp_path, **traced(collector, BACKCAST_TRACING__SAMPLE="1")) as product:
        await product.up("api", "worker")
        unwanted = await submit(product, "echo", NOT_SAMPLED, value=1)
        await product.ended(unwanted)
        wanted = await submit(product, "echo", None, value=2)
        await finished(collector, product, wanted, "POST /v1/tasks/{name}/runs", "attempt", "settle")
        never = product.start("api", BACKCAST_TRACING__SAMPLE="0")
        await never.ready()
        product.http.base_url = never.url
        await product.ended(await submit(product, "echo", None, value=3))
        before = len({span.trace for span in collector.spans if span.attributes.get("backcast.task")})
        assert (await product.http.get("/v1/tasks", headers={"traceparent": SAMPLED})).status_code == 200

        async def look() -> set[str]:
            return {span.trace for span in collector.spans}

        await until(look, lambda traces: TRACE in traces)
    assert before == 1
    runs = {span.attributes["backcast.run"] for span in collector.spans if "backcast.task" in span.attributes}
    assert runs == {wanted}
    assert not [span for span in collector.spans if "readyz" in span.name]


async def test_a_collector_that_is_away_costs_nobody_anything(database: str, tmp_path: Path) -> None:
    env = {"BACKCAST_TRACING__ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    async with stack(database, tmp_path, **env) as product:
        await product.up("api", "worker")
        run = await submit(product, "echo", value=1)
        assert (await product.ended(run))["state"] == "completed"
        for part in product.parts:
            part.process.terminate()
        for part in product.parts:
            await part.ended()
            assert "Traceback" not in part.text


def test_without_a_collector_nothing_of_opentelemetry_is_imported() -> None:
    code = "import sys, backcast.api.main, backcast.worker.main; print('opentelemetry.sdk' in sys.modules)"
    env = {"PATH": os.environ["PATH"]}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert found.stdout == "False\n"
