"""Reads the repository's Dockerfile far enough to list its targets and their instructions. Knows nothing of the images'
contents.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("api", "worker", "prefect-server", "llm")
"""The images that are published."""


@dataclass
class Stage:
    name: str
    base: str
    """Another stage, or an image."""
    instructions: list[tuple[str, str]] = field(default_factory=list)


def lines(text: str) -> list[str]:
    """One for each instruction, without comments."""
    kept = "\n".join(line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return [line.strip() for line in re.sub(r"\\\n\s*", " ", kept).splitlines()]


def stages(text: str, **arguments: str) -> dict[str, Stage]:
    """By name; what `--build-arg` gives can be in FROM lines only."""
    found: dict[str, Stage] = {}
    known: dict[str, str] = {}
    for line in lines(text):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, name = re.sub(r"\$\{(\w+)\}", lambda it: known[it[1]], rest).split(" AS ")
            found[name] = Stage(name, base)
        elif found:
            list(found.values())[-1].instructions.append((word, rest))
        elif word == "ARG":
            name, _, default = rest.partition("=")
            known[name] = arguments.get(name, default)
    return found


def effective(found: dict[str, Stage], target: str, word: str) -> str | None:
    """The instruction that counts in an image: its last one, or its base's."""
    stage = found.get(target)
    if stage is None:
        return None
    return next((rest for it, rest in reversed(stage.instructions) if it == word), None) or effective(
        found, stage.base, word
    )


def command(found: dict[str, Stage], target: str, word: str) -> list[str] | None:
    """ENTRYPOINT or CMD in exec form; anything else is an error."""
    rest = effective(found, target, word)
    return None if rest is None else json.loads(rest)
