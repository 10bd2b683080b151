"""Loaded by schemathesis: how the JSON Lines body of a batch is made and sent."""

import json
from typing import Any

import schemathesis
from hypothesis import strategies as st

schemathesis.openapi.media_type(
    "application/jsonl",
    st.lists(
        st.fixed_dictionaries({"task": st.just("echo"), "input": st.dictionaries(st.text("xyz"), st.integers())}),
        min_size=1,
        max_size=5,
    ).map(lambda lines: "".join(json.dumps(line) + "\n" for line in lines).encode()),
)


@schemathesis.serializer("application/jsonl")
def as_sent(_: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode(errors="surrogateescape")
