"""Classifies a model's failure for the run: passing, final, or the input's fault.

The sentences are ours. Of what the model or its server said they quote a bounded excerpt, never with the key in it.
"""

import json
import re
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import openai
from pydantic_ai.exceptions import ContentFilterError, ModelAPIError, ModelHTTPError, UnexpectedModelBehavior

from backcast.errors import FatalError, RunError, TransientError, UsageError
from backcast.llm import NO_MODEL
from backcast.llm.completions import NotCompletions, TooSlow
from backcast.llm.streaming import is_json
from backcast.settings import Model
from backcast.targets import Misfit

_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_TOO_LONG = ("context_length_exceeded", "exceed_context_size_error", "string_above_max_length")
_SAYS_TOO_LONG = re.compile(
    r"maximum (context|prompt|input) length|(prompt|input) is too long|input token count|context limit", re.IGNORECASE
)
"""In the message of a status 400, as vLLM, Anthropic, Gemini and others have no code for it."""
_SAYS_WRONG_KEY = re.compile(r"api key (not valid|not found|expired)", re.IGNORECASE)
"""In the message of Gemini's status 400."""


class Unfinished(Exception):
    """An answer was cut or filtered, also when it was asked for again; the finish reason says which."""


def explain(error: Exception, model: Model, answer: str, misfit: Misfit | None) -> RunError:
    """The run's error for an exception out of Marvin; an unknown one counts as passing.

    `answer` is the model's latest one, and `misfit` the reason why it does not fit, if it could be read at all.
    """
    match error:
        case RunError():
            return error
        case ModelHTTPError():
            return _refusal(error, model)
        case ModelAPIError() | UnicodeEncodeError(encoding="ascii"):
            return _unreachable(error, model)
        case TooSlow():
            return _late(model)
        case ContentFilterError():
            return _filtered()
        case Unfinished(args=("content_filter",)):
            return _filtered()
        case Unfinished():
            return UsageError(
                f"The answer was cut at {model.max_tokens} tokens, and again with more room: ask for less, or raise "
                "BACKCAST_MODEL__MAX_TOKENS.",
                code="model_answer_too_long",
            )
        case NotCompletions():
            return FatalError(
                "The model's server does not answer as OpenAI's API does: check BACKCAST_MODEL__BASE_URL, which "
                "usually ends with /v1.",
                code="model_unusable",
            )
        case UnexpectedModelBehavior():
            return _unfit(answer, model, misfit)
        case _:
            return TransientError(f"Asking the model failed ({type(error).__name__}).", code="model_failed")


def _filtered() -> RunError:
    return UsageError("The model refused to work on this input: change the data.", code="model_refused_input")


def _unfit(answer: str, model: Model, misfit: Misfit | None) -> RunError:
    if misfit is not None:
        reason = str(misfit) if model.excerpt else f"{misfit.place or 'the value'} breaks the rule {misfit.rule!r}."
    elif not answer.strip():
        reason = "it was empty."
    else:
        reason = "it is JSON without the field `result`." if is_json(answer) else "it is not JSON."
    return UsageError(
        f"The model's answer does not fit the target, also when asked again: {_redacted(reason, model)}"
        f"{_excerpt('It answered', answer, model)} Make the target or the instructions clearer, or use a larger model.",
        code="model_answer_invalid",
    )


def _excerpt(who: str, text: str, model: Model) -> str:
    text = " ".join(_redacted(text, model).split())
    if not text or not model.excerpt:
        return ""
    return f" {who}: {text[: model.excerpt]}{'…' if len(text) > model.excerpt else ''}"


def _redacted(text: str, model: Model) -> str:
    key = model.api_key.get_secret_value() if model.api_key else ""
    for secret in (key, json.dumps(key)[1:-1]) if key else ():
        text = text.replace(secret, "***")
    return text


def _late(model: Model) -> RunError:
    return TransientError(f"The model did not answer within {model.timeout}.", code="model_timeout")


