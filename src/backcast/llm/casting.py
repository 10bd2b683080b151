"""Casts with Marvin, and leaves nothing on disk. The first cast imports this module: Marvin takes two seconds of CPU to
import.

Every failure is one of the four kinds of `errors.RunError`; nothing is retried here but one re-ask after an answer that
does not fit. The data is untrusted and goes into the prompt: it may mislead the model, never change the answer's shape.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Optional
from weakref import WeakKeyDictionary

import genai_prices
import marvin
import openai
from marvin.tasks import task
from pydantic import AfterValidator, WithJsonSchema
from pydantic_ai import Agent
from pydantic_ai.messages import ModelResponse
from pydantic_ai.models.instrumented import InstrumentationSettings
from pydantic_ai.profiles.openai import openai_model_profile
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from backcast.errors import FatalError
from backcast.llm import Usage, compact
from backcast.llm.answers import Grammar, Whole
from backcast.llm.completions import Completions
from backcast.llm.failures import explain
from backcast.llm.grounding import grounded
from backcast.llm.memory import MemoryThread
from backcast.llm.streaming import Partial
from backcast.models import JSON
from backcast.settings import Model
from backcast.targets import Misfit, Target

_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Model, openai.AsyncOpenAI]] = WeakKeyDictionary()
"""By event loop, as connections die with the loop that made them."""


def trace() -> None:
    """Let each request to the model be a span, which has its tokens and neither the question nor the answer."""
    Agent.instrument_all(InstrumentationSettings(include_content=False))


async def aclose() -> None:
    """Close the running loop's connections."""
    for client in _clients.pop(asyncio.get_running_loop(), {}).values():
        await client.close()


async def cast(
    model: Model,
    data: JSON,
    target: Target,
    instructions: str | None,
    record: Callable[[Usage], None],
    show: Callable[[JSON], object] | None,
) -> JSON:
    """See `llm.cast`; `record` is called with the usage of every answer."""

    def meter(response: ModelResponse, seconds: float) -> None:
        used = response.usage
        record(Usage(response.model_name or "", used.input_tokens, used.output_tokens, seconds, _dollars(response)))

    misfits: list[Misfit] = []
    whole: Whole | None = None
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    shape = _type(target, misfits)
    try:
        provided = _provided(model, show and Partial(show))
        whole = (
            Grammar(
                provided,
                target.schema,
                meter,
                compact.cast(data, target.schema, instructions),
                lambda value: grounded(value, target.schema, text, is_free=bool(instructions)),
            )
            if model.embedded
            else Whole(provided, target.schema, meter)
        )
        agent = marvin.Agent(name="backcast", model=whole, model_settings=_answer_settings(model))
        return await marvin.cast_async(text, shape, instructions, agent, MemoryThread())
    except Exception as error:  # noqa: BLE001  # after any error the run must learn whether to retry
        failure = explain(error, model, whole.answer if whole else "", misfits[-1] if misfits else None)
    finally:
        # Marvin keeps one per type for ever, and each cast has a type of its own.
        task._type_adapters.pop(shape, None)  # pyright: ignore[reportPrivateUsage]
    raise failure  # not inside `except`: the chain would hold the provider's message, which may repeat the key


def _dollars(response: ModelResponse) -> float:
    """By the address, never by the name of the model alone: another server may sell a model of that name."""
    try:
        price = genai_prices.calc_price(
            response.usage,
            response.model_name or "",
            provider_api_url=response.provider_url or "",
            genai_request_timestamp=response.timestamp,
        )
    except Exception:  # noqa: BLE001  # no cast fails for want of a price
        return 0.0
    return float(price.total_price)


def _provided(model: Model, partial: Partial | None) -> Completions:
    clients = _clients.setdefault(asyncio.get_running_loop(), {})
    if model not in clients:
        clients[model] = openai.AsyncOpenAI(
            base_url=model.embedded_url if model.embedded else model.base_url or "https://api.openai.com/v1",
            api_key=_key(model),
            timeout=model.timeout.total_seconds(),
            max_retries=0,  # the run's own retries are the only ones
        )
    name = "embedded" if model.embedded else model.name
    profile = replace(openai_model_profile(name), json_schema_transformer=None)  # schemas are ours: see `llm.schemas`
    provider = OpenAIProvider(openai_client=clients[model])
    return Completions(name, partial=partial, provider=provider, profile=profile)


def _key(model: Model) -> str:
    if model.api_key is not None:
        return model.api_key.get_secret_value()
    if model.embedded or model.base_url:
        return "none"  # self-hosted servers often need none, the client always needs one
    raise FatalError("The provider needs a key: set BACKCAST_MODEL__API_KEY.", code="model_refused_key")


def _answer_settings(model: Model) -> ModelSettings:
    chosen = ModelSettings(max_tokens=model.max_tokens, timeout=model.timeout.total_seconds())
    if model.embedded:
        chosen["temperature"] = 0
    return chosen


def _type(target: Target, misfits: list[Misfit]) -> Any:
    """The target for Marvin, which shows the schema to the model, and asks again if an answer does not fit; the reasons
    go to `misfits`."""

    def fit(value: Any) -> JSON:
        try:
            return target.validate(value)
        except Misfit as misfit:
            misfits.append(misfit)
            raise

    # pydantic looks for the targets of references among its own definitions; the output tool has the whole schema.
    shown: dict[str, JSON] = {"description": "as in the tool"} if "$defs" in target.schema else target.schema
    shaped = Annotated[Any, WithJsonSchema(shown), AfterValidator(fit)]
    try:
        target.validate(None)
    except ValueError:
        return shaped
    return Optional[shaped]  # noqa: UP045  # Marvin takes None as an answer only if it sees it in the type
