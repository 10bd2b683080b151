"""The memory of an executor is that of its processes too, and what forks share counts once."""

import subprocess
import sys

from backcast.worker.executors import memory

SIZE = 64 << 20
_FORKS = f"""
import os, sys
kept = b"x" * {SIZE}
if os.fork() == 0 or os.fork() == 0 or os.fork() == 0:
    sys.stdin.read()
    os._exit(0)
print("ready", flush=True)
sys.stdin.read()
"""
_CHILD = f"""
import subprocess, sys
code = "import sys; kept = b'x' * {SIZE}; print('ready', flush=True); sys.stdin.read()"
subprocess.run(["sh", "-c", sys.executable + ' -c "$0"; true', code])
"""


def _memory(code: str, limit: int) -> int:
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return memory(process.pid, limit)


def test_what_forks_share_counts_once() -> None:
    assert SIZE < _memory(_FORKS, limit=0) < 2 * SIZE


def test_a_process_of_a_process_counts() -> None:
    assert _memory(_CHILD, limit=0) > SIZE


def test_below_the_limit_nothing_is_looked_at_closely() -> None:
    assert _memory(_FORKS, limit=1 << 40) > 4 * SIZE
