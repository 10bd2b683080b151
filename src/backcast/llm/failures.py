"""Classifies a model's failure for the run: passing, final, or the input's fault.

The sentences are ours. A provider's own may repeat the key or the data, so it is read for its code and not shown.
"""

from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import openai
from pydantic_ai.exceptions import (
    ContentFilterError,
    IncompleteToolCall,
    ModelAPIError,
    ModelHTTPError,
    UnexpectedModelBehavior,
)

from backcast.errors import FatalError, RunError, TransientError, UsageError

_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_TOO_LONG = ("context_length_exceeded", "exceed_context_size_error", "string_above_max_length")


def explain(error: Exception) -> RunError:
    """The run's error for an exception out of Marvin; an unknown one counts as passing."""
    match error:
        case ModelHTTPError():
            return _refusal(error)
        case ModelAPIError():
            if isinstance(error.__cause__, openai.APITimeoutError):
                return TransientError("The model did not answer in time. It will be asked again.", code="model_timeout")
            return TransientError("The model can't be reached. It will be asked again.", code="model_unavailable")
        case ContentFilterError():
            return UsageError("The model refused to work on this input: change the data.", code="model_refused_input")
        case IncompleteToolCall():
            return _cut()
        case UnexpectedModelBehavior() if "token limit" in error.message:
            return _cut()
        case UnexpectedModelBehavior():
            return UsageError(
                "The model's answers did not fit the target, also when asked again: make the target or the "
                "instructions clearer, or use a larger model.",
                code="model_answer_invalid",
            )
        case _:
            return TransientError(f"Asking the model failed ({type(error).__name__}).", code="model_failed")


def _refusal(error: ModelHTTPError) -> RunError:
    status, codes = error.status_code, _codes(error.body)
    after = _retry_after(error.__cause__)
    if status == 429 and codes & set(_QUOTA):
        return FatalError("The provider's quota is used up: check its plan and billing.", code="model_quota")
    if status == 429:
        return TransientError(
            "The model is overloaded. It will be asked again.", code="model_overloaded", retry_after=after
        )
    if status in (401, 403):
        return FatalError("The provider refuses the key: check BACKCAST_MODEL__API_KEY.", code="model_refused_key")
    if status == 404:
        return FatalError(
            f"The provider does not know the model {error.model_name}: check BACKCAST_MODEL__NAME and "
            "BACKCAST_MODEL__BASE_URL.",
            code="model_unknown",
        )
    if codes & set(_TOO_LONG) or status == 413:
        return UsageError("The data is too long for the model: cut or split it.", code="input_too_long")
    if "content_filter" in codes:
        return UsageError("The model refused to work on this input: change the data.", code="model_refused_input")
    if status in (408, 409, 425) or status >= 500:
        return TransientError(
            f"The model's server failed (HTTP {status}). It will be asked again.",
            code="model_unavailable",
            retry_after=after,
        )
    return FatalError(
        f"The model's server refuses the request (HTTP {status}): the target may use something it does not support.",
        code="model_refused_request",
    )


def _cut() -> RunError:
    return UsageError(
        "The answer is longer than BACKCAST_MODEL__MAX_TOKENS: ask for less, or raise the limit.",
        code="model_answer_too_long",
    )


def _codes(body: Any) -> set[str]:
    error = body.get("error", body) if isinstance(body, dict) else {}
    return {str(error.get(key)) for key in ("code", "type")} if isinstance(error, dict) else set()


def _retry_after(cause: BaseException | None) -> timedelta | None:
    """`Retry-After` in seconds or as a date."""
    if not isinstance(cause, openai.APIStatusError) or not (value := cause.response.headers.get("Retry-After")):
        return None
    try:
        seconds = float(value) if value.strip()[:1].isdigit() else _until(value)
        return timedelta(seconds=min(max(seconds, 0), 3600))  # an hour at most: more is a mistake or a quota
    except (ValueError, TypeError):
        return None


def _until(date: str) -> float:
    return (parsedate_to_datetime(date) - datetime.now(UTC)).total_seconds()