def _unreachable(error: Exception, model: Model) -> RunError:
    causes = list(_chain(error))
    if any(isinstance(cause, openai.APITimeoutError) for cause in causes):
        return _late(model)
    reason = next((reason for cause in causes if (reason := _for_good(cause, model))), None)
    if reason is not None:
        return FatalError(f"The model can't be reached: {reason}.", code="model_unreachable")
    if model.is_unset and any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        return FatalError(NO_MODEL, code="model_not_set_up")
    where = "BACKCAST_MODEL__BASE_URL" if model.base_url else f"port {model.port}"
    return TransientError(f"The model can't be reached: is its server up ({where})?", code="model_unavailable")


def _for_good(cause: BaseException, model: Model) -> str | None:
    """The reason why this connection will never work, whoever asks again."""
    match cause, type(cause).__name__:  # by name: which HTTP client OpenAI's package takes is its own affair
        case _, "UnsupportedProtocol" | "InvalidURL":
            return "BACKCAST_MODEL__BASE_URL is no http or https URL"
        case _, "UnicodeEncodeError" | "LocalProtocolError":
            return "BACKCAST_MODEL__API_KEY has a character that no header can hold"
        case ssl.SSLCertVerificationError(), _:
            return "its certificate is not trusted; add its authority to SSL_CERT_FILE"
        case ssl.SSLError(), _ if "WRONG_VERSION_NUMBER" in str(cause):
            return "it does not speak TLS; BACKCAST_MODEL__BASE_URL may need http in place of https"
        case socket.gaierror(errno=socket.EAI_NONAME), _ if not model.embedded:  # a container's name comes with it
            return "its host name is unknown; check BACKCAST_MODEL__BASE_URL"
        case _:
            return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _refusal(error: ModelHTTPError, model: Model) -> RunError:
    status, codes = error.status_code, _codes(error.body)
    after = _retry_after(error.__cause__)
    if status == 429 and codes & set(_QUOTA):
        return FatalError("The provider's quota is used up: check its plan and billing.", code="model_quota")
    if status == 429:
        return TransientError("The model is overloaded (HTTP 429).", code="model_overloaded", retry_after=after)
    message = _message(error.body) if status == 400 else ""
    if status in (401, 403) or _SAYS_WRONG_KEY.search(message):
        return FatalError("The provider refuses the key: check BACKCAST_MODEL__API_KEY.", code="model_refused_key")
    if status == 402:
        return FatalError("The provider wants to be paid first: check its plan and billing.", code="model_quota")
    if status in (404, 405):
        return FatalError(
            f"The provider does not know the model {error.model_name}: check BACKCAST_MODEL__NAME and "
            "BACKCAST_MODEL__BASE_URL.",
            code="model_unknown",
        )
    if _SAYS_TOO_LONG.search(message) or codes & set(_TOO_LONG) or status == 413:
        return UsageError("The data is too long for the model: cut or split it.", code="input_too_long")
    if "content_filter" in codes:
        return _filtered()
    if status in (408, 409, 425) or status >= 500:
        words = f"The model's server failed (HTTP {status})."
        return TransientError(words, code="model_unavailable", retry_after=after)
    return FatalError(
        f"The model's server refuses the request (HTTP {status}): the target may use something it does not support."
        f"{_excerpt('It says', _message(error.body), model)}",
        code="model_refused_request",
    )


def _message(body: Any) -> str:
    error = _error(body)
    return str((error.get("message") or "") if isinstance(error, dict) else error or "")


def _codes(body: Any) -> set[str]:
    error = _error(body)
    return {str(error.get(key)) for key in ("code", "type")} if isinstance(error, dict) else set()


def _error(body: Any) -> Any:
    while isinstance(body, list) and len(body) == 1:  # Gemini's is in a list
        body = body[0]
    return body.get("error", body) if isinstance(body, dict) else body


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
