"""A real S3 server (SeaweedFS from its wheel) on free loopback ports, over a folder that outlives it."""

import contextlib
import json
import random
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.support.waiting import PATIENCE


@dataclass
class S3Server:
    """Stopped and started again, it has the same address and objects. Buckets are made by CreateBucket only."""

    folder: Path
    access_key: str = "test-access-key"
    secret_key: str = "test-secret-key"
    _ports: list[int] = field(default_factory=lambda: free_ports(10), repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    def command(self) -> list[str]:
        """The command that starts it; makes the files that it needs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = {"accessKey": self.access_key, "secretKey": self.secret_key}
        config = {"identities": [{"name": "test", "credentials": [identity], "actions": ["Admin"]}]}
        (self.folder / "s3.json").write_text(json.dumps(config))
        names = ("s3", "master", "volume", "filer", "admin")
        ports = [f"-{name}.port={port}" for name, port in zip(names, self._ports[:5], strict=True)]
        ports += [f"-{name}.port.grpc={port}" for name, port in zip(names, self._ports[5:], strict=True)]
        return [
            str(Path(sys.executable).with_name("weed")),
            "mini",
            f"-dir={self.folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.config={self.folder / 's3.json'}",
            "-s3.autoCreateBucket=false",
            "-s3.iam=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
            "-volume.max=1000",  # else one for each free GB of the disk, and every bucket takes one
            *ports,
        ]

    def start(self, *, timeout: float = PATIENCE) -> None:
        """Returns once it has taken a write."""
        command, log = self.command(), self.folder / "weed.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(command, cwd=self.folder, stdout=output, stderr=output)
        deadline = time.monotonic() + timeout
        while seen := self.why_not_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"weed does not answer; last seen: {seen}\n{log.read_text()[-3000:]}")
            time.sleep(0.05)

    def client(self) -> Any:
        """A plain S3 client, without the product's own code."""
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}, connect_timeout=10, read_timeout=10),
        )

    def why_not_ready(self) -> str:
        """The reason why it takes no write yet; empty once it does."""
        if (seen := self._answer()) != 403:
            return f"not yet a refusal of who has no key: {seen}"
        client, name = self.client(), f"ready-{secrets.token_hex(8)}"
        try:
            client.create_bucket(Bucket=name)
            client.put_object(Bucket=name, Key="it", Body=b"is")
            client.delete_object(Bucket=name, Key="it")
            client.delete_bucket(Bucket=name)
        except (ClientError, BotoCoreError) as error:
            return str(error)
        return ""

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()  # acknowledged objects are on disk; a clean shutdown takes two seconds
            self._process.wait()
            self._process = None

    def _answer(self) -> int | str:
        """The status of a request without a key."""
        try:
            with urllib.request.urlopen(self.url, timeout=10) as response:
                return response.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError as error:
            return str(error)


def free_ports(count: int) -> list[int]:
    """Different ports that were free a moment ago, below those that systems give to outgoing connections: they stay
    free while their server is down."""
    found: list[int] = []
    for port in random.sample(range(10_000, 32_768), 1000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    server = S3Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
