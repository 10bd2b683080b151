"""Rewrites what OpenAPI 3.0 and older drafts of JSON Schema write in another way than 2020-12, one schema at a time.
Decides about spelling only: the meaning of a keyword, and whether it is supported, is decided elsewhere.
"""

from typing import Any

from backcast.targets.validation import Schema

ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
"""Keywords that say nothing about values."""
_BOUNDS = (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))


def modern(node: Schema) -> Schema:
    """The same schema in the keywords of 2020-12, except `nullable`."""
    out = dict(node)
    if isinstance(node.get("items"), list):  # a tuple, before 2020-12
        del out["items"]
        if node["items"]:
            out["prefixItems"] = node["items"]
        if "additionalItems" in out:
            out["items"] = out.pop("additionalItems")
    elif "additionalItems" in node:  # without effect unless `items` is a list
        del out["additionalItems"]
    for bound, exclusive in _BOUNDS:  # `exclusiveMinimum: true` makes `minimum` exclusive
        if isinstance(node.get(exclusive), bool) and bound in node:
            del out[exclusive]
            if node[exclusive]:
                out[exclusive] = out.pop(bound)
    return out


def nullable(schema: Schema) -> Schema:
    """The schema or null; OpenAPI 3.0 writes `nullable: true`, often beside a reference or an enum."""
    if not schema.keys() - ANNOTATIONS:  # anything, null as well
        return schema
    told: Schema = {key: value for key, value in schema.items() if key in ANNOTATIONS}
    shape: dict[str, Any] = {key: value for key, value in schema.items() if key not in ANNOTATIONS}
    return {"anyOf": [shape, {"type": "null"}], **told}
