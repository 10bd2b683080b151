"""Runs a real PgBouncer (Debian's package `pgbouncer`) in front of a test's PostgreSQL, whose owner it runs as."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.support.stack import free_port

BINARY = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")


@contextlib.contextmanager
def pgbouncer(database: str, folder: Path, **settings: object) -> Iterator[str]:
    """The URL of the same database, through the pooler; its log is `pgbouncer.log` in the folder."""
    assert BINARY is not None
    where, port = urlsplit(database), free_port()
    socket = Path(parse_qs(where.query)["host"][0])
    given = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "default_pool_size": 50,
        **settings,
    }
    lines = ["[databases]", f"* = host={socket} user=postgres", "[pgbouncer]"]
    config = folder / f"pgbouncer-{port}.ini"
    config.write_text("\n".join([*lines, *(f"{name} = {value}" for name, value in given.items())]))
    owner = socket.stat()
    command = [BINARY, str(config)]
    if os.geteuid() == 0:
        who = [f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups"]
        through = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]  # the folders of tests are root's own
        command = ["setpriv", *who, *through, *command]
    with (folder / "pgbouncer.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}{where.path}"
    finally:
        process.terminate()
        process.wait()
