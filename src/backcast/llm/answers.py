"""Adapts models to Marvin, which forces a call of one "output tool" and streams; here an answer comes in one piece.

`Whole` is for any provider. `Grammar` is for the embedded model, which can't call tools: the tool's schema becomes a
grammar (`response_format`) for its text, and Marvin gets the text as that call. Neither knows Marvin's prompts.
"""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pydantic_ai import RunContext
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

from backcast.llm.compact import Prompt, Schema


class Whole(WrapperModel):
    """A model that answers in one piece, so that its time-out bounds the answer and not the gap between two words.

    `meter` gets every answer, useless ones included: they are paid for.
    """

    def __init__(self, wrapped: Model, meter: Callable[[ModelResponse], None]) -> None:
        super().__init__(wrapped)
        self._meter = meter

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        response = await super().request(messages, model_settings, model_request_parameters)
        self._meter(response)
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
    """Asks `prompt` in place of the conversation's first request, and allows only answers that fit the output tool."""

    def __init__(self, wrapped: Model, meter: Callable[[ModelResponse], None], prompt: Prompt) -> None:
        super().__init__(wrapped, meter)
        self._prompt = prompt

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        (tool,) = model_request_parameters.output_tools
        grammar = OutputObjectDefinition(
            json_schema=bounded(tool.parameters_json_schema, length=max(400, 2 * len(self._prompt.question))),
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
        response = await super().request(asked, model_settings, parameters)
        if response.finish_reason == "content_filter":
            return response
        text = "".join(part.content for part in response.parts if isinstance(part, TextPart))
        return replace(response, parts=[ToolCallPart(tool.name, text)])


def bounded(schema: Schema, *, length: int) -> Schema:
    """The schema as a grammar that ends: greedy decoding may repeat itself for ever in an open string or list.

    `length` is in characters; a list may have a tenth of it in items. Booleans in place of schemas, which llama.cpp
    refuses, become "anything". Rules that it ignores (patterns, ranges, conditions) are checked later, in the answer.
    """

    def walk(node: Any) -> Schema:
        if not isinstance(node, dict):
            return {}
        out: Schema = dict(node)
        for key in {"properties", "$defs"} & out.keys():
            out[key] = {name: walk(each) for name, each in out[key].items()}
        for key in {"anyOf", "oneOf", "allOf", "prefixItems"} & out.keys():
            out[key] = [walk(each) for each in out[key]]
        if "items" in out:
            out["items"] = walk(out["items"])
        if isinstance(out.get("additionalProperties"), dict):
            out["additionalProperties"] = walk(out["additionalProperties"])
        if out.get("type") == "array":
            out["maxItems"] = min(out.get("maxItems", length), max(length // 10, out.get("minItems", 0)))
        if out.get("type") == "string" and not {"maxLength", "enum", "const", "format", "pattern"} & out.keys():
            out["maxLength"] = length
        return out

    return walk(schema)


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
