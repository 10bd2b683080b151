"""Decides from which route a worker claims next, see `ledger.routing`: those that have runs for it take turns."""

from collections import deque
from collections.abc import Iterable


class Turns:
    def __init__(self, routes: Iterable[str]) -> None:
        """`routes` lead to the worker, besides the one that all runs begin on."""
        self._routes = frozenset(routes)
        self._turns = deque([""])

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def next(self) -> str:
        return self._turns[0]

    def ready(self, route: str) -> None:
        """There are runs on this route."""
        if route in self._routes and route not in self._turns:
            self._turns.append(route)

    def claimed(self, *, is_empty: bool) -> None:
        """A route that has no more runs for us leaves, but for the one that all runs begin on."""
        route = self._turns.popleft()
        if not is_empty or not route:
            self._turns.append(route)

    def failed(self) -> None:
        """What is wrong with this route need not be wrong with the others."""
        self._turns.rotate(-1)
