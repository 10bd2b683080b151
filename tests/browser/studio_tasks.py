"""Tasks of a pool that is in trouble: one kills its executor, and one is needed when no worker is left."""

import os
import signal

from prefect import task


@task
async def decode(film: str) -> None:
    """Decodes a film, with a library that crashes."""
    os.kill(os.getpid(), signal.SIGKILL)


@task
async def render(scene: int) -> int:
    """Renders a scene."""
    return scene
