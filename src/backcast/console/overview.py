"""The page that tells at a glance whether work flows, what is stuck, and where to mend it."""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from backcast.console.pages import ago, number, query, render, service, span
from backcast.models import Flow, Lane, Pause, Pool, State, Within, Worker

_SILENT = 30.0
"""Seconds without a heartbeat after which a worker is worth a look."""


_STUCK = 60.0
"""Seconds for which a lane may hold all of its runs: at the least rate that people use, one starts in this time."""


class Sign(NamedTuple):
    """Something that needs a look, and the page where it is mended."""

    sentence: str
    link: str
    action: str


def signs(
    pools: Sequence[Pool], lanes: Sequence[Lane], workers: Sequence[Worker], pauses: Sequence[Pause]
) -> list[Sign]:
    found = list[Sign]()
    for pool in pools:
        waiting = pool.ready + pool.parked
        if waiting and not pool.workers:
            sentence = f"Pool {pool.name} has no live worker, and {number(waiting)} runs wait for one."
            found.append(Sign(sentence, "/pools", "Pools"))
        elif pool.parked:
            sentence = f"{number(pool.parked)} runs of pool {pool.name} wait for a worker that has their task."
            found.append(Sign(sentence, f"/runs{query(state=State.QUEUED)}", "Runs"))
    for pause in pauses:
        because = f": {pause.reason}" if pause.reason else ""
        until = f", until {ago(pause.until)}" if pause.until else ""
        sentence = f"The {pause.kind} {pause.name} is paused{because} (since {ago(pause.since)}{until})."
        place = f"/{'pools' if pause.kind == 'pool' else 'lanes' if pause.kind == 'lane' else 'tasks'}"
        found.append(Sign(sentence, place, "Resume"))
    for lane in lanes:
        if lane.problem:
            found.append(Sign(f"Lane {lane.name}: {lane.problem}", "/lanes", "Limits"))
        elif lane.held and not (lane.running or lane.queued or lane.paused) and (lane.oldest_age_seconds or 0) > _STUCK:
            sentence = f"Lane {lane.name} holds {number(lane.held)} runs, and none of it runs."
            found.append(Sign(sentence, "/lanes", "Limits"))
    for worker in workers:
        if worker.heartbeat_age_seconds > _SILENT and not worker.draining:
            sentence = f"Worker {worker.host} is silent for {span(worker.heartbeat_age_seconds)}."
            found.append(Sign(sentence, "/pools", "Workers"))
    return found


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
        signs=signs(pools, lanes, workers, pauses),
        causes=counts.errors[:8],
    )


routes = [Route("/", _overview)]
