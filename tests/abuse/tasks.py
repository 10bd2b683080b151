"""Tasks that misbehave: what users of background tasks have reported, each in a few lines."""

import _thread
import asyncio
import contextlib
import contextvars
import ctypes
import gc
import io
import locale
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from prefect import task

from backcast.options import options
from backcast.reporting import progress
from tests.support.waiting import until


@task
async def nap(seconds: float = 0.5) -> float:
    """The neighbour."""
    await asyncio.sleep(seconds)
    return seconds


@task
def sync_nap(seconds: float = 0.5) -> float:
    time.sleep(seconds)
    return seconds


@task
def crunch(seconds: float = 4) -> int:
    """A neighbour that computes."""
    until, turns = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        turns += 1
    return 1


@task(timeout_seconds=2)
async def spin() -> None:
    while True:
        pass


@task
async def spin_under_a_name_that_is_no_text() -> None:
    ctypes.CDLL(None).prctl(15, b"\xff", 0, 0, 0)
    while True:
        pass


@options(history="none")
@task
async def spin_later() -> None:
    await asyncio.sleep(0.1)
    await asyncio.gather(_spin(), asyncio.sleep(100))


async def _spin() -> None:
    await asyncio.sleep(0.1)
    while True:
        pass


@task
async def sleep_in_the_loop() -> None:
    time.sleep(3600)


@task
async def sleep_in_steps_in_the_loop() -> None:
    while True:
        time.sleep(0.005)


@task
def sleep_with_the_gil() -> None:
    ctypes.PyDLL(None).sleep(3600)


@task
def hold_gil(n: int = 40) -> bool:
    return bool(re.match(r"(a+)+$", "a" * n + "b"))


@task
async def hold_gil_in_the_loop(n: int = 40) -> bool:
    return bool(re.match(r"(a+)+$", "a" * n + "b"))


@task
async def exit_in_task() -> None:
    sys.exit(3)


@task
def exit_in_thread() -> None:
    sys.exit(3)


@task
async def exit_in_child() -> None:
    async def child() -> None:
        sys.exit(3)

    await asyncio.gather(child(), asyncio.sleep(5))


@task
async def exit_in_callback() -> str:
    asyncio.get_running_loop().call_soon(sys.exit)
    await asyncio.sleep(0.2)
    return "survived"


@task
async def stop_the_loop() -> str:
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0.2)
    return "survived"


@task
async def stop_and_close_the_loop() -> None:
    """Stops it, and closes it before anybody can go on with it."""
    loop = asyncio.get_running_loop()

    def close() -> None:
        while not loop.is_closed():
            with contextlib.suppress(RuntimeError):
                loop.close()

    threading.Thread(target=close, daemon=True).start()
    while True:
        loop.stop()
        await asyncio.sleep(0.05)


@task
async def interrupt() -> None:
    raise KeyboardInterrupt


@task
def generator_exit() -> None:
    raise GeneratorExit


@task
async def generator_exit_in_the_loop() -> None:
    raise GeneratorExit


@task
async def os_exit() -> None:
    os._exit(7)


@task
def os_exit_in_thread() -> None:
    os._exit(7)


@task
def leave_a_bomb(fuse: str) -> str:
    """A thread that ends the process once this file is there, when the run is long over."""

    def wait() -> None:
        while not Path(fuse).exists():
            time.sleep(0.05)
        Path(fuse).unlink()
        os._exit(7)

    threading.Thread(target=wait, daemon=True).start()
    return "left"


@task
async def leave_a_callback(fuse: str) -> str:
    """One that blocks the loop then."""
    loop = asyncio.get_running_loop()

    def wait() -> None:
        if Path(fuse).exists():
            Path(fuse).unlink()
            while True:
                pass
        loop.call_later(0.05, wait)

    wait()
    return "left"


