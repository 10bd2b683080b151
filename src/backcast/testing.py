"""A fake model, shipped for tests and load tests: a server that answers by script, over real HTTP.

    with ScriptedModel([Reply(status=429, retry_after=2), Reply(31)]) as model:
        settings.Model(backend="openai", base_url=model.url, api_key="any")

`python -m backcast.testing PORT [HOST]` serves the default script: a tiny deterministic extractor whose answers always
have the wanted shape. It knows OpenAI's chat completions (tool calls, JSON schemas, streaming) and nothing else of
ours.
"""

import json
import math
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

JSON = Any

PIECE = 8
"""Characters of an answer that are streamed at a time."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer, or one way to fail."""

    value: JSON = None
    """The answer, as a JSON value of the wanted shape (or of another, to see the effect)."""
    raw: str | None = None
    """Sent in place of the encoded answer: broken JSON, for example."""
    as_text: bool = False
    """Answer in prose, although a tool call was asked for."""
    finish: str | None = None
    """The `finish_reason`; `length` also cuts the answer in half."""
    refusal: str | None = None
    """Refuse with this message."""
    status: int = 200
    code: str | None = None
    """`error.code` of a status that is not 200."""
    message: str = "scripted failure"
    retry_after: str | float | None = None
    delay: float = 0
    """Seconds before the answer."""
    drop: bool = False
    """Close the connection instead of answering."""
    page: JSON = None
    """Sent in place of a completion or of an error: a text as HTML, anything else as JSON."""
    envelope: JSON = None
    """Changes to the completion around the answer, as an object."""
    before_piece: Callable[[str], object] | None = None
    """Called before each piece of an answer that is streamed, with what was sent before it; it may wait, or raise
    `OSError` to break off."""
    streams: bool = True
    """Whether it can be streamed; else a request for that is answered in one piece."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request that the server received."""

    body: dict[str, Any]
    headers: dict[str, str]
    """Names in lower case."""

    @property
    def schema(self) -> dict[str, Any] | None:
        """JSON Schema of the answer: of the only tool's parameters, or of the response format."""
        match self.body:
            case {"tools": [{"function": {"parameters": dict(schema)}}, *_]}:
                return schema
            case {"response_format": {"json_schema": {"schema": dict(schema)}}}:
                return schema
            case _:
                return None

    @property
    def questions(self) -> list[str]:
        """The user's messages, as text."""
        return [_text(m["content"]) for m in self.body.get("messages", []) if m.get("role") == "user"]

    @property
    def text(self) -> str:
        """The data in the prompt, by the marks of Marvin's prompts or of the embedded model's."""
        for question in reversed(self.questions):
            if found := re.search(r"<Data to \w+>(.*)</Data to \w+>", question, re.DOTALL):
                return found[1].strip()
            if found := re.match(r"Text: (.*)\n(?:Wanted|Labels): ", question, re.DOTALL):
                return found[1].strip()
        return self.questions[-1] if self.questions else ""


Script = Callable[[Request], Reply]


def extract(request: Request) -> Reply:
    """The default script: fills the wanted shape from the text, the same way every time.

    Numbers are taken in order, lists are the text's words or numbers, strings are the text, a label is one that the
    text mentions, else the first.
    """
    whole = request.schema or {}
    schema = whole.get("properties", {}).get("result", {"type": "string"})
    return Reply(_fill(_resolved(schema, whole.get("$defs", {})), request.text, iter(_numbers(request.text))))


class ScriptedModel:
    """A server, on loopback by default, from `with` to its end. `requests` has every request so far.

    Replies of a list are given in order, then the last one again and again.
    """

    def __init__(self, replies: Iterable[Reply] | Script = extract, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.requests: list[Request] = []
        self._script = replies if callable(replies) else _in_order(replies)
        self._address = host, port
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        self._server = _Server(self._address, self._reply)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def _reply(self, request: Request) -> Reply:
        self.requests.append(request)
        reply = self._script(request)
        self._closing.wait(reply.delay)
        return reply


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], reply: Script) -> None:
        super().__init__(address, _Exchange)
        self.reply = reply
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        for connection in list(self._open):  # kept-alive ones would hold their threads
            self.shutdown_request(connection)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients may leave whenever they like


