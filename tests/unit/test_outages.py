"""An outage is reported once for each reason, and remembers no more of them than it must."""

from backcast.process.outages import _REASONS, Outage


def test_each_reason_is_reported_once() -> None:
    reported: list[object] = []
    outage = Outage(reported.append)
    for reason in ("away", "full", "away", ""):
        outage.failed(reason)
    assert reported == ["away", "full", "str"]
    outage.ended()
    outage.failed("away")
    assert reported[3:] == ["away"]


def test_reasons_that_differ_each_time_fill_no_memory() -> None:
    outage = Outage(lambda _: None)
    for number in range(10 * _REASONS):
        outage.failed(f"{number} connections are left")
    assert outage
    assert len(outage._reasons) <= _REASONS
