"""`backcast up`: the whole product on one machine, in one terminal, on loopback, with one folder for all its data.

Decides the order in which the processes start and stop, their ports, and the lines that a person sees. The processes
are the same as elsewhere, and differ in their settings only. Knows nothing of runs.
"""

import asyncio
import contextlib
import io
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from backcast import client
from backcast.errors import BackcastError, ConfigurationError, LedgerUnavailable, Unavailable
from backcast.ledger import pauses, provisioning
from backcast.ledger.connection import Ledger
from backcast.ledger.migration import migrate
from backcast.local import lock, postgres, weights
from backcast.local.child import Child
from backcast.local.ports import Ports, is_free
from backcast.models import CAST, PauseKind, PauseRequest
from backcast.process.stop import Stop
from backcast.settings import Settings, load
from backcast.store import open_store
from backcast.variables import KEY_VARIABLE, URL_VARIABLE

GRACE = 10
"""Seconds that running work may go on after Ctrl-C, before it is released."""
_OURS = "backcast up"
"""Who pauses casts while there is no model."""
_EXAMPLE = "We put 31 chairs in the hall"
_STYLES = {
    "backcast": "bold",
    "postgres": "blue",
    "api": "green",
    "steward": "cyan",
    "worker": "magenta",
    "model": "yellow",
    "prefect": "bright_blue",
}
_WIDTH = max(map(len, _STYLES))
_PORT_OPTIONS = {"api": "--port", "prefect": "--prefect-port", "model": "BACKCAST_MODEL__PORT"}
_PORT_PATIENCE = 3.0
"""Seconds in which a process of ours that was killed lets go of its port."""
_LAST_PORT = (1 << 16) - 1
_HEALTH = {"model": "/health", "prefect": "/api/health"}  # the others have /readyz


def up(
    *,
    data: Path,
    model: str | None = None,
    no_model: bool = False,
    port: int = 8000,
    prefect_port: int = 4200,
    slots: int | None = None,
) -> int:
    """Run everything until Ctrl-C, SIGTERM or SIGHUP, and return the exit code.

    Raises:
        BackcastError: it can't be started; the sentence names the change to make.
    """
    if slots is not None:
        os.environ["BACKCAST_WORKER__SLOTS"] = str(slots)

    if model is not None:
        os.environ["BACKCAST_MODEL__SIZE"] = model

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character

    async def run() -> None:
        await _Up(folder, load(), port=port, prefect_port=prefect_port, model=not no_model).run()

    with _alone(folder := data.expanduser().resolve()):
        asyncio.run(run())
    return 0


PREFECT_SERVER = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    # A stock server records each event by itself; those that it could not record while its database was away come one
    # each five seconds, and one with each new event: for hours after a storm.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "50",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    # Less CPU per run: these services serve flows, automations and the feed of raw events only.
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "false",
}
"""What a Prefect server of ours is set to, here as in the chart."""


