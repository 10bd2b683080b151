"""What is shown of an answer that has not ended, and how its chunks become a completion."""

from typing import Any

import pytest

from backcast.llm.streaming import MOST, Answer, Partial


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", []),
        ('{"res', []),
        ('{"result": "', []),
        ('{"result": "Ada, 3', ["Ada, "]),
        ('{"result": 12', []),
        ('{"result": 12}', [12]),
        ('{"result": -1.5e', []),
        ('{"result": [1, 2', [[1]]),
        ('{"result": {"a": "x", "b": 1', [{"a": "x"}]),
        ('{"result": {"a": "x\\u00', [{"a": "x"}]),
        ('{"result": {"a": tr', []),
        ("There are seven", []),
        ("[1]", []),
        (f'{{"result": "{"x" * MOST}', []),
    ],
)
def test_all_that_is_there_of_a_value_is_shown_and_no_part_of_a_number(text: str, shown: list[Any]) -> None:
    seen = list[Any]()
    Partial(seen.append)(text)
    assert seen == shown


def answer(*deltas: dict[str, Any], finish: str | None = None) -> Answer:
    made = Answer()
    for delta in deltas:
        made.add({"id": "1", "choices": [{"index": 0, "delta": delta, "finish_reason": None}], "model": "m"})
    made.add({"choices": [{"index": 0, "delta": None, "finish_reason": finish}]})
    made.add({"choices": [], "usage": {"completion_tokens": 3}})
    return made


def call(**function: Any) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": function}]}


@pytest.mark.parametrize(
    ("deltas", "text"),
    [
        ([{"content": "a"}, {"content": [{"type": "text", "text": "b"}]}, {"content": None}], "ab"),
        ([call(name="f", arguments='{"a"'), call(name=None, arguments=": 1}")], '{"a": 1}'),
        ([call(name="f", arguments={"a": 1})], '{"a": 1}'),
    ],
)
def test_chunks_become_the_completion_that_would_have_come_in_one_piece(
    deltas: list[dict[str, Any]], text: str
) -> None:
    made = answer(*deltas, finish="stop")
    assert made.text == text
    whole = made.completion().to_dict(mode="json", warnings=False)
    assert (whole["id"], whole["model"], whole["usage"]) == ("1", "m", {"completion_tokens": 3})
    [choice] = whole["choices"]  # type: ignore[misc]
    message: Any = choice["message"]  # type: ignore[index]
    assert text == (message["tool_calls"][0]["function"]["arguments"] if message["tool_calls"] else message["content"])


@pytest.mark.parametrize(("text", "finish"), [('{"result": 1}', "stop"), ('{"result": ', "error")])
def test_an_answer_without_an_end_has_ended_if_it_is_whole(text: str, finish: str) -> None:
    assert answer({"content": text}).completion().choices[0].finish_reason == finish


def test_no_chunk_is_no_answer() -> None:
    assert Answer().completion().choices == []
