"""Reads the answers of providers that follow OpenAI's protocol loosely: only the parts that a cast needs are looked at,
and each word for the end of an answer is one of OpenAI's, or the answer has failed.
"""

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import openai
from openai.types import chat
from pydantic_ai.exceptions import ModelAPIError, ModelHTTPError
from pydantic_ai.messages import ModelResponse
from pydantic_ai.models.openai import OpenAIChatModel

from backcast.llm.streaming import gathered

_ENDS = {
    "content_filter": r"filter|safety|refus|recitation|block|prohibit|spii|sensitive|moderat|guardrail|toxic",
    "length": r"length|max|limit|truncat|incomplete|not_finished|exceed",
    "error": r"error|abort|cancel|insufficient|timeout|fail",
    "tool_calls": r"tool|function",
}
"""OpenAI's words for the end of an answer, by parts of the words that others use; any other word means `stop`."""

_MOST_TOKENS, _LATEST = 1 << 40, 1 << 32
"""Of an answer, and of its time in seconds since 1970: numbers beyond are nonsense."""
_REFUSED = (400, 422)
"""HTTP statuses for a request that has something that the server does not take."""
_NEW, _OLD = "max_completion_tokens", "max_tokens"
_OPENAI = re.compile(r"(.+\.)?api\.openai\.com|.+\.openai\.azure\.com")
"""Hosts that refuse both names at once."""
_BOUND = r"(large|great|range|at most \d|less than|exceed|maximum|between|[<>≤≥]=?)"
_TOO_LARGE = re.compile(
    rf"max_(completion_)?tokens[^{{}}]{{,60}}{_BOUND}|{_BOUND}[^{{}}]{{,60}}max_(completion_)?tokens", re.IGNORECASE
)
"""A refusal of the limit itself: by another name, the server might ignore it."""
_names = WeakKeyDictionary[openai.AsyncOpenAI, tuple[str, ...]]()
"""The limit's name that a client's provider takes, where it has refused the other one."""


class NotCompletions(Exception):
    """The server answered with something that is no chat completion, such as a web page."""


class TooSlow(Exception):
    """An answer was not complete in time."""


class Completions(OpenAIChatModel):
    """Any provider's chat completions. With `partial`, which is called with the text of the answer so far, they are
    streamed where the provider does that; the answer is the same."""

    def __init__(self, model_name: str, *, partial: Callable[[str], object] | None = None, **more: Any) -> None:
        super().__init__(model_name, **more)
        self._partial = partial

    async def _completions_create(
        self, messages: Any, stream: bool, model_settings: Any, model_request_parameters: Any
    ) -> Any:
        asked = messages, stream, model_settings, model_request_parameters
        try:
            # Of the whole answer; the client's is of each read.
            async with asyncio.timeout(model_settings.get("timeout")):
                if self._partial is None:
                    return await self._limited(*asked)
                try:
                    chunks: Any = await self._limited(messages, True, model_settings, model_request_parameters)
                except ModelHTTPError as error:
                    if error.status_code not in _REFUSED:
                        raise
                    return await self._limited(*asked)  # it may not know how to stream
                return await gathered(chunks, self._partial) if isinstance(chunks, openai.AsyncStream) else chunks
        except TimeoutError:
            raise TooSlow from None
        except openai.APIConnectionError as error:
            raise ModelAPIError(self.model_name, error.message) from error
        except openai.APIError as error:  # among the chunks
            raise self._failed(error.body) from error

    async def _limited(self, messages: Any, stream: Any, settings: Any, parameters: Any) -> Any:
        """Ask with the limit by both its names: many servers ignore the one that they do not know. A provider that
        refuses one, as Mistral and OpenAI's reasoning models do, is asked by the other from then on."""
        limit = settings.get("max_tokens")
        plain = {key: value for key, value in settings.items() if key != "max_tokens"}
        usual = (_NEW,) if _OPENAI.fullmatch(self.client.base_url.host) else (_NEW, _OLD)
        names = first = _names.get(self.client, usual)
        others = [one for one in ((_NEW,), (_OLD,)) if one != names]
        while True:
            asked: Any = plain | {"extra_body": {_OLD: limit} if _OLD in names else None}
            asked |= {"max_tokens": limit} if _NEW in names else {}
            try:
                answer = await super()._completions_create(messages, stream, asked, parameters)
            except ModelHTTPError as error:
                body = str(error.body)
                others = [one for one in others if any(name in body for name in names if name not in one)]
                if error.status_code not in _REFUSED or not others or _TOO_LARGE.search(body):
                    raise
                names = others.pop(0)
            else:
                if names != first:
                    _names[self.client] = names
                return answer

    def _process_response(self, response: Any) -> ModelResponse:
        if not isinstance(response, chat.ChatCompletion):
            raise NotCompletions
        given = response.to_dict(mode="json", warnings=False)
        choices = given.get("choices")
        if not isinstance(choices, list) or not choices:
            raise self._failed(given.get("error"))
        choice: Any = choices[0]
        if not isinstance(choice, dict):
            raise NotCompletions
        # Gemini's has no message when it was cut in its thoughts, or blocked.
        message: Any = choice.get("message") or ({} if choice.get("finish_reason") else None)
        if not isinstance(message, dict):
            raise NotCompletions
        reason = _finish_reason(choice.get("finish_reason"))
        is_failed = reason == "error"
        created, usage = given.get("created"), given.get("usage")
        plain = {
            "id": str(given.get("id") or ""),
            "object": "chat.completion",
            "created": int(created) if isinstance(created, int | float) and 0 < created < _LATEST else 1,
            "model": str(given.get("model") or self.model_name),
            "choices": [{"index": 0, "finish_reason": "stop" if is_failed else reason, "message": _message(message)}],
            "usage": _usage(usage) if isinstance(usage, dict) else None,
        }
        response = super()._process_response(chat.ChatCompletion.model_validate(plain))
        return replace(response, finish_reason="error") if is_failed else response

    def _failed(self, error: Any) -> ModelHTTPError:
        """A failure that came with the status 200, as from a router of models; it passes unless its code says more."""
        code = error.get("code") if isinstance(error, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 502
        return ModelHTTPError(status, self.model_name, {"error": error})


def _finish_reason(given: Any) -> str:
    word = str(given or "").lower()
    return next((reason for reason, words in _ENDS.items() if re.search(words, word)), "stop")


def _message(given: dict[str, Any]) -> dict[str, Any]:
    calls: list[dict[str, Any]] = []
    for call in given.get("tool_calls") or []:
        function: Any = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and function.get("name"):
            arguments: Any = function.get("arguments")
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            called = {"name": str(function["name"]), "arguments": text}
            calls.append({"id": str(call.get("id") or ""), "type": "function", "function": called})
    content, refusal = given.get("content"), given.get("refusal")
    if isinstance(content, list):  # parts, as in requests
        parts: list[Any] = content
        content = "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
    return {
        "role": "assistant",
        "content": content if isinstance(content, str) else None,
        "refusal": refusal if isinstance(refusal, str) else None,
        "tool_calls": calls or None,
    }


def _usage(given: dict[str, Any]) -> dict[str, int]:
    def count(name: str) -> int:
        value = given.get(name)
        return int(value) if isinstance(value, int | float) and 0 < value < _MOST_TOKENS else 0

    asked, answered = count("prompt_tokens"), count("completion_tokens")
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}
