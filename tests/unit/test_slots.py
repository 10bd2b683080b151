"""No more runs execute than there are slots, and a run in quarantine executes alone, whatever comes when."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from backcast.ledger.claims import Claim
from backcast.models import uuid7
from backcast.worker.slots import Held, Slots

COUNT = 4
STEPS = st.lists(
    st.tuples(st.sampled_from(["claim", "end", "leave", "return", "withdraw"]), st.integers(0, 20), st.booleans()),
    max_size=60,
)


def claimed(*, lost: int) -> Claim:
    return Claim(
        id=uuid7(),
        task="t",
        fence=1,
        input="{}",
        input_key=None,
        retries_used=0,
        attempts_used=lost,
        max_attempts=3,
        owner_key=0,
        lost_fence=0 if lost else None,
    )


@settings(deadline=None)
@given(STEPS)
def test_slots_are_a_bound(steps: list[tuple[str, int, bool]]) -> None:
    asyncio.run(_follow(steps))


async def _follow(steps: list[tuple[str, int, bool]]) -> None:
    left, executing, wrong = 0, list[Held](), list[str]()

    async def start(held: Held) -> None:
        executing.append(held)
        if len(executing) + left > COUNT and not held.claim.is_quarantined:
            wrong.append(f"{len(executing)} execute beside {left} that are left")
        if len(executing) > 1 and any(each.claim.is_quarantined for each in executing):
            wrong.append("it is not alone")

    slots = Slots(COUNT, lambda: left, start)
    for what, number, is_odd in steps:
        match what:
            case "claim":
                assert sum(slots.room()) >= 0
                for _ in range(number):  # more than there is room for, as when code has kept a slot meanwhile
                    slots.take(claimed(lost=2 if is_odd else 0))
                slots.fill()
            case "end" | "leave" if executing:
                held = executing.pop(number % len(executing))
                left += what == "leave"
                slots.freed(held)
                slots.drop(held.claim.id, held.claim.fence)
            case "return" if left:
                left -= 1
                slots.fill()
            case "withdraw" if slots.waiting:
                held = slots.waiting[number % len(slots.waiting)]
                assert slots.withdraw(held)
                slots.drop(held.claim.id, held.claim.fence)
            case _:
                pass
        await asyncio.sleep(0)  # what has begun makes its first step
        assert slots.busy == len(executing)
        assert not wrong
    left = 0
    slots.fill()
    while slots.busy:  # whatever has come before, each claimed run executes in the end
        await asyncio.sleep(0)
        slots.freed(executing.pop())
    assert not slots.waiting


async def test_a_run_that_is_stopped_as_it_begins_gives_its_slot_back() -> None:
    """A task that is cancelled before its first step executes no line of its own."""
    seen = list[Held]()

    async def start(held: Held) -> None:
        seen.append(held)
        await asyncio.sleep(3600 if held.reason is None else 0)
        slots.freed(held)

    slots = Slots(COUNT, lambda: 0, start)
    slots.take(claimed(lost=2))
    slots.fill()
    [held] = slots.runs.values()
    held.stop("cancelled")
    await asyncio.gather(*slots.works)
    assert seen == [held]
    assert slots.busy == 0
    slots.take(claimed(lost=2))
    slots.fill()
    assert len(slots.works) == 1, "it is not exclusive any more"
    for work in slots.works:
        work.cancel()
