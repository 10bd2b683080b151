"""Turns signals into requests to stop."""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable

from backcast.process import orphans

_ASKING = {signal.SIGTERM, signal.SIGINT}
_ENDING = {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM}
"""Others that end a process at once, unless it takes them."""


class Stop:
    """SIGTERM or SIGINT asks to stop; the second one asks to stop at once."""

    def __init__(self, refuses: Callable[[list[int]], bool] | None = None) -> None:
        """`refuses` is called on the loop with the process that has sent a signal, and its ancestors; if it returns
        true, the signal asks for nothing. SIGHUP then asks to stop too, unless it is ignored, as `nohup` has it."""
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in _ASKING:
            self._loop.add_signal_handler(number, self._signalled)
        if refuses is None or not hasattr(signal, "sigwaitinfo"):
            return
        asking = _ASKING | ({signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL else set())
        # Blocked here and in the threads that begin from now on, they come to one that sees their sender. uvloop
        # unblocks them in the processes that it starts.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING | _ENDING)
        threading.Thread(target=self._wait, args=(refuses, asking), name="signals", daemon=True).start()

    def _wait(self, refuses: Callable[[list[int]], bool], asking: set[signal.Signals]) -> None:
        """In a thread of its own: the sender may be gone a moment later."""

        def take(number: int, senders: list[int]) -> None:
            if not refuses(senders) and number in asking:
                self._signalled()

        while True:
            taken = signal.sigwaitinfo(_ASKING | _ENDING)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(take, taken.si_signo, orphans.lineage(taken.si_pid))

    def _signalled(self) -> None:
        if self.asked.is_set():
            self.at_once.set()
        self.asked.set()
