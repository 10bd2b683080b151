"""The wire format of the HTTP interface: decides how a request is written, how an answer is read, and when to send
again.
"""

import json
import random
import time
from collections.abc import Generator, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeAlias, TypedDict, TypeVar
from urllib.parse import quote
from uuid import UUID, uuid4

import httpx
from pydantic import BaseModel, ValidationError

from backcast import names
from backcast.errors import (
    BackcastError,
    ClientError,
    ConfigurationError,
    FieldError,
    InvalidInput,
    TooManyWaiting,
    Unavailable,
)
from backcast.models import IDEMPOTENCY_KEY, JSON, KEY_RULE, Submission
from backcast.process.outages import backoff

T = TypeVar("T")
Noun = TypeVar("Noun", bound=BaseModel)


class SubmitOptions(TypedDict, total=False):
    """The fields of a `Submission` beside its input."""

    owner: str
    priority: int
    run_at: datetime | None
    deadline: datetime | None
    lane: str | None
    metadata: dict[str, str]


class Ask(NamedTuple):
    method: str
    url: str
    params: Mapping[str, str] = {}
    content: bytes | None = None
    headers: Mapping[str, str] = {}
    timeout: float = 10.0


Flow: TypeAlias = Generator[Ask | float, httpx.Response | httpx.TransportError | None, T]


def answered(ask: Ask, patience: float) -> Flow[httpx.Response]:
    """Send `ask` until it is answered; give up after `patience` seconds of outage or "come back later"."""
    give_up = time.monotonic() + patience
    delays = backoff(0.1, 5.0)
    while True:
        got = yield ask
        assert got is not None  # only pauses are answered with nothing
        if isinstance(got, httpx.Response):
            if got.is_success:
                return got
            trouble, retry_after = refusal(got), got.headers.get("Retry-After", "")
            if got.status_code not in (429, 502, 503, 504):
                raise trouble
        else:
            trouble, retry_after = silence(got), ""
        seconds = max(next(delays), float(retry_after) if retry_after.isdecimal() else 0.0)
        seconds *= random.uniform(1.0, 1.5)  # noqa: S311  # so that clients do not all come back together
        if time.monotonic() + seconds > give_up:
            raise trouble
        yield seconds


# Requests


def connection(url: str, headers: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"{url!r} is not a URL ({error}): write it as http://host:port.") from None
    if address.scheme not in ("http", "https") or not address.host:
        raise ConfigurationError(f"{url!r} is not the URL of a service: write it as http://host:port.")
    return {
        "base_url": address,
        "headers": headers,
        "follow_redirects": True,  # a large result may lie in the store; our key stays with the service
        "verify": address.scheme == "https",  # reading the certificate authorities takes 40 ms
        # Never through the environment's proxy:
        "mounts": {"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None},
    }


def to_httpx(ask: Ask) -> dict[str, Any]:
    timeout = httpx.Timeout(ask.timeout, connect=min(5.0, ask.timeout))
    return ask._asdict() | {"timeout": timeout}


def run_path(run_id: UUID | str) -> str:
    return f"/v1/runs/{quote(str(run_id), safe='')}"


def lane_path(name: str) -> str:
    return f"/v1/lanes/{segment(name)}"


def task_path(name: str) -> str:
    return f"/v1/tasks/{segment(name)}"


def segment(name: str) -> str:
    """A name in a path. Raises `InvalidInput`."""
    try:
        return quote(names.check(name), safe="")
    except ValueError as error:
        raise InvalidInput(f"{name!r} is no name: {error}.") from None


def post_headers(key: str | None) -> dict[str, str]:
    return {"Content-Type": "application/json", "Idempotency-Key": uuid4().hex if key is None else _header(key)}


def _header(key: str) -> str:
    if not IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidInput(KEY_RULE)
    return key


def body_of(submission: Submission | Mapping[str, JSON], given: SubmitOptions) -> bytes:
    try:
        if not isinstance(submission, Submission):
            submission = Submission(input=dict(submission), **given)
        elif given:
            submission = Submission.model_validate({**dict(submission), **given})
        options = submission.model_dump(mode="json", exclude_defaults=True, exclude={"input"})
        # Not by pydantic, which would send NaN as null.
        return json.dumps(options | {"input": submission.input}, allow_nan=False, ensure_ascii=False).encode()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidInput(f"{'/'.join(map(str, first['loc']))}: {first['msg']}.") from None
    except (ValueError, TypeError) as error:  # NaN, a lone surrogate, an object that is no JSON value
        raise InvalidInput(f"The input is not plain JSON: {error}.") from None


def json_of(model: type[BaseModel], given: Mapping[str, Any]) -> bytes:
    """What is given of `model`'s fields, checked by it. Raises `InvalidInput`."""
    try:
        checked = model.model_validate(dict(given)).model_dump(mode="json", include=set(given))
        return json.dumps(checked, allow_nan=False, ensure_ascii=False).encode()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidInput(f"{'/'.join(map(str, first['loc']))}: {first['msg']}.") from None
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"This is not plain JSON: {error}.") from None