@task
async def leave_a_canceller(fuse: str) -> str:
    """A callback that cancels everything then."""
    loop = asyncio.get_running_loop()

    def wait() -> None:
        if not Path(fuse).exists():
            loop.call_later(0.05, wait)
            return
        Path(fuse).unlink()
        for one in asyncio.all_tasks(loop):
            one.cancel()

    wait()
    return "left"


@task
async def abort() -> None:
    os.abort()


@task
async def segfault() -> None:
    await asyncio.sleep(0.05)
    ctypes.string_at(0)


@task
def segfault_in_thread() -> None:
    ctypes.string_at(0)


@task
async def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@task
async def terminate_itself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(60)


@task
def signal_its_worker() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
        os.kill(os.getppid(), number)
    time.sleep(3600)


@task
def signal_its_worker_by_a_shell() -> None:
    subprocess.run(["sh", "-c", f"kill {os.getppid()}; sleep 3600"])


@task
def signal_its_worker_again_and_again() -> None:
    """Also when the executor has ended."""
    subprocess.Popen(["sh", "-c", f"while sleep 0.05; do kill {os.getppid()}; done"], start_new_session=True)
    time.sleep(3600)


@task
def kill_its_group() -> None:
    os.killpg(os.getpgid(0), signal.SIGKILL)


@task
async def shout(megabytes: int = 50) -> str:
    print("m" * megabytes * 1_000_000)
    return "shouted"


@task
def shout_lines(millions: int = 20) -> str:
    print("a line that is sent, as others may be in a moment")
    print("m\n" * millions * 1_000_000)
    return "shouted"


@task
def chatter(lines: int = 200_000) -> str:
    for _ in range(lines):
        print("c" * 1000)
    return "chattered"


@task
def long_message(megabytes: int = 50) -> None:
    raise ValueError("m" * megabytes * 1_000_000)


class Unprintable(Exception):
    def __str__(self) -> str:
        return self.nothing  # type: ignore[attr-defined]


@task(retries=2, retry_delay_seconds=0)
async def unprintable() -> None:
    raise Unprintable


@task
async def steal_signals() -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGABRT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    return 1


@task
async def steal_signals_and_spin() -> None:
    signal.signal(signal.SIGABRT, signal.SIG_IGN)
    while True:
        pass


@task
async def stop_its_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@task(timeout_seconds=1)
def sleep_on(seconds: float = 3600) -> None:
    time.sleep(seconds)


@task(timeout_seconds=1, retries=1, retry_delay_seconds=0)
def sleep_on_at_first(marks: str) -> str:
    if not Path(marks).exists():
        Path(marks).touch()
        time.sleep(3600)
    return "in time"


@task
async def stubborn() -> None:
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(600)


class Uncancellable(asyncio.Future[None]):
    def cancel(self, msg: Any = None) -> bool:
        raise SystemExit(msg)


@task
async def uncancellable() -> None:
    await Uncancellable()


@task
def fork_and_leave(seconds: float = 300) -> int:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(seconds,))
    child.start()
    return int(child.pid or 0)


@task
def leave_a_daemon() -> int:
    """In a session of its own, and no child of anybody."""
    code = "import os, time; os.fork() and os._exit(0); os.setsid(); print(os.getpid(), flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return int(child.stdout.readline())


