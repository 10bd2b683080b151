"""The page that shows at a glance whether work flows, what is stuck, and where to mend it."""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from backcast.console.pages import ago, limits, number, query, render, service, span
from backcast.models import Flow, Lane, Pause, PauseKind, Pool, State, TaskCounts, Within, Worker

_SILENT = 30.0
"""Seconds without a heartbeat after which a worker is worth a look."""


_STUCK = 60.0
"""Seconds for which a lane may hold all of its runs: at the least rate that people use, one starts in this time."""
_PARKED = "BACKCAST_UNKNOWN_AFTER"
"""Only the errors of parked runs name this setting."""
_FEW = 3
"""Failed runs of a task of which nothing follows."""


class Sign(NamedTuple):
    """Something that needs a look, and the page where it is mended."""

    sentence: str
    link: str
    action: str


def signs(
    pools: Sequence[Pool],
    lanes: Sequence[Lane],
    workers: Sequence[Worker],
    pauses: Sequence[Pause],
    tasks: Sequence[TaskCounts],
) -> list[Sign]:
    found, deserted = list[Sign](), set[str]()
    for pool in pools:
        waiting = pool.ready + pool.parked
        if waiting and not pool.workers:
            deserted.add(pool.name)
            sentence = f"Pool {pool.name} has no live worker: {_runs(waiting)} for one."
            found.append(Sign(sentence, "/pools", "Workers"))
        elif pool.parked:
            sentence = f"No worker of pool {pool.name} has the task, or its version, for which {_runs(pool.parked)}."
            found.append(Sign(sentence, f"/runs{query(state=State.QUEUED, text=_PARKED)}", "Runs"))
    paused = {pause.name for pause in pauses if pause.kind is PauseKind.TASK}
    for each in tasks:
        failed, ended = (
            each.states.get(State.FAILED, 0),
            sum(each.states.get(state, 0) for state in State if state.is_final),
        )
        if failed >= _FEW and failed * 2 >= ended and each.task not in paused:
            share = f"All {number(ended)}" if failed == ended else f"{number(failed)} of {number(ended)}"
            sentence = f"{share} runs of the task {each.task} that ended lately have failed."
            found.append(Sign(sentence, f"/tasks/{quote(each.task, safe='')}", "Task"))
    for pause in pauses:
        because = f": {pause.reason}" if pause.reason else ""
        until = f", until {ago(pause.until)}" if pause.until else ""
        sentence = f"The {pause.kind} {pause.name} is paused{because} (since {ago(pause.since)}{until})."
        place = f"/{'pools' if pause.kind == 'pool' else 'lanes' if pause.kind == 'lane' else 'tasks'}"
        found.append(Sign(sentence, place, "Resume"))
    for lane in lanes:
        if lane.problem:
            found.append(Sign(f"Lane {lane.name}: {lane.problem}", "/lanes", "Limits"))
        elif (
            lane.held
            and not (lane.running or lane.queued or lane.paused)
            and (lane.max_running == 0 or (lane.oldest_age_seconds or 0) > _STUCK)
        ):
            sentence = f"Lane {lane.name} runs nothing, and {_runs(lane.held)}: its limit is {limits(lane)}."
            found.append(Sign(sentence, "/lanes", "Limits"))
    for worker in workers:
        if worker.heartbeat_age_seconds > _SILENT and not worker.draining and worker.pool not in deserted:
            sentence = f"Worker {worker.host} of pool {worker.pool} is silent for {span(worker.heartbeat_age_seconds)}."
            found.append(Sign(sentence, "/pools", "Workers"))
    return found


def _runs(many: int) -> str:
    return "1 run waits" if many == 1 else f"{number(many)} runs wait"


class Bar(NamedTuple):
    """A minute of the chart, or half an hour: heights in percent, bad ends on top of good ones."""

    at: datetime
    x: int
    good: float
    bad: float
    submitted: float
    ended: int
    came: int


def chart(flow: Sequence[Flow]) -> list[Bar]:
    bad = {State.FAILED, State.EXPIRED}
    most = max([1, *(max(each.submitted, sum(each.ended.values())) for each in flow)])
    bars = list[Bar]()
    for place, each in enumerate(flow):
        ended, failed = sum(each.ended.values()), sum(runs for state, runs in each.ended.items() if state in bad)
        high, low, came = (round(100 * runs / most, 1) for runs in (ended - failed, failed, each.submitted))
        bars.append(Bar(each.at, place * 10 + 1, high, low, came, ended, each.submitted))
    return bars


async def _overview(request: Request) -> Response:
    client = service(request).client
    within = Within.DAY if request.query_params.get("within") == Within.DAY else Within.HOUR
    counts, pools, lanes, workers, pauses = await asyncio.gather(
        client.counts(within), client.pools(), client.lanes(), client.workers(), client.pauses()
    )
    return render(
        request,
        "overview.html",
        within=within.value,
        counts=counts,
        bars=chart(counts.flow),
        pools=pools,
        lanes=lanes,
        workers=workers,
        signs=signs(pools, lanes, workers, pauses, counts.tasks),
        causes=counts.errors[:8],
    )


routes = [Route("/", _overview)]
