"""Reads an answer that a provider streams, as loosely as `completions` does. Makes of it the completion that the
provider would have sent in one piece, and shows meanwhile what is there of it.
"""

import json
import re
import time
from collections.abc import Callable
from typing import Any

from openai import AsyncStream
from openai.types import chat
from pydantic_core import from_json

from backcast.models import JSON

EVERY, GROWTH = 0.25, 1 / 8
"""Seconds between two parts that are shown, and the part by which the answer has grown since: an answer of 20 KiB is
shown about eighty times."""
MOST = 192 * 1024
"""Bytes of all parts that a cast shows."""
_OPEN_NUMBER = re.compile(r"[-+.\d][-+.\deE]*$")
"""At the end of a text: more of its figures may come."""


class Partial:
    """Shows an answer as it grows, each time all that is there of the value: the text of a string that has not ended, a
    list or an object without the rest. Not the beginning of a number, which is another number."""

    def __init__(self, show: Callable[[JSON], object]) -> None:
        self._show = show
        self._length = self._bytes = 0
        self._due = 0.0
        self._last: object = self

    def __call__(self, text: str) -> None:
        """`text`: the answer so far."""
        if len(text) < self._length:  # another answer
            self._length = 0
        now = time.monotonic()
        if now < self._due or len(text) < self._length * (1 + GROWTH) or self._bytes + len(text) > MOST:
            return
        try:
            value = from_json(_OPEN_NUMBER.sub("", text), allow_partial="trailing-strings")["result"]
        except (ValueError, KeyError, TypeError):  # nothing of it yet, or no JSON
            return
        if value and value != self._last:
            self._length, self._due, self._last = len(text), now + EVERY, value
            self._bytes += len(text.encode(errors="replace"))
            self._show(value)


class Answer:
    """A completion that comes in chunks."""

    def __init__(self) -> None:
        self._given: dict[str, Any] = {}
        self._content = self._refusal = ""
        self._calls = dict[int, dict[str, str]]()
        self._finish: Any = None
        self._has_choice = False

    def add(self, chunk: dict[str, Any]) -> None:
        self._given |= {name: chunk[name] for name in ("id", "created", "model", "usage", "error") if chunk.get(name)}
        choices = chunk.get("choices")
        choice: Any = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return
        self._has_choice = True
        self._finish = choice.get("finish_reason") or self._finish
        if isinstance(delta := choice.get("delta"), dict):
            self._content += _text(delta.get("content"))
            self._refusal += _text(delta.get("refusal"))
            for call in delta.get("tool_calls") or ():
                if isinstance(call, dict) and isinstance(function := call.get("function"), dict):
                    self._add_call(call, function)

    def _add_call(self, call: dict[str, Any], function: dict[str, Any]) -> None:
        index: Any = call.get("index")
        made = self._calls.setdefault(index if isinstance(index, int) else 0, {"id": "", "name": "", "arguments": ""})
        arguments: Any = function.get("arguments")
        made["id"] = made["id"] or _text(call.get("id"))
        made["name"] = made["name"] or _text(function.get("name"))
        made["arguments"] += json.dumps(arguments) if isinstance(arguments, dict) else _text(arguments)

    @property
    def text(self) -> str:
        """The arguments of its first call, or its content."""
        return next(iter(self._calls.values()))["arguments"] if self._calls else self._content

    def completion(self) -> chat.ChatCompletion:
        calls = [
            {"id": call["id"], "type": "function", "function": {name: call[name] for name in ("name", "arguments")}}
            for call in self._calls.values()
        ]
        message = {"role": "assistant", "content": self._content or None, "refusal": self._refusal or None}
        finish = self._finish or ("stop" if is_json(self.text) else "error")  # "error": the stream broke off
        choice = {"index": 0, "finish_reason": finish, "message": message | {"tool_calls": calls or None}}
        return chat.ChatCompletion.construct(**self._given, choices=[choice] if self._has_choice else [])


async def gathered(
    chunks: AsyncStream[chat.ChatCompletionChunk], partial: Callable[[str], object]
) -> chat.ChatCompletion | None:
    """The whole answer; None if it is none. `partial` is called with its text so far."""
    async with chunks:
        if "event-stream" not in chunks.response.headers.get("content-type", ""):  # the provider does not stream
            try:
                given = json.loads(await chunks.response.aread())
            except (ValueError, RecursionError):
                return None
            return chat.ChatCompletion.construct(**given) if isinstance(given, dict) else None
        answer, shown = Answer(), ""
        async for chunk in chunks:
            answer.add(chunk.to_dict(mode="json", warnings=False))
            if answer.text != shown:
                partial(shown := answer.text)
        return answer.completion()


def _text(given: Any) -> str:
    if isinstance(given, list):  # parts, as in requests
        return "".join(_text(part.get("text")) for part in given if isinstance(part, dict))
    return given if isinstance(given, str) else ""


def is_json(text: str) -> bool:
    """Whether it is JSON that can be read, and no cut-off or endlessly nested text."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
