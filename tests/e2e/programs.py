"""Runs the programs that the tests call: docker, helm, kubectl, kind and make. Each call has a deadline; the error of a
failed one has its command and its output."""

import asyncio
import logging
import shlex
import shutil
import time
from dataclasses import dataclass

log = logging.getLogger("e2e")


@dataclass(frozen=True)
class Done:
    command: str
    code: int
    out: str
    err: str

    @property
    def output(self) -> str:
        return "\n".join(filter(None, (self.out.strip(), self.err.strip())))


async def run(
    *command: str, stdin: str | None = None, timeout: float = 120, check: bool = True, env: dict[str, str] | None = None
) -> Done:
    """Run a program to its end. With `check`, an end other than 0 is an AssertionError."""
    shown = shlex.join(command)
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(None if stdin is None else stdin.encode()), timeout)
    except TimeoutError:
        raise AssertionError(f"after {timeout:g} s there was no end of: {shown}") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    done = Done(shown, process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))
    assert not check or done.code == 0, f"{shown} ended with {done.code}:\n{done.output[-6000:]}"
    return done


async def run_aloud(*command: str, timeout: float, env: dict[str, str] | None = None) -> Done:
    """Run a program that takes long, and log its command and duration."""
    began = time.monotonic()
    done = await run(*command, timeout=timeout, env=env)
    log.info("%s: %.0f s", done.command[:150], time.monotonic() - began)
    return done


def missing(*programs: str) -> list[str]:
    return [program for program in programs if shutil.which(program) is None]