class _Exchange(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self._send(
            200, {"status": "ok"} if self.path == "/health" else {"object": "list", "data": [{"id": "scripted"}]}
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = Request(body, {name.lower(): value for name, value in self.headers.items()})
        assert isinstance(self.server, _Server)
        reply = self.server.reply(request)
        if reply.drop:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif reply.page is not None:
            self._send(reply.status, reply.page)
        elif reply.status != 200:
            error = {"error": {"message": reply.message, "type": reply.code, "code": reply.code, "param": None}}
            after = {} if reply.retry_after is None else {"Retry-After": str(reply.retry_after)}
            self._send(reply.status, error, after)
        elif body.get("stream") and reply.streams:
            self._stream(_completion(request, reply), reply)
        else:
            self._send(200, _completion(request, reply) | (reply.envelope or {}))

    def _send(self, status: int, content: JSON, headers: dict[str, str] | None = None) -> None:
        is_page = isinstance(content, str)
        payload = content.encode() if is_page else json.dumps(content).encode()
        self.send_response(status)
        kind = "text/html" if is_page else "application/json"
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def _stream(self, completion: dict[str, Any], reply: Reply) -> None:
        choice, usage = completion["choices"][0], completion.pop("usage")
        message, finish = choice["message"], choice["finish_reason"]
        head = completion | {"object": "chat.completion.chunk"}
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()

        def send(choices: list[dict[str, Any]], **extra: JSON) -> None:
            self.wfile.write(f"data: {json.dumps(head | {'choices': choices} | extra)}\n\n".encode())

        for sent, delta in _pieces(message):
            if reply.before_piece is not None:
                reply.before_piece(sent)
            send([{"index": 0, "delta": delta, "finish_reason": None}])
        send([{"index": 0, "delta": {}, "finish_reason": finish}])
        send([], usage=usage)
        self.wfile.write(b"data: [DONE]\n\n")


def _pieces(message: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The answer in pieces of `PIECE` characters, each with what comes before it."""
    calls = message.get("tool_calls")
    text = calls[0]["function"]["arguments"] if calls else message["content"] or ""
    for at in range(0, max(len(text), 1), PIECE):
        piece, first = text[at : at + PIECE], message if at == 0 else {}
        if calls:
            function = {**(calls[0]["function"] if at == 0 else {}), "arguments": piece}
            yield (
                text[:at],
                {**first, "tool_calls": [{**(calls[0] if at == 0 else {}), "index": 0, "function": function}]},
            )
        else:
            yield text[:at], {**first, "content": piece}


def _completion(request: Request, reply: Reply) -> dict[str, Any]:
    answer = json.dumps({"result": reply.value}) if reply.raw is None else reply.raw
    if reply.finish == "length":
        answer = answer[: len(answer) // 2]
    message: dict[str, Any] = {"role": "assistant", "content": None}
    finish = "stop"
    if reply.refusal is not None:
        message["refusal"] = reply.refusal
    elif (tools := request.body.get("tools")) and not reply.as_text:
        call = {"name": tools[0]["function"]["name"], "arguments": answer}
        message["tool_calls"] = [{"id": "call_1", "type": "function", "function": call}]
        finish = "tool_calls"
    else:
        message["content"] = answer
    asked, answered = len(json.dumps(request.body["messages"])) // 4, len(answer) // 4 + 1
    return {
        "id": "chatcmpl-scripted",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.body.get("model", "scripted"),
        "choices": [
            {"index": 0, "message": message, "finish_reason": finish if reply.finish is None else reply.finish}
        ],
        "usage": {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered},
    }


def _in_order(replies: Iterable[Reply]) -> Script:
    waiting = list(replies)
    lock = threading.Lock()

    def script(_: Request) -> Reply:
        with lock:
            return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    return script


def _text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def _numbers(text: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", text)]


_FORMATS = {
    "date": (r"\d{4}-\d\d-\d\d", "2000-01-01"),
    "date-time": (r"\d{4}-\d\d-\d\dT[\d:.]+(?:Z|[+-]\d\d:\d\d)", "2000-01-01T00:00:00Z"),
    "time": (r"\d\d:\d\d:\d\d", "00:00:00Z"),
    "email": (r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", "nobody@example.com"),
    "uri": (r"https?://\S+", "https://example.com/"),
    "uuid": (r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", "00000000-0000-4000-8000-000000000000"),
}


def _resolved(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema with each definition in the place of its reference, once; after that anything will do."""
    match schema:
        case {"$ref": str(reference)}:
            name = reference.rpartition("/")[2]
            others = {key: value for key, value in definitions.items() if key != name}
            return _resolved(definitions.get(name, False), others)
        case dict():
            resolved = {key: _resolved(value, definitions) for key, value in schema.items() if key != "properties"}
            fields = schema.get("properties", {}).items()
            needed = {
                name: _resolved(field, definitions)
                for name, field in fields
                if name in schema.get("required", ()) or "$ref" not in json.dumps(field)
            }
            return resolved | {"properties": needed} if fields else resolved
        case list():
            return [one for each in schema if (one := _resolved(each, definitions)) is not False]
        case _:
            return schema


def _fill(schema: Any, text: str, numbers: Iterator[float]) -> JSON:
    match schema:
        case {"const": value}:
            return value
        case {"enum": [first, *others]}:
            return next((v for v in [first, *others] if str(v).lower() in text.lower()), first)
        case {"anyOf": [first, *_]} | {"oneOf": [first, *_]} | {"allOf": [first, *_]}:
            return _fill(first, text, numbers)
        case {"type": [first, *_]}:
            return _fill({**schema, "type": first}, text, numbers)
        case {"type": "object"} | {"properties": _}:
            return {name: _fill(field, text, numbers) for name, field in schema.get("properties", {}).items()}
        case {"type": "array"}:
            return _fill_list(schema, text, numbers)
        case {"type": "integer"}:
            return int(_within(schema, next(numbers, 0)))
        case {"type": "number"}:
            return _within(schema, next(numbers, 0.0))
        case {"type": "boolean"}:
            return not re.search(r"\b(no|not|never|false)\b", text.lower())
        case {"type": "null"}:
            return None
        case {"format": form} if form in _FORMATS:
            pattern, default = _FORMATS[form]
            found = re.search(pattern, text)
            return found[0] if found else default
        case {"type": "string"}:
            return text[: schema.get("maxLength")].ljust(schema.get("minLength", 0), ".")
        case _:
            return text


def _fill_list(schema: dict[str, Any], text: str, numbers: Iterator[float]) -> list[JSON]:
    items = schema.get("items", {})
    if items is False or "prefixItems" in schema:
        return [_fill(place, text, numbers) for place in schema.get("prefixItems", [])]
    match items:
        case {"type": "integer" | "number"}:
            values = [_fill(items, text, iter([n])) for n in numbers]
        case {"type": "string"} if not {"enum", "format"} & items.keys():
            values = [_fill(items, word, numbers) for word in re.findall(r"[\w@.-]*\w", text)]
        case _:
            values = [_fill(items, text, numbers)]
    if schema.get("uniqueItems"):
        values = [value for i, value in enumerate(values) if value not in values[:i]]
    values += [_fill(items, text, numbers) for _ in range(schema.get("minItems", 0) - len(values))]
    return values[: schema.get("maxItems")]


def _within(schema: dict[str, Any], value: float) -> float:
    low = schema.get("minimum", schema.get("exclusiveMinimum", -math.inf) + 1)
    high = schema.get("maximum", schema.get("exclusiveMaximum", math.inf) - 1)
    return min(max(value, low), high)


if __name__ == "__main__":
    with ScriptedModel(port=int(sys.argv[1]), host=(sys.argv[2:] or ["127.0.0.1"])[0]) as model:
        print(f"serving {model.url}", flush=True)
        threading.Event().wait()
