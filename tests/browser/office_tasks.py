"""Tasks of a small office, as a console shows them: good, slow, flaky and wrong ones."""

import asyncio
from pathlib import Path

from prefect import task

from backcast import emit, options, progress
from backcast.errors import TransientError, UsageError


@options(lane="openai")
@task
async def extract_invoice(document: str, currency: str = "EUR") -> dict[str, str | int]:
    """Reads number, total and currency of an invoice.

    Args:
        document: Where the document lies.
        currency: Of the total, if the document names none.
    """
    print(f"reading {document}")
    return {"document": document, "number": "2026-0417", "total": 1249, "currency": currency}


@options(lane="letters")
@task(retries=4, retry_delay_seconds=[0.2, 0.2, 3600, 3600])
async def send_reminder(customer: str) -> None:
    """Sends a reminder, when the mail server answers."""
    raise TransientError(f"mail.example.org answered 451 for {customer}: try again later")


@task
async def read_scan(pages: int, sharp: bool = True) -> str:
    """Reads a scan; some can't be read."""
    for page in range(1, pages + 1):
        print(f"page {page} of {pages}")
    raise UsageError(f"page {pages} is empty: scan it again")


@task
async def transcribe(recording: str, release: str) -> str:
    """Transcribes a recording, a piece after the other. It ends when the file `release` is there."""
    for minute in range(1, 6):
        progress(minute / 12, f"minute {minute} of 12")
        emit(f"… {recording}, minute {minute}")
    while not Path(release).exists():  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    return "We agreed to meet on Thursday."