# Answers


def read(noun: type[Noun], answer: httpx.Response) -> Noun:
    try:
        return noun.model_validate_json(answer.content, extra="ignore")  # a newer service may send more
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise _foreign(answer, ": ".join([*map(str, first["loc"]), first["msg"]])) from None


def read_line(noun: type[Noun], answer: httpx.Response, line: bytes) -> Noun:
    """A noun of an answer in JSON Lines."""
    try:
        return noun.model_validate_json(line, extra="ignore")
    except ValidationError as error:
        raise _foreign(answer, error.errors(include_input=False, include_url=False)[0]["msg"]) from None


def read_json(answer: httpx.Response) -> JSON:
    try:
        return answer.json()
    except ValueError as error:
        raise _foreign(answer, str(error)) from None


def _foreign(answer: httpx.Response, why: str) -> ConfigurationError:
    return ConfigurationError(f"{answer.url} does not answer as backcast does ({why}): check the URL.")


def silence(error: httpx.TransportError) -> Unavailable:
    url, why = error.request.url, str(error) or type(error).__name__
    return Unavailable(f"{url.scheme}://{url.netloc.decode()} can't be reached ({why}): is the service running there?")


def _kinds(root: type[BackcastError]) -> dict[str, type[BackcastError]]:
    kinds = {root.code: root}
    for kind in root.__subclasses__():
        kinds |= _kinds(kind)
    return kinds


_KINDS = _kinds(ClientError) | _kinds(Unavailable)


def refusal(answer: httpx.Response) -> BackcastError:
    """The error of our tree for a problem document; the nearest one if its code is not known here."""
    is_away = answer.status_code == 429 or answer.status_code >= 500
    try:
        problem = answer.json()
        code, title = str(problem["code"]), str(problem["title"])
        detail = str(problem.get("detail") or title)
        errors = tuple(FieldError(str(e["pointer"]), str(e["detail"])) for e in problem.get("errors") or ())
    except (ValueError, TypeError, KeyError, AttributeError):  # a proxy's page, or another service
        answered = f"{answer.status_code} {answer.reason_phrase}".strip()
        return Unavailable(f"{answer.url} answered {answered}.") if is_away else _foreign(answer, answered)
    kind = _KINDS.get(code, Unavailable if is_away else ClientError)
    if issubclass(kind, TooManyWaiting):
        retry_after = answer.headers.get("Retry-After", "")
        error = kind(detail, retry_after=timedelta(seconds=int(retry_after) if retry_after.isdecimal() else 30))
    else:
        error = kind(detail, errors=errors) if issubclass(kind, ClientError) else kind(detail)
    vars(error).update(code=code, title=title, status=answer.status_code)
    return error
