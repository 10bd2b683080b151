"""The options of a task and the question `cancel_requested`, without Prefect."""

import asyncio
import contextvars
import subprocess
import sys
import threading

import pytest

import backcast
from backcast.options import Options, cancel_requested, options, options_of, stoppable


def plain() -> None: ...


class Task:
    """The shape of a Prefect task: an object that carries its function."""

    def __init__(self, fn: object) -> None:
        self.fn = fn


def test_no_options_means_the_defaults() -> None:
    assert options_of(Task(plain)) == options_of(plain) == Options(history="full", lane=None)


def test_above_the_task_they_hold_for_that_task_alone() -> None:
    first, second = Task(plain), Task(plain)
    assert options(history="none", lane="openai")(first) is first
    assert options_of(first) == Options("none", "openai")
    assert options_of(second) == Options()


def test_below_it_they_hold_for_every_task_made_from_the_function() -> None:
    @options(lane="openai")
    def fn() -> None: ...

    assert options_of(Task(fn)) == options_of(Task(fn)) == Options(lane="openai")
    assert options_of(options(history="none")(Task(fn))) == Options("none"), "the nearer options count"


@pytest.mark.parametrize("wrong", [{"history": "some"}, {"lane": ""}, {"lane": "a\nb"}, {"lane": "x" * 201}])
def test_a_wrong_option_is_refused_where_it_is_written(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"(history|lane) is .*: "):
        options(**wrong)  # type: ignore[arg-type]


def test_an_unknown_option_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(TypeError, match=r"options\(\) takes no option 'histry'. Did you mean history\?"):
        options(histry="none")  # type: ignore[arg-type]


def test_outside_of_a_run_no_cancel_is_requested() -> None:
    assert not cancel_requested()


def test_the_question_belongs_to_the_run_and_its_threads() -> None:
    first, second = contextvars.copy_context(), contextvars.copy_context()
    first.run(stoppable).set()
    second.run(stoppable)
    assert first.run(cancel_requested)
    assert not second.run(cancel_requested), "another run"
    assert not cancel_requested()
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(first.run(cancel_requested)))
    thread.start()
    thread.join()
    assert seen == [True]


async def test_threads_of_an_async_task_may_ask() -> None:
    stoppable().set()
    assert await asyncio.to_thread(cancel_requested)


def test_the_authors_import_brings_no_prefect() -> None:
    assert {"cancel_requested", "options"} <= set(vars(backcast))
    code = "import backcast, sys; print([m for m in ('prefect', 'pydantic', 'asyncio') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
