"""Outlasts the outage of a needed service: tries again, ever more slowly, and reports each reason once."""

from collections.abc import Callable, Iterator


def backoff(first: float, longest: float, *, factor: float = 2) -> Iterator[float]:
    """Seconds before each further try: `first`, then `factor` times as long each time, up to `longest`."""
    delay = first
    while True:
        yield delay
        delay = min(factor * delay, longest)


_REASONS = 100
"""Reasons remembered at most: some texts differ each time, as by an address or a count."""


class Outage:
    """A service that may be away. While it is, each reason is reported once, however often it is tried."""

    def __init__(self, report: Callable[..., object]) -> None:
        self._report = report
        self._reasons = set[str]()

    def __bool__(self) -> bool:
        """Whether it is away."""
        return bool(self._reasons)

    def failed(self, reason: object, **how: object) -> None:
        """`how` goes to the report, such as `exc_info=True` for a reason that is nobody's outage."""
        text = str(reason) or type(reason).__name__
        if text not in self._reasons:
            self._report(text, **how)
            if len(self._reasons) >= _REASONS:
                self._reasons.clear()
        self._reasons.add(text)

    def ended(self) -> None:
        self._reasons.clear()
