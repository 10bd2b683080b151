"""Targets: the wanted shape of an answer, from a name or a JSON Schema (2020-12) to one plain schema.

Decides which targets are accepted, and which values have their shape. Targets come from strangers: nothing in them is
imported, run or fetched, every keyword is applied or refused by name, and no pattern takes more than linear time.
"""

from pydantic_core import to_json

from backcast.errors import FieldError, InvalidTarget
from backcast.models import JSON
from backcast.targets.names import NAMES, named
from backcast.targets.refusal import Refused
from backcast.targets.schemas import described
from backcast.targets.validation import Misfit, Target

__all__ = ["SIZE", "Misfit", "Target", "parse"]

SIZE = 64 * 1024
"""Bytes of a schema as it is sent."""


def parse(target: JSON, *, pointer: str = "/target") -> Target:
    """The target that a caller wrote as a name, as a JSON Schema, or as a JSON Schema in a text.

    Raises:
        InvalidTarget: with the place of the mistake, below `pointer`.
    """
    try:
        if isinstance(target, str) and not target.lstrip().startswith("{"):
            return named(target)
        if not isinstance(target, str | dict):
            raise Refused("", f"a target is one of the names {NAMES}; or a JSON Schema")
        try:
            text = target.encode() if isinstance(target, str) else to_json(target, inf_nan_mode="constants")
        except ValueError as error:
            raise Refused("", f"the schema is not plain JSON ({error})") from None
        if len(text) > SIZE:
            raise Refused("", f"the schema has {len(text)} bytes; up to {SIZE} are taken")
        return described(text)
    except Refused as refused:
        place = pointer + refused.place
        raise InvalidTarget(f"{place}: {refused}.", errors=(FieldError(place, str(refused)),)) from None
