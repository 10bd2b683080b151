"""The wire format of the HTTP interface: decides how a request is written, how an answer is read, and when to send
again.
"""

import json
import math
import random
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar
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
from backcast.models import IDEMPOTENCY_KEY, JSON, KEY_RULE
from backcast.process.outages import backoff

T = TypeVar("T")
Noun = TypeVar("Noun", bound=BaseModel)


class Ask(NamedTuple):
    method: str
    url: str
    params: Mapping[str, str] = {}
    content: bytes | None = None
    headers: Mapping[str, str] = {}
    timeout: float = 10.0
    patience: float | None = None
    """Seconds of outage, or of "come back later", after which its error is raised; None: those of the client."""
    within: float = math.inf
    """Seconds after which it is raised in any case."""


Flow: TypeAlias = Generator[Ask | float, httpx.Response, T]
"""An exchange with the service: it yields requests, or seconds to pause, and is sent the answers; errors are thrown in.
It knows nothing of how they are performed."""
Steps: TypeAlias = Generator[Ask | float, httpx.Response | httpx.TransportError | None, T]
"""As `Flow`, with what happens to each single request."""


def patiently(flow: Flow[T], patience: float) -> Steps[T]:
    """The steps of a flow, each of whose requests is sent until it is answered."""
    try:
        step = next(flow)
        while True:
            if isinstance(step, Ask):
                try:
                    answer = yield from _answered(step, patience)
                except BackcastError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
            else:
                yield step
                step = next(flow)
    except StopIteration as end:
        return end.value


def _answered(ask: Ask, patience: float) -> Steps[httpx.Response]:
    give_up = time.monotonic() + min(patience if ask.patience is None else ask.patience, ask.within)
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
    for name, value in (headers or {}).items():  # now, as httpx quotes the value that it can't send
        if not (value.isascii() and value.isprintable()):
            raise ConfigurationError(f"The header {name} can't be sent: its value must be printable ASCII.")
    return {
        "base_url": address,
        "headers": headers,
        "follow_redirects": True,  # a large result may lie in the store; our key stays with the service
        "verify": address.scheme == "https",  # reading the certificate authorities takes 40 ms
        # Never through the environment's proxy:
        "mounts": {"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None},
    }


def to_httpx(ask: Ask) -> dict[str, Any]:
    # Calls beyond the number of connections wait for one as long as it takes: that is no silence of the service, and
    # hundreds that gave up and came again would keep the pool so busy that none of them got one.
    pool = None if ask.within == math.inf else ask.timeout
    timeout = httpx.Timeout(ask.timeout, connect=min(5.0, ask.timeout), pool=pool)
    return {
        "method": ask.method,
        "url": ask.url,
        "params": ask.params,
        "content": ask.content,
        "headers": ask.headers,
        "timeout": timeout,
    }


def path(noun: str, which: UUID | str, verb: str = "") -> str:
    """The path of one thing that has an id."""
    return f"/v1/{noun}/{quote(str(which), safe='')}{verb}"


def named(noun: str, name: str, verb: str = "") -> str:
    """The path of one thing that has a name. Raises `InvalidInput`."""
    try:
        return path(noun, names.check(name), verb)
    except ValueError as error:
        raise InvalidInput(f"{name!r} is no name: {error}.") from None


def get(path: str) -> Flow[httpx.Response]:
    return (yield Ask("GET", path))


def post(path: str, body: bytes | None = None) -> Flow[httpx.Response]:
    return (yield json_request("POST", path, body))


def json_request(method: str, path: str, body: bytes | None) -> Ask:
    return Ask(method, path, {}, body, {} if body is None else _JSON)


def once(path: str, body: bytes | None, key: str | None) -> Ask:
    """A POST that takes an Idempotency-Key; one is made up when none is given."""
    if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidInput(KEY_RULE)
    return Ask("POST", path, {}, body, _JSON | {"Idempotency-Key": uuid4().hex if key is None else key})


_JSON = {"Content-Type": "application/json"}


@contextmanager
def valid(what: str) -> Iterator[None]:
    """Raise `InvalidInput` for what its model refuses, and for values that are no JSON."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidInput(f"{'/'.join(map(str, first['loc']))}: {first['msg']}.") from None
    except (ValueError, TypeError) as error:  # NaN, a lone surrogate, an object that is no JSON value
        raise InvalidInput(f"{what} is not plain JSON: {error}.") from None


def encoded(value: JSON) -> bytes:
    """Not by pydantic, which would send NaN as null."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


def checked(model: type[BaseModel], given: Mapping[str, Any]) -> dict[str, JSON]:
    """What is given of `model`'s fields, checked by it, as JSON values. Raises `InvalidInput`."""
    with valid("This"):
        return model.model_validate(dict(given)).model_dump(mode="json", include=set(given))


def body_of(model: type[BaseModel], given: Mapping[str, Any]) -> bytes:
    with valid("This"):
        return encoded(checked(model, given))


# Answers


def read(noun: type[Noun], answer: httpx.Response) -> Noun:
    try:
        return noun.model_validate_json(answer.content, extra="ignore")  # a newer service may send more
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise foreign(answer, ": ".join([*map(str, first["loc"]), first["msg"]])) from None


class _Items(BaseModel, Generic[Noun]):
    items: list[Noun]


def read_items(noun: type[Noun], answer: httpx.Response) -> list[Noun]:
    """The nouns of a list that has no pages."""
    return read(_Items[noun], answer).items


def read_lines(noun: type[Noun], answer: httpx.Response) -> list[Noun]:
    """The nouns of an answer in JSON Lines."""
    try:
        return [noun.model_validate_json(line, extra="ignore") for line in answer.content.splitlines()]
    except ValidationError as error:
        raise foreign(answer, error.errors(include_input=False, include_url=False)[0]["msg"]) from None


def read_json_lines(answer: httpx.Response) -> list[JSON]:
    try:
        return [json.loads(line) for line in answer.content.splitlines()]
    except ValueError as error:
        raise foreign(answer, str(error)) from None


def read_json(answer: httpx.Response) -> JSON:
    try:
        return answer.json()
    except ValueError as error:
        raise foreign(answer, str(error)) from None


def foreign(answer: httpx.Response, why: str) -> ConfigurationError:
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
        return Unavailable(f"{answer.url} answered {answered}.") if is_away else foreign(answer, answered)
    kind = _KINDS.get(code, Unavailable if is_away else ClientError)
    if issubclass(kind, TooManyWaiting):
        retry_after = answer.headers.get("Retry-After", "")
        error = kind(detail, retry_after=timedelta(seconds=int(retry_after) if retry_after.isdecimal() else 30))
    else:
        error = kind(detail, errors=errors) if issubclass(kind, ClientError) else kind(detail)
    vars(error).update(code=code, title=title, status=answer.status_code)
    return error
