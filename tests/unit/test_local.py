"""The building blocks of `backcast up`, with small programs in the place of its parts."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from backcast.errors import ConfigurationError
from backcast.local import postgres
from backcast.local.child import LONGEST, Child
from backcast.local.ports import Ports, listens
from backcast.local.up import up
from tests.support.waiting import PATIENCE, until

Lines = list[tuple[str, str, str]]


def part(folder: Path, lines: Lines, program: str, *, name: str = "api", **given: object) -> Child:
    def show(*line: str) -> None:
        lines.append(line)  # type: ignore[arg-type]

    return Child(name, lambda: [sys.executable, "-uISc", program], os.environ, folder / "part.log", show, **given)  # type: ignore[arg-type]


async def words(lines: Lines, wanted: str, *, times: int = 1) -> Lines:
    async def look() -> Lines:
        return list(lines)

    return await until(look, lambda seen: sum(wanted in line[1] for line in seen) >= times)


async def test_a_part_that_dies_is_started_again_and_the_terminal_shows_it(tmp_path: Path) -> None:
    lines: Lines = []
    it = part(tmp_path, lines, "print('INFO    hello'); print('no end', end=''); raise SystemExit(3)").start()
    await words(lines, "hello", times=2)
    await it.stop(PATIENCE)
    assert lines[:4] == [
        ("api", "hello", ""),
        ("api", "no end", ""),
        ("api", "ended with exit code 3; starting it again in 0.5 s", "red"),
        ("api", "hello", ""),
    ]


async def test_a_killed_part_is_named_with_its_signal(tmp_path: Path) -> None:
    lines: Lines = []
    it = part(tmp_path, lines, "import os; os.kill(os.getpid(), 9)").start()
    await words(lines, "was killed by SIGKILL; starting it again in 0.5 s")
    await it.stop(PATIENCE)


async def test_a_part_that_can_not_even_be_started_is_tried_again(tmp_path: Path) -> None:
    lines: Lines = []
    it = part(tmp_path / "missing", lines, "").start()
    await words(lines, "No such file or directory", times=2)
    await it.stop(PATIENCE)


async def test_the_terminal_shows_the_last_line_of_a_traceback_and_the_log_all_of_it(tmp_path: Path) -> None:
    lines: Lines = []
    it = part(
        tmp_path, lines, "def f(): raise ValueError('no')\ntry: f()\nexcept ValueError as e: raise KeyError from e"
    )
    it.start()
    await words(lines, "ended with exit code 1")
    await it.stop(PATIENCE)
    assert [words for _, words, _ in lines][:2] == ["ValueError: no", "KeyError"]
    assert "Traceback (most recent call last)" in (tmp_path / "part.log").read_text()


async def test_very_long_and_broken_lines_do_no_harm(tmp_path: Path) -> None:
    lines: Lines = []
    output = r"b'x' * 200_000 + b'\xff\n\n' + b'y' * 20_000_000 + b'\nend\n' + b'z' * 20_000_000"
    it = part(tmp_path, lines, f"import sys, time; sys.stdout.buffer.write({output}); time.sleep(3600)").start()
    await words(lines, "end")

    async def size() -> int:
        return (tmp_path / "part.log").stat().st_size

    assert await until(size, lambda seen: seen >= 40_200_008) == 40_200_008, "the log file has all of it"
    async with asyncio.timeout(PATIENCE):
        await it.stop(PATIENCE)
    assert [len(words) for _, words, _ in lines] == [200_001, LONGEST, 3, LONGEST]


@pytest.mark.parametrize("session", [False, True])
async def test_a_death_is_seen_while_a_grandchild_holds_the_pipe(tmp_path: Path, session: bool) -> None:
    """A grandchild in the process's group ends with it: it might hold the port that the next one needs."""
    lines: Lines = []
    start = f"subprocess.Popen(['sleep', '3600'], start_new_session={session})"
    it = part(tmp_path, lines, f"import os, subprocess\nprint('pid', {start}.pid)\nos.kill(os.getpid(), 9)").start()
    await words(lines, "was killed by SIGKILL; starting it again in 1 s")
    await it.stop(PATIENCE)
    pids = [int(text.removeprefix("pid ")) for _, text, _ in lines if text.startswith("pid ")]
    for pid in pids:
        if session:
            os.kill(pid, signal.SIGKILL)
        else:
            await until(lambda pid=pid: _is_gone(pid))


async def _is_gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


