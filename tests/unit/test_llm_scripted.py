"""The shipped fake of a model's server, through the client that real programs use."""

import os
import subprocess
import sys
from typing import Any

import jsonschema
import openai
import pytest

from backcast.testing import Reply, Request, ScriptedModel, extract

MESSAGES: list[Any] = [{"role": "user", "content": "Text: 31 chairs for ann@x.org\nWanted: anything\n"}]


def client(model: ScriptedModel | str) -> openai.OpenAI:
    return openai.OpenAI(base_url=model if isinstance(model, str) else model.url, api_key="k", max_retries=0)


def body(schema: Any) -> dict[str, Any]:
    answer = {"type": "object", "properties": {"result": schema}}
    tool = {"type": "function", "function": {"name": "answer", "parameters": answer}}
    return {"model": "m", "messages": MESSAGES, "tools": [tool], "tool_choice": "required"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 40},
        {"type": "number", "exclusiveMaximum": 3},
        {"type": "string", "minLength": 100},
        {"type": "string", "maxLength": 3},
        {"type": "string", "format": "email"},
        {"type": "string", "format": "date"},
        {"type": "string", "format": "date-time"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 3},
        {"type": "array", "items": {"type": "string"}, "maxItems": 2, "uniqueItems": True},
        {"type": "object", "properties": {"a": {"type": "null"}, "b": {"const": 4}}, "required": ["a", "b"]},
        {"type": ["boolean", "string"]},
        {"anyOf": [{"enum": ["x", "chairs"]}, {"type": "null"}]},
        {},
    ],
)
def test_default_answers_fit_any_shape_and_are_the_same_every_time(schema: Any) -> None:
    first, second = (extract(Request(body(schema), {})) for _ in range(2))
    jsonschema.validate(first.value, schema, format_checker=jsonschema.FormatChecker())
    assert first == second


def test_tool_calls_and_formats_whole_and_streamed() -> None:
    with ScriptedModel() as model, client(model) as ask:
        whole = ask.chat.completions.create(**body({"type": "integer"}))
        assert whole.choices[0].message.tool_calls[0].function.arguments == '{"result": 31}'  # type: ignore[index,union-attr]
        chunks = list(ask.chat.completions.create(**body({"type": "integer"}), stream=True))
        calls = [
            c.function.arguments for chunk in chunks for choice in chunk.choices for c in choice.delta.tool_calls or []
        ]
        assert calls == ['{"result', '": 31}']
        assert [choice.finish_reason for chunk in chunks for choice in chunk.choices] == [None, None, "tool_calls"]
        assert chunks[-1].usage.total_tokens > 0
        schema = {"type": "object", "properties": {"result": {"enum": ["boats", "chairs"]}}}
        formatted = {"type": "json_schema", "json_schema": {"name": "r", "schema": schema}}
        answer = ask.chat.completions.create(model="m", messages=MESSAGES, response_format=formatted)  # type: ignore[call-overload]
        assert answer.choices[0].message.content == '{"result": "chairs"}'


def test_replies_come_in_order_and_the_last_one_stays() -> None:
    with ScriptedModel([Reply(1), Reply(status=429, code="c", retry_after=3), Reply(2)]) as model, client(model) as ask:

        def answer() -> str:
            return ask.chat.completions.create(**body({})).choices[0].message.tool_calls[0].function.arguments

        assert answer() == '{"result": 1}'
        with pytest.raises(openai.RateLimitError) as caught:
            answer()
        assert (caught.value.code, caught.value.response.headers["Retry-After"]) == ("c", "3")
        assert [answer(), answer()] == ['{"result": 2}', '{"result": 2}']
    assert [request.text for request in model.requests] == ["31 chairs for ann@x.org"] * 4


def test_it_runs_as_a_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "backcast.testing", "0"], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().removeprefix("serving ").strip()
            with client(url) as ask:
                assert ask.models.list().data[0].id == "scripted"
        finally:
            process.terminate()
