"""Adapts models to Marvin, which forces a call of one "output tool" and streams; here an answer comes in one piece, and
the tool's schema is ours (`schemas`).

`Whole` is for any provider. `Grammar` is for the embedded model, which can't call tools: the tool's schema becomes a
grammar (`response_format`) for its text, and Marvin gets the text as that call. Neither knows Marvin's prompts.
"""

import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pydantic_ai import RunContext
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    ModelResponseStreamEvent,
    RetryPromptPart,
    SystemPromptPart,
    TextPart,
    ToolCallPart,
    UserPromptPart,
)
from pydantic_ai.models import Model, ModelRequestParameters, StreamedResponse
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.output import OutputObjectDefinition
from pydantic_ai.settings import ModelSettings

from backcast.llm.compact import Prompt
from backcast.llm.failures import Unfinished
from backcast.llm.schemas import Schema, bounded, provided, wrapped

MORE = 4
"""How many times as many tokens an answer may have when it is asked for again because it was cut."""
_OBJECT = re.compile(r'\{(?=\s*["}])')
"""The beginning of a JSON object, and not of `{a, b}` in prose."""


class Whole(WrapperModel):
    """A model that answers in one piece, so that its time-out bounds the answer and not the gap between two words.

    An answer that was cut or filtered is no answer, whether or not it can be read: it is asked for once more, with
    more room, and is then an error. `meter` gets every answer and the seconds that it took, useless ones included: they
    are paid for.
    """

    def __init__(self, wrapped: Model, schema: Schema, meter: Callable[[ModelResponse, float], None]) -> None:
        super().__init__(wrapped)
        self._schema, self._meter = schema, meter
        self.answer = ""
        """The latest answer, as it came."""

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        (tool,) = model_request_parameters.output_tools
        parameters, strict = provided(self._schema)
        tool = replace(tool, parameters_json_schema=parameters, strict=strict)
        asked = replace(model_request_parameters, output_tools=[tool])
        response = await self._whole(messages, model_settings, asked)
        is_called = any(isinstance(part, ToolCallPart) and part.tool_name == tool.name for part in response.parts)
        if not is_called and (arguments := _arguments(self.answer)):
            return replace(response, parts=[ToolCallPart(tool.name, arguments)])
        return response

    async def _whole(
        self, messages: list[ModelMessage], settings: ModelSettings | None, parameters: ModelRequestParameters
    ) -> ModelResponse:
        chosen = (settings or ModelSettings()).copy()
        response = await self._metered(messages, chosen, parameters)
        if response.finish_reason not in ("length", "content_filter"):
            return response
        try:
            chosen["max_tokens"] = MORE * chosen.get("max_tokens", 1024)
            response = await self._metered(messages, chosen, parameters)
        except ModelHTTPError as error:
            if error.status_code in (400, 422):  # the server does not allow an answer of that length
                raise Unfinished(response.finish_reason) from None
            raise
        if response.finish_reason in ("length", "content_filter"):
            raise Unfinished(response.finish_reason)
        return response

    async def _metered(
        self, messages: list[ModelMessage], settings: ModelSettings, parameters: ModelRequestParameters
    ) -> ModelResponse:
        began = time.monotonic()
        response = await super().request(messages, settings, parameters)
        self._meter(response, time.monotonic() - began)
        if response.finish_reason == "error":
            raise ModelHTTPError(502, response.model_name or "")  # a router's word for a model that broke off
        self.answer = "".join(
            str(part.args or "") if isinstance(part, ToolCallPart) else part.content
            for part in response.parts
            if isinstance(part, ToolCallPart | TextPart)
        )
        return response

    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: RunContext[Any] | None = None,  # noqa: ARG002
    ) -> AsyncIterator[StreamedResponse]:
        response = await self.request(messages, model_settings, model_request_parameters)
        yield _Finished(model_request_parameters, response=response)