async def test_a_terminal_that_fails_does_not_stop_the_reading(tmp_path: Path) -> None:
    lines: Lines = []
    it = part(tmp_path, lines, "print('on'); print('x' * 1_000_000); print('off')")

    def show(*line: str) -> None:
        lines.append(line)  # type: ignore[arg-type]
        if "ended" not in line[1]:
            raise BrokenPipeError

    it.show = show
    it.start()
    await words(lines, "ended with exit code 0")
    await it.stop(PATIENCE)
    assert (tmp_path / "part.log").read_text().startswith("on\nx")
    assert "off" in (tmp_path / "part.log").read_text()


async def test_a_part_without_hope_is_given_up(tmp_path: Path) -> None:
    errors: list[ConfigurationError] = []

    async def prepare() -> None:
        raise ConfigurationError("the port is gone")

    it = part(tmp_path, [], "", prepare=prepare, give_up=errors.append).start()

    async def look() -> list[ConfigurationError]:
        return errors

    await until(look)
    await it.stop(PATIENCE)
    assert [error.detail for error in errors] == ["the port is gone"]


async def test_a_part_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    lines: Lines = []
    it = part(tmp_path, lines, "import signal, time; signal.signal(15, signal.SIG_IGN); print('on'); time.sleep(3600)")
    it.start()
    await words(lines, "on")
    async with asyncio.timeout(PATIENCE):
        await it.stop(0.1)
    assert lines[-1] == ("api", "has not stopped within 0.1 s: killed", "yellow")


async def test_a_part_may_be_stopped_before_it_was_started_and_while_it_waits(tmp_path: Path) -> None:
    lines: Lines = []
    await part(tmp_path, lines, "").stop(5)
    it, stops = part(tmp_path, lines, ""), list[asyncio.Task[None]]()

    def show(*line: str) -> None:  # the part will now wait for half a second
        lines.append(line)  # type: ignore[arg-type]
        stops.append(asyncio.create_task(it.stop(3600)))

    it.show = show
    it.start()
    await words(lines, "starting it again")
    async with asyncio.timeout(PATIENCE):
        await stops[0]
    assert len(lines) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help exists on Linux only")
async def test_the_stop_signal_is_the_one_that_was_chosen(tmp_path: Path) -> None:
    lines: Lines = []
    program = (
        "import signal, sys, time\nsignal.signal(2, lambda *_: sys.exit(print('fast')))\nprint('on')\ntime.sleep(3600)"
    )
    it = part(tmp_path, lines, program, stop_by=signal.SIGINT).start()
    await words(lines, "on")
    await it.stop(PATIENCE)
    assert lines[-1][1] == "fast"


def test_a_port_that_is_taken_is_replaced_by_the_next() -> None:
    ports = Ports()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert taken < ports.take(taken) <= taken + 99
        assert listens(os.getpid(), taken)
    assert not listens(os.getpid(), taken)
    assert ports.take(taken) == taken
    assert ports.take(taken) > taken, "taken already, although nobody listens yet"
    second = Ports()
    assert second.take(taken) > taken, "taken by another one"
    assert second.take(0, {taken}) > 0
    ports.release()
    assert second.take(taken) == taken
    second.release()


def test_the_locks_of_ports_are_not_put_where_somebody_else_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"backcast-ports-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigurationError, match="belongs to someone else"):
        Ports()


def test_without_a_free_port_there_is_a_sentence() -> None:
    with pytest.raises(ConfigurationError, match="Port 65535 and the hundred above it are taken"):
        Ports().take(65535, {65535})


def test_a_folder_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"file/data can't be used \(Not a directory\): choose another folder"):
        up(data=tmp_path / "file" / "data")


def test_a_socket_lives_in_the_data_folder_unless_its_path_is_long_or_odd(tmp_path: Path) -> None:
    plain = Path("/var/lib/it/postgres")
    assert postgres.url(plain, "db") == "postgresql://postgres@/db?host=/var/lib/it/postgres&port=5432"
    for odd in (plain / ("deep/" * 20), plain / "with space", plain / "50%"):
        address = postgres.url(odd, "db")
        assert address == postgres.url(odd, "db") != postgres.url(plain / "other space", "db")
        assert len(address.partition("host=")[2]) < 80


def test_the_callers_settings_of_postgresql_win(tmp_path: Path) -> None:
    command = postgres.command(tmp_path, settings={"max_connections": "300", "fsync": "off"})
    options = [word for before, word in pairwise(command) if before == "-c"]
    assert {"max_connections=300", "fsync=off", "shared_buffers=128MB", "listen_addresses="} <= set(options)
    assert "max_connections=100" not in options
