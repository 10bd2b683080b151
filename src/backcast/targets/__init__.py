"""The wanted shape of an answer: a name out of a closed list or a JSON Schema (2020-12), made one plain schema."""

from backcast.targets.schemas import Target, parse

__all__ = ["Target", "parse"]
