"""The command line for scripts and people: its output on stdout and stderr, and its exit codes."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from typer.testing import CliRunner, Result

from backcast.cli import service as service_of_the_command_line
from backcast.cli.arguments import FILTERS
from backcast.cli.main import app
from tests.support.waiting import PATIENCE
from tests.unit.test_client import Service

Cli = Callable[..., Result]


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.chdir(tmp_path)
    with Service() as running:
        monkeypatch.setenv("BACKCAST_URL", running.url)
        yield running


@pytest.fixture
def cli(service: Service) -> Cli:
    def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, arguments, input=stdin)

    return run


def fails(result: Result, code: int, sentence: str) -> None:
    """The exit code, one readable sentence on stderr, nothing on stdout and no traceback."""
    assert (result.exit_code, result.stdout) == (code, "")
    assert sentence in " ".join(result.stderr.replace("│", " ").split())
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (31, "31\n"),
        ("a [b]\n[/c]", "a [b]\n[/c]\n"),
        (True, "true\n"),
        (["é", 1.5], '[\n  "é",\n  1.5\n]\n'),
        ("x" * 200, "x" * 200 + "\n"),
        (["x" * 200], '[\n  "' + "x" * 200 + '"\n]\n'),
        (None, "null\n"),
    ],
)
def test_cast_prints_the_value(cli: Cli, service: Service, value: Any, plain: str) -> None:
    service.result = value
    result = cli("cast", "twelve boxes, two broken", "--to", "int")
    assert (result.stdout, result.stderr, result.exit_code) == (plain, "", 0)
    assert json.loads(cli("cast", "twelve boxes", "--to", "int", "--json").stdout) == value


@pytest.mark.parametrize(
    "name", ["BACKCAST_ULR", "BACKCAST_URI", "backcast_url", "BACKCAST_APIKEY", "BACKCAST_API_KEYS"]
)
def test_a_misspelt_variable_is_refused(cli: Cli, service: Service, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("BACKCAST_API__KEYS", "those of the service")
    monkeypatch.setenv("BACKCAST_TASKS", "shop")
    assert cli("tasks").exit_code == 0
    monkeypatch.setenv(name, "x")
    fails(cli("tasks"), 2, f"{name} is not read. Did you mean BACKCAST_")


@pytest.mark.parametrize(
    ("to", "target"),
    [("int", "int"), ("list[str]", "list[str]"), ('{"type": "object"}', {"type": "object"}), ("@s.json", {"a": 1})],
)
def test_cast_takes_a_name_a_schema_or_a_file(cli: Cli, service: Service, to: str, target: Any) -> None:
    Path("s.json").write_text('{"a": 1}')
    assert cli("cast", "-", "--to", to, "--instructions", "count", stdin="from stdin").exit_code == 0
    assert service.seen[0].body["input"] == {"data": "from stdin", "target": target, "instructions": "count"}


@pytest.mark.parametrize(
    ("to", "sentence"), [("{", "not JSON"), ("@none.json", "none.json can't be read: No such file")]
)
def test_a_target_that_can_not_be_read(cli: Cli, service: Service, to: str, sentence: str) -> None:
    fails(cli("cast", "x", "--to", to), 2, sentence)
    assert service.seen == []


def test_stdin_that_is_no_text(cli: Cli) -> None:
    fails(cli("cast", "-", "--to", "int", stdin=b"\xff\xfe"), 2, "stdin is not text")


def test_submit_prints_the_id_and_nothing_else(cli: Cli, service: Service) -> None:
    run_id = cli("submit", "add", "a=1", "b=NaN", "name=ana", "flag=true", "e=", "eq=x=y").stdout.strip()
    assert UUID(run_id)
    assert service.seen[0].body["input"] == {"a": 1, "b": "NaN", "name": "ana", "flag": True, "e": "", "eq": "x=y"}


def test_submit_passes_its_options_on(cli: Cli, service: Service) -> None:
    Path("in.json").write_text('{"a": 1, "b": 2}')
    options = ("--owner", "ana", "--priority", "-5", "--run-at", "2030-01-31T08:00Z", "--key", "k", "--json")
    options = (*options, "--deadline", "2030-02-01T00:00Z", "--lane", "gpu")
    run = json.loads(cli("submit", "add", "--input", "@in.json", "b=3", *options).stdout)
    sent = service.seen[0]
    assert (run["owner"], sent.headers["idempotency-key"]) == ("ana", "k")
    assert (sent.body["input"], sent.body["priority"]) == ({"a": 1, "b": 3}, -5)
    assert sent.body["run_at"].startswith("2030-01-31T")
    assert (sent.body["lane"], sent.body["deadline"][:4]) == ("gpu", "2030")
    assert cli("submit", "add", "--input", "@-", "--wait", stdin='{"a": 1}').stdout == "31\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("submit", "add", "a"), "'a' is not KEY=VALUE"),
        (("submit", "add", "--input", "[1]"), "a JSON object is wanted"),
        (("submit", "add", "--input", '{"a": ' + "[" * 9000), "this is not JSON"),
        (("submit", "add", "--input", '{"a": NaN}'), "this is not JSON"),
        (("submit", "add", "--run-at", "soon"), "a time is wanted"),
        (("submit", "add", "--run-at", "9999-12-31T23:59:59-05:00"), "outside of the years 1 to 9999"),
        (("submit", "add", "--deadline", "0001-01-01T00:00:00+05:00"), "outside of the years 1 to 9999"),
        (("pause", "task", "add", "--until", "9999-12-31T23:59:59-05:00"), "outside of the years 1 to 9999"),
        (("list", "--where", "created_before=9999-12-31T23:59:59-05:00"), "outside of the years 1 to 9999"),
        (("submit", "add", "--priority", "1000"), "--priority"),
        (("submit", "add", "--key", "zwölf"), "printable ASCII"),
        (("submit", "unknown"), "No worker has registered unknown."),
        (("submit", "add", "a=wrong"), "/input/a: not a number. /input/b: missing"),
        (("get", "7"), "ID"),
        (("get", str(UUID(int=7))), "There is no such run."),
        (("get", str(UUID(int=7)), "--result", "--json"), "There is no such run."),
        (("list", "--state", "lost"), "completed"),
        (("tasks", "--url", "localhost"), "write it as http://host:port"),
    ],
)
def test_wrong_usage_and_refusals_are_2(cli: Cli, arguments: tuple[str, ...], sentence: str) -> None:
    fails(cli(*arguments), 2, sentence)


def test_a_missing_key_is_asked_for_by_its_variable(cli: Cli, service: Service) -> None:
    document = {"title": "A key is needed", "code": "unauthorized", "detail": "Send a key of this service."}
    service.troubles.append((401, "application/problem+json", document))
    fails(cli("tasks"), 2, "The service asks for a key: set BACKCAST_API_KEY to one of its keys.")


@pytest.mark.parametrize("key", ["a-key-in\r\ntwo-lines", "ключ-ключ-ключ-ключ"], ids=repr)
def test_a_key_that_no_header_carries_is_named_and_not_shown(
    cli: Cli, service: Service, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("BACKCAST_API_KEY", key)
    result = cli("tasks")
    fails(result, 2, "The key (BACKCAST_API_KEY) can't be sent")
    assert not any(part in result.stderr for part in key.split())
    assert service.seen == []


def test_a_failed_run_is_1(cli: Cli, service: Service) -> None:
    service.states = ("queued", "failed")
    service.error = {"code": "unusable_input", "title": "No", "detail": "there is no number"}
    fails(cli("cast", "x", "--to", "int"), 1, "failed: there is no number")
    fails(cli("submit", "add", "--wait", "--json"), 1, "failed: there is no number")
    run_id = service.add_run()
    waited = cli("wait", run_id, "--json")
    assert (waited.exit_code, json.loads(waited.stdout)["error"]["code"]) == (1, "unusable_input")
    assert "there is no number" in waited.stderr
    fails(cli("get", run_id, "--result"), 1, "The run is failed")
    assert cli("get", run_id).exit_code == 0


def test_no_service_is_3(cli: Cli) -> None:
    fails(cli("list", "--url", "http://127.0.0.1:1"), 3, "http://127.0.0.1:1 can't be reached")


def test_time_is_up_is_3(cli: Cli, service: Service) -> None:
    service.states = ("running",)
    fails(cli("wait", service.add_run(), "--timeout", "0.1"), 3, "is still running after 0.1 s; it goes on")


def test_get_shows_a_run(cli: Cli, service: Service) -> None:
    run_id = service.add_run(metadata={"state": "mine"}, error={"code": "c", "title": "t", "detail": "d"})
    shown = dict(line.split("\t") for line in cli("get", run_id).stdout.splitlines())
    assert (shown["id"], shown["state"], shown["error"], shown["metadata.state"]) == (
        run_id,
        "running",
        "c: d",
        "mine",
    )
    assert json.loads(cli("get", run_id, "--json").stdout)["state"] == "completed"
    assert cli("get", run_id, "--result").stdout == "31\n"


def test_list_is_for_scripts_when_it_is_not_on_a_terminal(cli: Cli, service: Service) -> None:
    ids = [service.add_run("a_task_with_quite_a_long_name_" * 4) for _ in range(3)]
    head, *rows = [line.split("\t") for line in cli("list", "--limit", "2", "--task", "x").stdout.splitlines()]
    assert head[:3] == ["ID", "TASK", "STATE"]
    assert [row[0] for row in rows] == ids[:2]
    assert service.seen[0].query == {"task": "x", "limit": "2"}
    assert [run["id"] for run in json.loads(cli("list", "--json").stdout)] == ids


def test_cancel(cli: Cli, service: Service) -> None:
    run_id = service.add_run()
    assert cli("cancel", run_id).stdout == f"Run {run_id} is cancelled.\n"


def test_counts(cli: Cli) -> None:
    shown = cli("counts")
    assert shown.stdout.splitlines() == [
        "TASK\tSUBMITTED\tQUEUED\tRUNNING\tCOMPLETED\tFAILED\tCANCELLED\tEXPIRED",
        "all\t2\t1\t0\t0\t1\t0\t0",
        "add\t2\t1\t0\t0\t1\t0\t0",
        "",
        "TASK\tERROR\tRUNS",
        "add\ttask_failed\t1",
    ]
    assert shown.stderr == ""
    assert "estimates" in cli("counts", "--within", "day").stderr
    assert json.loads(cli("counts", "--json").stdout)["errors"][0]["code"] == "task_failed"
    fails(cli("counts", "--within", "week"), 2, "week")


def test_lanes(cli: Cli) -> None:
    assert cli("lane", "gpu", "--max-running", "2").stdout.splitlines() == [
        "LANE\tMAX RUNNING\tMAX PER MINUTE\tRUNNING\tQUEUED\tHELD\tPAUSED",
        "gpu\t2\t\t0\t1\t3\t",
    ]
    assert cli("lane", "gpu", "--max-per-minute", "1.5").stdout.splitlines()[1] == "gpu\t\t1.5\t0\t1\t3\t"
    assert cli("lanes").stdout == cli("lane", "gpu").stdout
    assert json.loads(cli("lane", "gpu", "--json").stdout)["max_per_minute"] == 1.5
    assert [lane["name"] for lane in json.loads(cli("lanes", "--json").stdout)] == ["gpu"]
    fails(cli("lane", "gpu", "--lift", "--max-running", "1"), 2, "--lift can't be combined")
    fails(cli("lane", "gpu", "--max-per-minute", "0"), 2, "--max-per-minute")
    assert cli("lane", "gpu", "--lift").stdout == "The lane gpu has no limits any more.\n"
    fails(cli("lane", "gpu"), 2, "This lane has no limits.")


def test_retry_attempts_and_watch(cli: Cli, service: Service) -> None:
    run_id = service.add_run()
    new = cli("retry", run_id, "--priority", "3", "--input", '{"a": 5}').stdout.strip()
    assert service.runs[new]["retry_of"] == run_id
    assert service.seen[-1].body == {"input": {"a": 5}, "priority": 3}
    lines = cli("attempts", run_id).stdout.splitlines()
    assert lines[1].split("\t") == ["1", "retrying", "h", "", "task_failed"]
    assert lines[-2:] == ["Traceback", "ValueError"]
    ended = {"run": {"state": "failed", "error": {"code": "task_failed", "detail": "no"}}}
    events = [("started", {"attempt": 2}), ("progress", {"fraction": 0.4, "message": "page 12"}), ("ended", ended)]
    text = "".join(f"id: 1\nevent: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    service.streams += [text, text]
    assert cli("watch", run_id).stdout.splitlines() == [
        "started\tattempt 2",
        "progress\t40% page 12",
        "ended\tfailed task_failed: no",
    ]
    again = (
        "--metadata",
        "team=a",
        "--lane",
        "gpu",
        "--run-at",
        "2030-01-31T08:00Z",
        "--deadline",
        "2030-02-01T08:00Z",
    )
    cli("retry", run_id, *again)
    assert service.seen[-1].body == {
        "lane": "gpu",
        "metadata": {"team": "a"},
        "run_at": "2030-01-31T08:00:00Z",
        "deadline": "2030-02-01T08:00:00Z",
    }
    assert json.loads(cli("watch", run_id, "--json").stdout.splitlines()[0]) == {
        "event": "started",
        "data": {"attempt": 2},
    }


def _events(batch: dict[str, Any]) -> str:
    """Those of a batch."""
    half = {**batch, "states": {"completed": 1, "running": 1}}
    ended = {**batch, "states": {"completed": 1, "failed": 1}}
    runs = {"items": [{"id": str(UUID(int=7)), "state": "failed"}]}
    events = [("states", half), ("runs", runs), ("ended", ended)]
    return "".join(f"id: 1\nevent: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)


def test_a_batch_can_be_watched(cli: Cli, service: Service, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    batch = cli("batch", "submit", str(tmp_path / "rows.jsonl"), "--task", "add").stdout.strip()
    service.streams += [_events(service.batches[batch])] * 2
    assert cli("watch", batch).stdout.splitlines() == [
        "states\t1 completed, 1 running",
        f"runs\t{UUID(int=7)} failed",
        "ended\t1 completed, 1 failed",
    ]
    assert json.loads(cli("watch", batch, "--json").stdout.splitlines()[1])["event"] == "runs"


def test_labels_and_filters(cli: Cli, service: Service) -> None:
    cli("submit", "add", "a=1", "--metadata", "team=a", "--metadata", "note=x=y")
    assert service.seen[-1].body["metadata"] == {"team": "a", "note": "x=y"}
    given = {name: "failed" if name == "state" else str(UUID(int=1)) for name in FILTERS}
    given |= {name: "2030-01-31T08:00:00Z" for name in FILTERS if name.endswith(("_after", "_before"))}
    given["metadata.team"] = "a"
    where = [each for name, value in given.items() for each in ("--where", f"{name}={value}")]
    assert cli("list", *where).exit_code == 0
    assert service.seen[-1].query == {**given, "limit": "20"}
    fails(cli("list", "--where", "onwer=ana"), 2, "'onwer' is no filter. Did you mean owner?")
    fails(cli("list", "--where", "state=late"), 2, "state: ")
    fails(cli("submit", "add", "--metadata", "team"), 2, "'team' is not NAME=VALUE.")


def test_many_runs_are_cancelled_or_repeated(cli: Cli, service: Service) -> None:
    where = ("--where", "task=add", "--where", "metadata.team=a")
    for command in ("cancel", "retry"):
        assert cli(command, *where, "--dry-run").stdout == "5 runs\n"
        fails(cli(command, *where), 2, f"5 runs: add --yes to {command} them.")
        assert service.seen[-1].body["dry_run"]
        assert cli(command, *where, "--yes").stdout.startswith("1 ")
        sent = [seen for seen in service.seen if seen.path == f"/v1/runs/{command}"][-1].body
        assert sent == {"task": "add", "metadata": {"team": "a"}}
        assert json.loads(cli(command, *where, "--yes", "--json").stdout)["state"] == "completed"
        fails(cli(command), 2, "give the id of one run, or --where")
        fails(cli(command, str(uuid4()), *where), 2, "give the id of one run, or --where")
    fails(cli("retry", *where, "--lane", "gpu"), 2, "changes and --wait are for one run")
    fails(cli("cancel", "--where", "ended_after=2030-01-31T08:00Z", "--yes"), 2, "ended_after")


def _completed(service: Service, *words: str) -> list[str]:
    """What a shell is given to complete the last word."""
    asked = {"_BACKCAST_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    found = CliRunner().invoke(app, env=asked, prog_name="backcast")
    assert (found.exit_code, found.stderr) == (0, "")
    return found.stdout.split()


def test_names_are_completed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_of_the_command_line, "QUICK", PATIENCE)  # it answers on a slow machine too
    service.lanes["gpu"] = {"name": "gpu", "running": 0, "queued": 0, "held": 0}
    assert _completed(service, "backcast", "submit", "a") == ["add"]
    assert _completed(service, "backcast", "tasks", "x") == []
    assert _completed(service, "backcast", "submit", "add", "--lane", "g") == ["gpu"]
    assert _completed(service, "backcast", "lane", "g") == ["gpu"]
    assert _completed(service, "backcast", "list", "--state", "ca") == ["cancelled"]
    monkeypatch.setenv("BACKCAST_URL", "http://127.0.0.1:1")
    assert _completed(service, "backcast", "submit", "a") == []


def test_why_and_logs(cli: Cli, service: Service) -> None:
    run_id = service.add_run(state="completed")
    assert cli("why", run_id).stdout == "It waits for its time.\n"
    assert json.loads(cli("why", run_id, "--json").stdout)["code"] == "scheduled"
    line = {"at": "2030-01-31T08:00:00Z", "level": "INFO", "logger": "mine", "message": "hello", "attempt": 1}
    events = [("started", {"attempt": 1}), ("log", line), ("log", line | {"logger": "stdout", "message": "printed"})]
    text = "".join(f"id: 1\nevent: {name}\ndata: {json.dumps(data)}\n\n" for name, data in [*events, ("ended", {})])
    service.streams += [text, text]
    for given in ((), ("--follow",)):
        first, second = cli("logs", run_id, *given).stdout.splitlines()
        assert (first.endswith("INFO    hello"), second) == (True, "printed")
    assert json.loads(cli("logs", run_id, "--json").stdout.splitlines()[0])["message"] == "hello"
    assert cli("watch", run_id, "--logs").stdout.splitlines()[1] == "log\thello"
    assert service.seen[-1].query == {"logs": "true"}


def test_batches(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    batch = cli("batch", "submit", str(tmp_path / "rows.jsonl"), "--task", "add", "--skip").stdout.strip()
    assert cli("batch", "show", batch).stdout == "STATE\tRUNS\ncompleted\t2\n"
    results = [json.loads(line) for line in cli("batch", "results", batch).stdout.splitlines()]
    assert [result["state"] for result in results] == ["failed", "completed"]
    assert json.loads(cli("batch", "errors", batch).stdout)["line"] == 3
    assert "cancelled\t2" in cli("batch", "cancel", batch).stdout
    assert len(cli("batch", "retry", batch).stdout.strip()) == 36
    fails(cli("batch", "submit", "nowhere.jsonl"), 2, "does not exist")


def test_levers(cli: Cli) -> None:
    assert cli("pause", "task", "add", "--reason", "why").stdout == "The task add is paused.\n"
    assert json.loads(cli("pause", "lane", "gpu", "--release", "--json").stdout)["running"] == "release"
    assert cli("pauses").stdout.splitlines()[1].split("\t")[:3] == ["task add", "why", ""]
    assert [pause["name"] for pause in json.loads(cli("pauses", "--json").stdout)] == ["add"]
    assert cli("resume", "pool", "default").stdout == "The pool default goes on.\n"
    assert "drains" in cli("drain", str(uuid4())).stdout
    fails(cli("pause", "tasks", "add"), 2, "'tasks' is not one of")
    fails(cli("pause", "task", "add", "--reason", "x" * 301), 2, "reason: String should have at most 300 characters")


def test_tasks(cli: Cli) -> None:
    assert cli("tasks").stdout.splitlines()[1] == "add\ta=… b=… [note=…]\tAdd two numbers."
    assert "submit\tbackcast submit add a=… b=… [note=…]" in cli("tasks", "add").stdout
    assert json.loads(cli("tasks", "add", "--json").stdout)["name"] == "add"
    assert [task["name"] for task in json.loads(cli("tasks", "--json").stdout)] == ["add"]


def test_the_address_is_the_option_then_the_variable_then_the_file(
    cli: Cli, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(".backcast").mkdir()
    Path(".backcast/url").write_text("http://127.0.0.1:1\n")
    assert cli("tasks").exit_code == 0
    monkeypatch.delenv("BACKCAST_URL")
    assert cli("tasks", "--url", service.url).exit_code == 0
    Path(".backcast/url").write_text(f"{service.url}\n")
    assert cli("tasks").exit_code == 0


@pytest.mark.parametrize("process", ["api", "worker", "steward", "model", "setup"])
def test_a_wrong_setting_is_a_sentence(cli: Cli, monkeypatch: pytest.MonkeyPatch, process: str) -> None:
    monkeypatch.setenv("BACKCAST_SLOTS", "3")
    fails(cli(process), 2, "BACKCAST_SLOTS is not a setting of backcast")


def test_the_variable_of_the_command_line_is_no_wrong_setting(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCAST_DATABASE__URL", "postgresql://127.0.0.1:1/none")
    monkeypatch.setenv("BACKCAST_SETUP__PATIENCE", "0")
    fails(cli("setup"), 3, "127.0.0.1")


@pytest.mark.parametrize("command", [(), ("cast",), ("list",)])
def test_help_lists_the_exit_codes(cli: Cli, command: tuple[str, ...]) -> None:
    assert "Exit codes: 0 fine; 1 the run failed" in " ".join(cli(*command, "--help").stdout.split())


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout.startswith("backcast 0.")


def test_the_command_line_brings_neither_prefect_nor_the_database(service: Service) -> None:
    heavy = ["prefect", "marvin", "asyncpg", "fastapi", "s3fs"]
    code = f"import sys, backcast.cli.main; print([name for name in {heavy} if name in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout == "[]\n"


class Terminal:
    """`backcast …` on a terminal of its own, 100 columns wide."""

    def __init__(self, *arguments: str, **env: str) -> None:
        ours, theirs = pty.openpty()
        self._ours, self.screen = ours, ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "backcast", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **env},
        )
        os.close(theirs)

    def read(self, until: str | None = None, *, timeout: float = PATIENCE) -> str:
        """The whole screen once it shows `until`, or at the end of the process."""
        deadline = time.monotonic() + timeout
        while until is None or until not in self.screen:
            assert time.monotonic() < deadline, f"waited for {until!r} in vain; last seen: {self.screen!r}"
            if not select.select([self._ours], [], [], 0.1)[0]:
                continue
            try:
                chunk = os.read(self._ours, 65536)
            except OSError:  # on Linux: the other side is closed
                chunk = b""
            if not chunk:
                assert until is None, f"ended without {until!r}; last seen: {self.screen!r}"
                break
            self.screen += chunk.decode(errors="replace")
        return self.screen

    def types(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def ended(self) -> int:
        os.close(self._ours)
        return self.process.wait(PATIENCE)


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}])
def test_people_get_a_table_with_colours(service: Service, env: dict[str, str]) -> None:
    run_id = service.add_run("create_structured_output", owner="[red]ana\x1b[2J")
    terminal = Terminal("list", **env)
    screen = terminal.read()
    assert terminal.ended() == 0
    assert run_id in screen
    assert ("\x1b[36mqueued" in screen) == (env == {})
    assert "[red]ana" in screen
    assert "\x1b[2J" not in screen


def test_people_see_a_run_move_and_may_leave(service: Service) -> None:
    service.states = ("queued", "running")
    terminal = Terminal("cast", "x", "--to", "int")
    terminal.read("create_structured_output is running")
    terminal.process.send_signal(signal.SIGINT)
    assert "The run goes on: backcast wait" in terminal.read()
    assert terminal.ended() == 130


def test_people_see_tables_move(service: Service) -> None:
    service.states = ("queued",)
    run_id = service.add_run()
    emitted = [("started", {"attempt": 2, "at": None}), ("progress", {"fraction": 0.4, "message": "page 12"})]
    emitted += [("output", {"kind": "json", "data": "\x1b[2Jhalf"})]
    emitted += [("retrying", {"attempt": 1, "error": {"code": "c", "title": "t", "detail": "late"}})]
    emitted = [*emitted[-1:], *emitted[:-1]]
    ended = {"run": {**service.runs[run_id], "state": "failed", "error": {"code": "c", "title": "t", "detail": "no"}}}
    service.streams.append("".join(f"id: 1\nevent: {n}\ndata: {json.dumps(d)}\n\n" for n, d in emitted))
    service.streams.append(f"id: 2\nevent: ended\ndata: {json.dumps(ended)}\n\n")
    terminal = Terminal("watch", run_id)
    screen = terminal.read()
    assert terminal.ended() == 0
    for seen in ("running", "attempt 2", "40%", "page 12", "half", "attempt 1 failed c: late", "failed", "c: no"):
        assert seen in screen
    assert "\x1b[2J" not in screen

    batch: dict[str, Any] = {
        "id": str(UUID(int=8)),
        "owner": "default",
        "size": 2,
        "created_at": "2030-01-31T08:00:00Z",
    }
    service.batches[batch["id"]] = {**batch, "states": {"queued": 2}}
    service.streams.append(_events(batch))
    service.runs[run_id] |= ended["run"]
    terminal = Terminal("watch", batch["id"])
    screen = terminal.read()
    assert terminal.ended() == 0
    for seen in ("STATE", "running", "1 of 2", "2 of 2", "Latest errors", run_id, "c: no"):
        assert seen in screen


def test_people_may_leave_what_they_watch(service: Service) -> None:
    run_id = service.add_run()
    terminal = Terminal("watch", run_id)
    terminal.read("queued")
    terminal.process.send_signal(signal.SIGINT)
    assert f"It goes on: backcast watch {run_id}" in terminal.read()
    assert terminal.ended() == 130


def test_people_are_asked_before_many_runs_are_changed(service: Service) -> None:
    for answer, code in (("n\n", 1), ("y\n", 0)):
        terminal = Terminal("cancel", "--where", "task=add")
        terminal.read("Cancel 5 runs?")
        terminal.types(answer)
        screen = terminal.read()
        assert (terminal.ended(), "1 cancelled" in screen) == (code, code == 0)


def test_a_result_can_not_steer_the_terminal(service: Service) -> None:
    service.result = "plain\x1b]0;title\x07"
    terminal = Terminal("cast", "x", "--to", "str")
    screen = terminal.read()
    assert terminal.ended() == 0
    assert "plain\N{REPLACEMENT CHARACTER}]0;title\N{REPLACEMENT CHARACTER}" in screen
