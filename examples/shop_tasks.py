"""Three plain Prefect tasks, as users write them. Serve them with

    BACKCAST_TASKS=shop_tasks PYTHONPATH=examples make up

and run one with

    .venv/bin/backcast submit word_frequencies text="a rose is a rose" --wait

Only the two error classes come from backcast; they are optional.
"""

import collections
import re
from typing import Annotated

import httpx
from prefect import get_run_logger, task
from pydantic import BaseModel, Field, HttpUrl

from backcast.errors import TransientError, UsageError


class Page(BaseModel):
    url: HttpUrl
    status: int
    title: str | None


@task(timeout_seconds=30)
async def fetch_title(url: HttpUrl) -> Page:
    """Fetch a web page and return its title.

    Args:
        url: The page's address.
    """
    async with httpx.AsyncClient(follow_redirects=True, timeout=20) as client:
        answer = await client.get(str(url))
    get_run_logger().info("%s answered %s", url, answer.status_code)
    found = re.search(r"<title[^>]*>(.*?)</title>", answer.text, re.IGNORECASE | re.DOTALL)
    return Page(url=url, status=answer.status_code, title=found[1].strip() if found else None)


@task
def word_frequencies(text: str, most: Annotated[int, Field(ge=1, le=1000)] = 10) -> list[tuple[str, int]]:
    """Count the words of a text. It is not async, so the worker runs it in a thread.

    Args:
        text: Any text.
        most: How many of the commonest words to return.
    """
    return collections.Counter(re.findall(r"\w+", text.lower())).most_common(most)


class Order(BaseModel):
    sku: Annotated[str, Field(pattern=r"^[A-Z]{2}-\d{3}$")]
    quantity: Annotated[int, Field(ge=1)]


@task(retries=4, retry_delay_seconds=[1, 5, 30, 120], retry_jitter_factor=0.3, log_prints=True)
async def reserve_stock(order: Order, warehouse_url: HttpUrl) -> str:
    """Reserve stock in a warehouse that is sometimes busy. A retry waits in the database, not in the worker.

    Args:
        order: The item and its quantity.
        warehouse_url: The warehouse's endpoint for reservations.

    Returns:
        The reservation's number.
    """
    try:
        async with httpx.AsyncClient(timeout=10) as client:
            answer = await client.post(str(warehouse_url), json=order.model_dump())
    except httpx.TransportError as error:
        raise TransientError(f"The warehouse can't be reached: {type(error).__name__}.") from None
    if answer.status_code in (429, 503):
        raise TransientError(f"The warehouse is busy ({answer.status_code}).")
    if answer.is_error:
        raise UsageError(f"The warehouse refused the order: {answer.text[:200]}")
    print(f"reserved {order.quantity} × {order.sku}")
    return str(answer.json()["reservation"])
