"""A user's module that keeps an event loop of its process from starting threads while the file `no-threads` is in its
folder, as a limit of the system would. Other threads are let be: Prefect can't start without them.
"""

import threading
from pathlib import Path
from typing import Any

_start = threading.Thread.start


def _start_if_allowed(self: threading.Thread, *given: Any) -> None:
    if self.name.startswith("asyncio") and Path("no-threads").exists():
        raise RuntimeError("can't start new thread")
    _start(self, *given)


threading.Thread.start = _start_if_allowed  # type: ignore[method-assign]
