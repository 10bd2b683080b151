"""The command `backcast`. Decides that a signal ends it from its first moment on, before anything else is imported.

Imports take seconds, and until a process has a handler the kernel drops its signals if it is PID 1, as in a container:
it would go on after it was told to end. A process with something to finish sets its own (`process/stop.py`).
"""

import os
import signal

_ENDING = (signal.SIGTERM, signal.SIGINT)


def main() -> None:
    """Run the command that the arguments name."""
    before = {number: signal.getsignal(number) for number in _ENDING}
    for number in _ENDING:
        if before[number] != signal.SIG_IGN:  # as `nohup` asks
            signal.signal(number, lambda number, _frame: os._exit(128 + number))  # nothing is there to clean up
    from backcast.cli.main import app

    signal.signal(signal.SIGINT, before[signal.SIGINT])  # Ctrl-C raises KeyboardInterrupt, as commands expect
    app()


if __name__ == "__main__":
    main()
