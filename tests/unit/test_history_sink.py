"""The credentials that the sink sends to a Prefect server: basic auth, or the key of Prefect Cloud."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from backcast.history.sink import Sink
from backcast.settings import Prefect
from tests.support.waiting import PATIENCE


class _Server(BaseHTTPRequestHandler):
    shown: ClassVar[list[str | None]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.shown.append(self.headers["authorization"])
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("given", "shown"),
    [({}, None), ({"auth_string": "me:a:b"}, "Basic bWU6YTpi"), ({"api_key": "pnu_secret"}, "Bearer pnu_secret")],
)
async def test_credentials(given: dict[str, str], shown: str | None) -> None:
    _Server.shown.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.02,))
        serving.start()
        sink = Sink(Prefect.model_validate({"api_url": f"http://127.0.0.1:{server.server_port}/api", **given}))
        sink.keep_log({"message": "hello"})
        await sink.aclose(timeout=PATIENCE)
        server.shutdown()
        serving.join()
    assert _Server.shown == [shown]
    assert ("PREFECT_API_KEY" in Prefect.model_validate(given).environment()) == ("api_key" in given)