class Grammar(Whole):
    """Asks `prompt` in place of the conversation's first request, and allows only answers that fit the output tool;
    `ground` changes them before anybody sees them."""

    def __init__(
        self,
        wrapped: Model,
        schema: Schema,
        meter: Callable[[ModelResponse, float], None],
        prompt: Prompt,
        ground: Callable[[Any], Any],
    ) -> None:
        super().__init__(wrapped, schema, meter)
        self._prompt, self._ground = prompt, ground

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        (tool,) = model_request_parameters.output_tools
        grammar = OutputObjectDefinition(
            json_schema=bounded(wrapped(self._schema), length=max(400, 2 * len(self._prompt.question))),
            name="result",
            strict=True,
        )
        parameters = replace(
            model_request_parameters,
            output_tools=[],
            output_mode="native",
            output_object=grammar,
            allow_text_output=True,
        )
        answered = next((i for i, message in enumerate(messages) if isinstance(message, ModelResponse)), len(messages))
        asked = [*_opening(self._prompt), *map(_without_tools, messages[answered:])]
        response = await self._whole(asked, model_settings, parameters)
        text = "".join(part.content for part in response.parts if isinstance(part, TextPart))
        with suppress(ValueError, RecursionError):
            match json.loads(text):
                case {"result": result}:
                    text = json.dumps({"result": self._ground(result)})
                case _:
                    pass
        return replace(response, parts=[ToolCallPart(tool.name, text)])


def _arguments(text: str) -> str | None:
    """The tool's arguments in a text that is no call of it: its server may not know how the model writes a call, or the
    model has another name for the tool. The object may be in a fence or in tags, among words, or within a call. None if
    there is none, if another one has another result, or if one is cut: an object inside that is no answer."""
    found, at = set[str](), 0
    while start := _OBJECT.search(text, at):
        try:
            given, at = json.JSONDecoder().raw_decode(text, start.start())
        except (ValueError, RecursionError):
            return None
        match given:
            case (
                {"result": result}
                | {"name": str(), "arguments": {"result": result}}
                | {"name": str(), "parameters": {"result": result}}
            ):
                found.add(json.dumps({"result": result}))
            case _:
                pass
    return found.pop() if len(found) == 1 else None


def _opening(prompt: Prompt) -> list[ModelMessage]:
    parts: list[SystemPromptPart | UserPromptPart] = [SystemPromptPart(prompt.system)]
    messages: list[ModelMessage] = []
    for question, answer in prompt.examples:
        messages.append(ModelRequest(parts=[*parts, UserPromptPart(question)]))
        messages.append(ModelResponse(parts=[TextPart(json.dumps({"result": answer}))]))
        parts = []
    return [*messages, ModelRequest(parts=[*parts, UserPromptPart(prompt.question)])]


def _without_tools(message: ModelMessage) -> ModelMessage:
    """A wrong answer and the request to correct it, as plain conversation."""
    if isinstance(message, ModelResponse):
        return replace(
            message, parts=[TextPart(p.args_as_json_str()) for p in message.parts if isinstance(p, ToolCallPart)]
        )
    return replace(
        message,
        parts=[UserPromptPart(p.model_response()) if isinstance(p, RetryPromptPart) else p for p in message.parts],
    )


@dataclass
class _Finished(StreamedResponse):
    """A stream of one event: Marvin looks for the tool call among a stream's parts."""

    response: ModelResponse

    async def _get_event_iterator(self) -> AsyncIterator[ModelResponseStreamEvent]:
        self._usage = self.response.usage
        self.finish_reason = self.response.finish_reason
        self.provider_details = self.response.provider_details
        for index, part in enumerate(self.response.parts):
            if isinstance(part, ToolCallPart):
                yield self._parts_manager.handle_tool_call_part(
                    vendor_part_id=index, tool_name=part.tool_name, args=part.args, tool_call_id=part.tool_call_id
                )
            elif isinstance(part, TextPart):
                for event in self._parts_manager.handle_text_delta(vendor_part_id=index, content=part.content):
                    yield event

    async def close_stream(self) -> None:
        pass

    @property
    def model_name(self) -> str:
        return self.response.model_name or ""

    @property
    def provider_name(self) -> str | None:
        return self.response.provider_name

    @property
    def provider_url(self) -> str | None:
        return self.response.provider_url

    @property
    def timestamp(self) -> datetime:
        return self.response.timestamp
