"""Turns signals into requests to stop."""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Mapping

from backcast.process import orphans

_TAKEN = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM}
"""What would end a process at once, unless it takes them."""


class Stop:
    """SIGTERM or SIGINT asks to stop; the second one asks to stop at once. SIGHUP asks to stop, however often it comes:
    a terminal that goes sends it, and so does the shell in it. `nohup` has it ignored."""

    def __init__(self, refuses: Callable[[list[int]], bool] | None = None) -> None:
        """`refuses` is called on the loop with the process that has sent a signal, and its ancestors; if it returns
        true, the signal asks for nothing. Other signals than these then do nothing at all."""
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        asked: dict[int, Callable[[], None]] = dict.fromkeys((signal.SIGTERM, signal.SIGINT), self._signalled)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            asked[signal.SIGHUP] = self.asked.set
        for number, ask in asked.items():
            self._loop.add_signal_handler(number, ask)
        if refuses is None or not hasattr(signal, "sigwaitinfo"):
            return
        # Blocked here and in the threads that begin from now on, they come to one that sees their sender. uvloop
        # unblocks them in the processes that it starts.
        signal.pthread_sigmask(signal.SIG_BLOCK, _TAKEN)
        threading.Thread(target=self._wait, args=(refuses, asked), name="signals", daemon=True).start()

    def _wait(self, refuses: Callable[[list[int]], bool], asked: Mapping[int, Callable[[], None]]) -> None:
        """In a thread of its own: the sender may be gone a moment later."""

        def take(number: int, senders: list[int]) -> None:
            if not refuses(senders) and number in asked:
                asked[number]()

        while True:
            taken = signal.sigwaitinfo(_TAKEN)
            with contextlib.suppress(Exception):  # as when the loop is closed: the next signal is taken all the same
                self._loop.call_soon_threadsafe(take, taken.si_signo, orphans.lineage(taken.si_pid))

    def _signalled(self) -> None:
        if self.asked.is_set():
            self.at_once.set()
        self.asked.set()