class _Terminal(Console):
    """Loses its lines when its terminal or its pipe is gone, and no more: the drain goes on."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            del self._buffer[:]


class _Up:
    def __init__(self, data: Path, settings: Settings, *, port: int, prefect_port: int, model: bool) -> None:
        self._began = time.monotonic()
        self._console = _Terminal(highlight=False, soft_wrap=True)
        self._data = data
        self._model = settings.model
        self._weights = weights.MODELS[settings.model.size]
        self._key = settings.api.keys[0].get_secret_value() if settings.api.keys else None
        here = {"url": f"file://{data}/store"}
        self._store = settings.store if "BACKCAST_STORE__URL" in os.environ else settings.store.model_copy(update=here)
        self._serves_model = model and settings.model.embedded
        ours = "embedded" if self._serves_model or self._model.base_url else "none"
        self._backend = ours if self._model.embedded else self._model.backend
        self._stop = Stop()
        self._http = httpx.AsyncClient(trust_env=False, timeout=2)
        self._ports: dict[str, int] = {}
        self._taken = Ports()
        wanted = {"api": port, "worker": settings.worker.port, "steward": settings.steward.port}
        wanted["prefect"] = prefect_port
        wanted |= {"model": settings.model.port} if self._serves_model else {}
        for name, number in wanted.items():
            others = {*wanted.values(), *self._ports.values()} - ({number} - {*self._ports.values()})
            self._ports[name] = got = self._taken.take(number, others)
            if got != number != 0:
                self._show(name, f"port {number} is taken, using {got}", "yellow")
        self._private = {"api", "worker", "steward"}
        """The processes whose ports nobody has been told yet."""
        self._failure: BaseException | None = None
        defaults = {"BACKCAST_STORE__URL": self._store.url, "BACKCAST_STEWARD__KEEP_HISTORY": "P30D"}
        defaults["BACKCAST_API__METRICS_PORT"] = "0"  # no other program can take it before the API does
        self._environ = defaults | os.environ | self._variables()
        # The user's own Prefect settings may name another database. Prefect also reads them from files in its folder.
        not_prefects = {name: text for name, text in os.environ.items() if not name.upper().startswith("PREFECT_")}
        python = [sys.executable, "-m"]
        commands: dict[str, Callable[[], list[str]]] = {
            name: lambda name=name: [*python, "backcast", name] for name in ("worker", "api", "steward", "model")
        }
        serve = [*python, "prefect", "server", "start", "--host=127.0.0.1", f"--port={self._ports['prefect']}"]
        commands |= {"postgres": partial(postgres.command, data / "postgres"), "prefect": lambda: serve}
        self._children = {
            name: Child(
                name,
                command,
                not_prefects | self._variables() if name == "prefect" else self._environ,
                data / "log" / f"{name}.log",
                self._show,
                prepare=partial(self._secure_port, name),
                give_up=self._fail,
                folder=data if name == "prefect" else None,
            )
            for name, command in commands.items()
        }
        self._children["postgres"].stop_by = signal.SIGINT

    async def run(self) -> None:
        starting = asyncio.create_task(self._start())
        starting.add_done_callback(lambda it: it.cancelled() or (it.exception() and self._fail(it.exception())))
        await self._stop.asked.wait()
        starting.cancel()
        await asyncio.wait([starting])
        await self._drain()
        await self._http.aclose()
        self._taken.release()
        if self._failure is not None:
            raise self._failure

    def _fail(self, failure: BaseException | None) -> None:
        """Stop everything; the first failure is the reason."""
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
        self._failure = self._failure or failure
        self._stop.asked.set()

    async def _start(self) -> None:
        await asyncio.to_thread(postgres.prepare, self._data / "postgres")
        await self._bring_up("postgres")
        for name in ("backcast", "prefect"):
            await asyncio.to_thread(provisioning.create_database, self._database("postgres"), name)
        await asyncio.to_thread(migrate, self._database("backcast"))
        async with contextlib.aclosing(open_store(self._store)) as store:
            await store.ensure()
        async with asyncio.TaskGroup() as group:
            model = group.create_task(self._start_model())
            await asyncio.gather(*map(self._bring_up, ("worker", "api", "steward")))
            (self._data / "url").write_text(f"{self._url('api')}\n")
            self._welcome()
            group.create_task(self._start_prefect())  # last: it takes longest, and nothing else waits for it
            await model
            if self._serves_model or not self._model.embedded:
                await self._prove()

    async def _bring_up(self, name: str) -> None:
        """Start a process and wait until it can be used."""
        self._children[name].start()
        patience = time.monotonic() + 30
        while why := await self._why_not_ready(name):
            if time.monotonic() > patience:
                self._show(name, f"is still not ready: {why}", "yellow")
                patience += 30
            await asyncio.sleep(0.05)

    async def _secure_port(self, name: str) -> None:
        """Before a start: another program may have taken the port while nothing of ours listened on it.

        Raises:
            ConfigurationError: it has, and others already know this port.
        """
        port = self._ports.get(name)
        patience = time.monotonic() + _PORT_PATIENCE
        while port is not None and not is_free(port):
            if time.monotonic() < patience:
                await asyncio.sleep(0.05)
            elif name in self._private:
                new = self._ports[name] = self._taken.take(port + 1 if port < _LAST_PORT else 1024)
                self._environ[f"BACKCAST_{name.upper()}__PORT"] = str(new)
                self._show(name, f"another program has taken port {port}, using {new}", "yellow")
                return
            else:
                raise ConfigurationError(
                    f"Another program has taken port {port} of {name}: stop it, or choose another port by"
                    f" {_PORT_OPTIONS[name]}."
                )

    async def _why_not_ready(self, name: str) -> str | None:
        if name == "postgres":
            return await asyncio.to_thread(provisioning.why_not_ready, self._database("postgres"))
        url = self._url(name) + _HEALTH.get(name, "/readyz")
        try:
            response = await self._http.get(url)
        except httpx.HTTPError as error:
            return f"{url} does not answer ({type(error).__name__})"
        if not response.is_success:
            return f"{url} answers {response.status_code} {response.text[:200]}"
        if not await asyncio.to_thread(self._children[name].listens, self._ports[name]):
            return f"another program answers on port {self._ports[name]}: stop it, or choose another port"
        return None

    async def _start_prefect(self) -> None:
        await self._bring_up("prefect")
        self._show("prefect", f"is up: {self._url('prefect')}")

    async def _start_model(self) -> None:
        is_missing = (
            self._serves_model
            and self._model.weights is None
            and self._model.base_url is None
            and weights.find(self._model.cache, self._weights) is None
        )
        await self._pause_casts(is_missing)
        if not self._serves_model:
            return
        while is_missing and not await asyncio.to_thread(self._fetch):  # noqa: ASYNC110  # there is no event for the network's return
            await asyncio.sleep(60)
        await self._pause_casts(False)
        await self._bring_up("model")

    async def _pause_casts(self, is_paused: bool) -> None:
        """Pause casts while there is no model for them, or end our pause, perhaps of an earlier start. Somebody else's
        stays."""
        while True:
            with contextlib.suppress(LedgerUnavailable):
                async with contextlib.aclosing(Ledger(self._database("backcast"), pool=1, name=_OURS)) as ledger:
                    there = await pauses.of(ledger, PauseKind.TASK, CAST)
                    if is_paused and there is None:
                        asked = PauseRequest(reason="The model's file is not here yet.", by=_OURS)
                        await pauses.pause(ledger, PauseKind.TASK, CAST, asked)
                    elif there is not None and there.by == _OURS and not is_paused:
                        await pauses.resume(ledger, PauseKind.TASK, CAST)
                    return
            await asyncio.sleep(1)

    def _fetch(self) -> bool:
        """Download the model's file, in a thread; whether it is there now."""
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True) as bars:
            bar, show = bars.add_task("", total=None), bars.update

            def progress(done: int, total: int, source: str) -> None:
                if self._stop.asked.is_set():
                    raise Unavailable("The download was interrupted; the next one goes on.")
                show(bar, completed=done, total=total, description=f"{'model':>{_WIDTH}} │ from {source}")

            try:
                weights.fetch(self._model.cache, progress, self._weights)
            except BackcastError as error:
                self._show("model", error.detail, "red")
                return False
        return True

    async def _prove(self) -> None:
        began = time.monotonic()
        words = _EXAMPLE.replace("31", str(random.randint(11, 99)))  # noqa: S311  # anew: not from the cache
        try:
            async with client.AsyncClient(self._url("api"), headers=client.authorization(self._key)) as service:
                answer = await service.cast(words, "int", timeout=300)
        except BackcastError as error:
            self._show("backcast", f"the first cast has failed: {error.detail}", "red")
        else:
            self._show("backcast", f"“{words}” → int → {answer} ({time.monotonic() - began:.1f} s)", "green")

    async def _drain(self) -> None:
        self._show("backcast", f"draining: running work has {GRACE} s; Ctrl-C again releases it at once")
        (self._data / "url").unlink(missing_ok=True)
        children = dict(self._children)
        hurry = asyncio.create_task(self._hurry())
        await children.pop("worker").stop(GRACE + 2)
        hurry.cancel()
        prefect, database = children.pop("prefect"), children.pop("postgres")
        await asyncio.gather(*(child.stop(3) for child in children.values()))
        await prefect.stop(3)  # after the others have published their last history
        await database.stop(10)
        self._show("backcast", "stopped")

    async def _hurry(self) -> None:
        await self._stop.at_once.wait()
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._children["worker"].send(number)
            await asyncio.sleep(2)

    def _welcome(self) -> None:
        """Print the addresses and the next steps; lines to paste stand outside the panel, away from its border."""
        it = self._weights
        model = (
            f"{it.name}, {it.size / 1e6:.0f} MB, {it.licence} (loading)\ndemo quality; kept in {self._model.cache}; "
        )
        model += "--no-model does without"
        if not self._model.embedded:
            model = f"{self._model.name}, by your provider"
        elif not self._serves_model:
            model = "none: casts fail at once; BACKCAST_MODEL__API_KEY uses a provider's"
        table = Table.grid(padding=(0, 2))
        self._private.discard("api")
        table.add_row("Console", f"{self._url('api')}/console")
        table.add_row("API", f"{self._url('api')}/docs")
        table.add_row("Prefect", f"{self._url('prefect')} (starting)")
        table.add_row("Model", model)
        table.add_row("Data", str(self._data))
        title = f"backcast is up ({time.monotonic() - self._began:.1f} s)"
        self._console.print(Panel.fit(table, title=title, border_style="green"))
        is_usual = self._data == Path(".backcast").resolve() and self._url("api") == client.DEFAULT_URL
        where = "" if is_usual else f"{URL_VARIABLE}={self._url('api')} "
        header = ""
        if self._key is not None:  # or the lines would be answered 401
            header = f"-H {shlex.quote(f'Authorization: Bearer {self._key}')} "
            where = f"{KEY_VARIABLE}={shlex.quote(self._key)} {where}"
        self._console.print(f"  curl {header}{self._url('api')}/tasks -d target_type=int -d payload='{_EXAMPLE}'")
        self._console.print(f"  {where}backcast cast '{_EXAMPLE}' --to int")

    def _show(self, name: str, words: str, style: str = "") -> None:
        self._console.print(Text.assemble((f"{name:>{_WIDTH}} │ ", _STYLES[name]), (words, style)))

    def _url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._ports[name]}"

    def _database(self, name: str) -> str:
        return postgres.url(self._data / "postgres", name)

    def _variables(self) -> dict[str, str]:
        ours = {name: port for name, port in self._ports.items() if name != "prefect"}
        prefect = f"{self._url('prefect')}/api"
        direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        if direct != "*":  # HTTP clients exempt no address by themselves, not even one of this machine
            direct = ",".join(filter(None, (direct, "127.0.0.1", "localhost")))
        return {f"BACKCAST_{name.upper()}__PORT": str(port) for name, port in ours.items()} | {
            "BACKCAST_DATABASE__URL": self._database("backcast"),
            "BACKCAST_MODEL__BACKEND": self._backend,
            **({KEY_VARIABLE: self._key} if self._key is not None else {}),  # for tasks that submit runs
            URL_VARIABLE: self._url("api"),
            "BACKCAST_API__PREFECT_UI": self._url("prefect"),
            "BACKCAST_PREFECT__API_URL": prefect,
            "BACKCAST_WORKER__GRACE": f"PT{GRACE}S",
            "NO_PROXY": direct,
            "no_proxy": direct,
            "PREFECT_HOME": str(self._data / "prefect"),
            "PREFECT_API_DATABASE_CONNECTION_URL": self._database("prefect").replace(":", "+asyncpg:", 1),
            "PREFECT_UI_API_URL": prefect,
            # Otherwise it writes into the folder where it is installed.
            "PREFECT_UI_STATIC_DIRECTORY": str(self._data / "prefect" / "ui"),
            # Otherwise any web page may read and change the history.
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{self._url('prefect')},http://localhost:{self._ports['prefect']}",
            **PREFECT_SERVER,
        }


@contextlib.contextmanager
def _alone(data: Path) -> Iterator[None]:
    """Lock the folder, so that no two of us use it at once."""
    with contextlib.ExitStack() as stack:
        try:
            (data / "log").mkdir(parents=True, exist_ok=True)
            (data / ".gitignore").write_text("*\n")
            stack.enter_context(lock.held(data / "lock"))
        except BlockingIOError:
            raise ConfigurationError(f"backcast is already up on {data}: stop it, or choose another --data.") from None
        except OSError as error:
            raise ConfigurationError(
                f"{data} can't be used ({error.strerror}): choose another folder by --data."
            ) from None
        yield