@task
def leave_a_shell() -> int:
    """A process that has one of its own."""
    child = subprocess.Popen(
        ["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stdout is not None
    return int(child.stdout.readline())


@task
def leave_a_server() -> list[int]:
    """A process that holds a port after its run."""
    code = "import socket, sys, time; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); "
    code += "print(s.getsockname()[1], flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return [child.pid, int(child.stdout.readline())]


@task
def forks(count: int = 200) -> int:
    """Forks while threads hold locks."""
    lock = threading.Lock()
    stop = threading.Event()

    def hold() -> None:
        while not stop.is_set():
            with lock:
                time.sleep(0.001)

    threads = [threading.Thread(target=hold, daemon=True) for _ in range(4)]
    for one in threads:
        one.start()
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    stop.set()
    return count


@task(timeout_seconds=1)
def shell() -> None:
    subprocess.run(["sleep", "600"])


@task
async def close_descriptors() -> None:
    for number in range(100):
        with contextlib.suppress(OSError):
            os.close(number)
    await asyncio.sleep(60)


@task
async def hog(megabytes: int = 100_000) -> int:
    kept = []
    for _ in range(megabytes):
        kept.append(bytearray(os.urandom(1)) * 1_000_000)
        await asyncio.sleep(0)
    return len(kept)


@task
def hog_in_a_process(megabytes: int = 1000) -> None:
    subprocess.run([sys.executable, "-c", f"import time; kept = b'x' * ({megabytes} << 20); time.sleep(3600)"])


_kept = list[bytearray]()


@task
def grow(megabytes: int) -> str:
    """And keep it."""
    while psutil.Process().memory_info().rss < megabytes << 20:
        _kept.append(bytearray(b"x" * (4 << 20)))
    return "large"


@task
async def wander() -> str:
    os.chdir("/")
    os.environ.clear()
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(200)
    return "wandered"


@task
async def recurse_little() -> str:
    sys.setrecursionlimit(60)
    await asyncio.sleep(1)
    return "shallow"


@task
async def borrow_signals() -> str:
    """As libraries that take SIGTERM, and give it back."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    await asyncio.sleep(0.2)
    signal.signal(signal.SIGTERM, before)
    return "given back"


@task
def fork_bomb(generations: int = 6) -> str:
    """Each process makes another two, which stay."""
    for _ in range(generations):
        if os.fork() == 0:
            continue
        if os.fork() == 0:
            continue
        break
    time.sleep(0.5)
    return "parent"


@task
async def close_the_loop() -> None:
    asyncio.get_running_loop().close()


@task
async def new_loop() -> None:
    """As libraries that nest event loops do."""
    asyncio.get_event_loop().run_until_complete(asyncio.sleep(1))


@task
async def leave_a_task() -> str:
    asyncio.get_running_loop().create_task(asyncio.sleep(3600))
    return "left"


@task
async def cancel_all() -> None:
    """Cancels everything that it finds on its loop."""
    for one in asyncio.all_tasks():
        one.cancel()
    await asyncio.sleep(1)


@task(timeout_seconds=1)
async def never_late() -> None:
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(600)


@task(timeout_seconds=1)
async def sleep_on_in_other_threads(count: int = 1) -> None:
    await asyncio.gather(*(asyncio.to_thread(time.sleep, 3600) for _ in range(count)))


@task
async def exit_in_a_thread_of_its_own() -> None:
    threading.Timer(0.2, os._exit, (7,)).start()
    await asyncio.sleep(60)


@task
def keep_the_lock_of_logs(seconds: float = 3600) -> None:
    """And beside it others log."""
    with logging.getLogger().handlers[0].lock or contextlib.nullcontext():
        time.sleep(seconds)


@task
async def logs() -> str:
    await asyncio.sleep(0.5)
    logging.getLogger("logs").warning("a line")
    return "logged"


@task
def threads(count: int = 200) -> str:
    for _ in range(count):
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return "started"


@task
async def unserialisable() -> Any:
    return threading.Lock()


@task
async def huge(megabytes: int = 20) -> str:
    return "h" * megabytes * 1_000_000


@task(retries=20, retry_delay_seconds=0)
def kills_after_retries(marks: str) -> None:
    """Fails three times, then kills its process; `marks` is a file that counts."""
    with Path(marks).open("a+") as file:
        file.write("x")
        file.seek(0)
        count = len(file.read())
    if count % 4 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("again")


@task
async def secrets() -> dict[str, str]:
    """Everything that a thief would look at."""
    found = {"environ": "\n".join(f"{name}={value}" for name, value in os.environ.items())}
    for pid in ("self", str(os.getppid())):
        try:
            found[f"environ of {pid}"] = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        except OSError as error:
            found[f"environ of {pid}"] = type(error).__name__
        with contextlib.suppress(OSError):
            found[f"cmdline of {pid}"] = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    found["descriptors"] = "\n".join(_target(each) for each in Path("/proc/self/fd").iterdir())
    return found


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


def _spinning_key(*_: Any) -> str:
    while True:
        pass


@task(cache_key_fn=_spinning_key)
async def spin_in_the_key() -> None:
    """Not reached."""


@options(isolation="process")
@task(timeout_seconds=1)
def sleep_on_apart(seconds: float = 3600) -> None:
    time.sleep(seconds)


@options(isolation="process")
@task
async def crash_apart() -> None:
    ctypes.string_at(0)


@options(isolation="process")
@task
async def who_apart() -> int:
    return os.getpid()


@options(may_block=60)
@task
async def block_with_leave(seconds: float) -> str:
    time.sleep(seconds)
    return "blocked"


@options(may_block=3600)
@task
async def wait_with_leave() -> None:
    await asyncio.sleep(3600)


@task
def connect(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


@task
def relies() -> list[str]:
    """What of its process is not as a run may expect."""
    print("it prints")
    logging.getLogger("relies").warning("it logs")
    wrong = list[str]()
    with contextlib.suppress(DeprecationWarning):
        warnings.warn("it warns", DeprecationWarning, stacklevel=1)
        wrong.append("")
    wrong = [] if wrong else ["a warning is an error"]
    thread = threading.Thread(target=time.sleep, args=(0,))
    thread.start()
    thread.join()
    with Path(os.devnull).open("rb") as file, socket.socket() as own:
        wrong += ["a standard stream has no file"] if min(file.fileno(), own.fileno()) < 3 else []
        wrong += ["sockets have a time-out"] if own.gettimeout() is not None else []
    wrong += ["the folder is gone"] if not Path.cwd().exists() else []
    wrong += ["no PATH"] if "PATH" not in os.environ else []
    wrong += ["threads seldom switch"] if sys.getswitchinterval() > 1 else []
    wrong += ["no garbage is collected"] if not gc.isenabled() else []
    wrong += ["an alarm is set"] if any(signal.getitimer(each)[0] for each in TIMERS) else []
    wrong += ["a signal is handled"] if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL else []
    wrong += ["a lost connection ends the process"] if signal.getsignal(signal.SIGPIPE) is signal.SIG_DFL else []
    wrong += ["what children return is lost"] if subprocess.run(["false"]).returncode != 1 else []
    with tempfile.TemporaryFile() as file:
        file.write(bytes(100_000))
    wrong += ["nothing can be imported"] if find_spec("wave") is None else []
    wrong += ["threads are traced"] if threading.gettrace() or threading.getprofile() else []
    wrong += ["another locale"] if locale.setlocale(locale.LC_NUMERIC) != "C" else []
    wrong += ["little recursion"] if sys.getrecursionlimit() < 500 else []
    wrong += [f"no {name}" for name in ("stdout", "stderr") if getattr(sys, name, None) is None]
    return wrong


@task
async def relies_on_the_loop() -> list[str]:
    loop, wrong = asyncio.get_running_loop(), list[str]()
    wrong += ["no task factory"] if loop.get_task_factory() is None else []
    wrong += ["an exception handler"] if loop.get_exception_handler() is not None else []
    wrong += ["debug mode"] if loop.get_debug() else []
    wrong += ["a trace function"] if sys.gettrace() or sys.getprofile() else []
    wrong += ["signals are blocked"] if signal.pthread_sigmask(signal.SIG_BLOCK, ()) else []
    try:
        await asyncio.to_thread(str)
    except RuntimeError:
        wrong.append("no threads")
    process = await asyncio.create_subprocess_exec("false")
    wrong += ["what children return is lost"] if await process.wait() != 1 else []
    return wrong


@task
def close_streams() -> str:
    sys.stdout.close()
    sys.stderr.close()
    return "rude"


@task
def replace_streams() -> str:
    sys.stdout = sys.stderr = None  # type: ignore[assignment]
    return "rude"


@task
def leave_a_closed_stream() -> str:
    sys.stdout = io.StringIO()
    sys.stdout.close()
    return "rude"


@task
def delete_streams() -> str:
    del sys.stdout, sys.stderr
    return "rude"


@task
def close_descriptors_of_streams() -> str:
    with os.fdopen(1, "wb"):
        pass
    os.close(2)
    return "rude"


@task
def empty_lists() -> str:
    warnings.filters = None  # type: ignore[assignment]
    logging.getLogger().handlers = None  # type: ignore[assignment]
    return "rude"


@task
def forbid_recursion() -> str:
    sys.setrecursionlimit(200)
    return "rude"


@task
async def handle_signals() -> str:
    for number in signal.valid_signals() - UNHANDLED:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGPIPE else lambda *_: sys.exit(3))
    return "rude"


UNHANDLED = {
    *(signal.SIGKILL, signal.SIGSTOP),
    *(signal.SIGCHLD, signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL),
}


@task
async def ignore_children() -> str:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    return "rude"


@task
def set_time_out() -> str:
    socket.setdefaulttimeout(0.001)
    return "rude"


@task
async def redirects(folder: str) -> str:
    """Takes what it prints for itself, and goes on while others end."""

    async def may_print() -> bool:
        return (Path(folder) / "print").exists()

    taken = io.StringIO()
    with contextlib.redirect_stdout(taken):
        (Path(folder) / "redirected").touch()
        await until(may_print)
        print("mine")
    return taken.getvalue()


@task
def make_errors_of_warnings() -> str:
    warnings.simplefilter("error")
    return "rude"


@task
def switch_seldom() -> str:
    sys.setswitchinterval(100)
    gc.disable()
    return "rude"


@task
def remove_the_hook() -> str:
    threading.excepthook = sys.excepthook = None  # type: ignore[assignment]
    return "rude"


class Exits(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002
        sys.exit(3)


@task
def filter_logs() -> str:
    for handler in logging.getLogger().handlers:
        handler.addFilter(Exits())
    return "rude"


class Raises(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002
        raise RuntimeError("not here")


@task
def log_to_nowhere() -> str:
    logging.getLogger().addHandler(Raises())
    logging.setLogRecordFactory(_raises)
    return "rude"


@task
def remove_the_folder() -> str:
    folder = Path("gone").resolve()
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    os.environ.clear()
    return "rude"


@task
async def set_an_alarm() -> str:
    """Its handler raises in whatever the loop does then."""
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(3))
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    signal.setitimer(signal.ITIMER_PROF, 0.5)
    return "rude"


def _raises(*_: Any) -> None:
    raise RuntimeError("not here")


@task
async def change_the_loop() -> str:
    loop = asyncio.get_running_loop()
    loop.set_task_factory(None)
    loop.set_exception_handler(_raises)
    loop.set_debug(True)
    with ThreadPoolExecutor(1) as pool:
        loop.set_default_executor(pool)
    await loop.shutdown_default_executor()
    return "rude"


@task
async def trace_all() -> str:
    threading.settrace(_raises)
    threading.setprofile(_raises)
    sys.setprofile(lambda *_: None)
    return "rude"


@task
async def trace_new_threads(folder: str) -> str:
    """For as long as it runs."""

    async def may_end() -> bool:
        return (Path(folder) / "end").exists()

    threading.settrace(_raises)
    (Path(folder) / "traced").touch()
    await until(may_end)
    return "rude"


@task
def change_the_locale() -> str:
    locale.setlocale(locale.LC_NUMERIC, "C.UTF-8")
    return "rude"


@task
async def block_signals() -> str:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    return "rude"


@task
def clear_the_import_path() -> str:
    sys.path.clear()
    sys.path_importer_cache.clear()
    return "rude"


@task
def limit_file_sizes() -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    return "rude"


@task
def limit_memory() -> str:
    resource.setrlimit(resource.RLIMIT_AS, (100_000_000, resource.RLIM_INFINITY))
    return "rude"


@task
def limit_files() -> str:
    """For good: what is limited hard can't be raised again."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    return "rude"


@task
def empty_files() -> str:
    """Those without a name that it finds open."""
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").endswith("(deleted)"):  # noqa: PTH115
                os.ftruncate(number, 0)
    return "rude"


@task
def remove_the_temporary_folder() -> None:
    folder = Path(tempfile.gettempdir())
    assert folder.name == "temporary", "that of a test"
    shutil.rmtree(folder)
    os._exit(7)


_kept_open = list[int]()


@task
def keep_files_open(fuse: str = "") -> str:
    """All that there may be; once this file is there, if it is given."""
    while fuse and not Path(fuse).exists():
        time.sleep(0.05)
    _kept_open.append(os.open(os.devnull, os.O_RDONLY))
    with contextlib.suppress(OSError):
        while True:
            _kept_open.append(os.open(os.devnull, os.O_RDONLY))
    return "rude"


@task
def interrupt_the_loop() -> str:
    for _ in range(30):
        _thread.interrupt_main()
        time.sleep(0.02)
    return "interrupted"


@task
async def fork_in_the_loop() -> str:
    return "child" if os.fork() == 0 else "parent"


@task
async def fork_and_wait_in_the_loop() -> str:
    pid = os.fork()
    await asyncio.sleep(0.3)
    return "child" if pid == 0 else "parent"


@task
def fork_in_a_thread() -> str:
    return "child" if os.fork() == 0 else "parent"


@task
def fork_while_it_reports() -> int:
    """Another thread of it is often in the middle of a report, and its children report as well."""
    is_over, context = threading.Event(), contextvars.copy_context()

    def report() -> None:
        while not is_over.is_set():
            progress(0.5, "x" * 500)

    thread = threading.Thread(target=context.run, args=(report,))
    thread.start()
    children = [multiprocessing.get_context("fork").Process(target=progress, args=(0.6,)) for _ in range(30)]
    for child in children:
        child.start()
    for child in children:
        child.join(20)
    is_over.set()
    return sum(child.is_alive() for child in children)


@task
async def fork_in_a_callback() -> str:
    asyncio.get_running_loop().call_soon(os.fork)
    await asyncio.sleep(1)
    return "parent"


@task
async def fork_and_exit_in_a_callback() -> str:
    asyncio.get_running_loop().call_soon(lambda: os.fork() or sys.exit())
    await asyncio.sleep(1)
    return "parent"


@task
async def note_steps(folder: str) -> int:
    """A neighbour whose steps can be counted."""
    step = 0
    while not (Path(folder) / "end").exists():
        with (Path(folder) / "steps").open("a") as notes:
            notes.write(f"{step}\n")
        step += 1
        await asyncio.sleep(0.05)
    return step


class Unreadable(Exception):
    """Nothing of it can be read."""

    def __str__(self) -> str:
        raise KeyboardInterrupt

    __repr__ = __str__

    @property
    def __traceback__(self) -> Any:
        raise SystemExit

    __cause__ = __context__ = __traceback__  # type: ignore[assignment]


@task
async def unreadable() -> None:
    raise Unreadable


def _exiting_key(*_: Any) -> str:
    sys.exit(3)


@task(cache_key_fn=_exiting_key)
async def exit_in_the_key() -> None:
    """Not reached."""


@task
def stop_iteration() -> None:
    raise StopIteration(3)


@task
async def group_of_exits() -> None:
    raise BaseExceptionGroup("all at once", [KeyboardInterrupt(), SystemExit(3)])


@task
async def nested() -> Any:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


@task
async def send_garbage(megabytes: int = 0) -> None:
    """Into whatever socket it finds."""
    sockets = list[int]()
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):  # noqa: PTH115
                sockets.append(number)
                os.write(number, b"\xff" * 64)
    for _ in range(16 * megabytes):
        for number in sockets:
            with contextlib.suppress(OSError):
                os.write(number, bytes(1 << 16))
        await asyncio.sleep(0)
    await asyncio.sleep(60)
