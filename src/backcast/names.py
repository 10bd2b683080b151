"""The one rule for names: of tasks, lanes and owners. A name is one segment of a path, where any character can be
percent-encoded; so it may hold all but control characters and line separators, which would break logs and tables, and
the segments `.` and `..`, which clients and proxies resolve even when a slash is encoded.
"""

import re

LONGEST = 200
_SCHEMA = r"^(?!\s*$)(?!(.*/)?\.{1,2}(/|$))[^\u0000-\u001f\u007f-\u009f\u2028\u2029]+$"
SCHEMA = {"minLength": 1, "maxLength": LONGEST, "pattern": _SCHEMA}
"""The rule as JSON Schema."""
RULE = (
    f"a name has 1 to {LONGEST} characters, not only white space, no control characters and line separators, and no `.`"
    " or `..` by itself or between slashes"
)
_NAME = re.compile(rf"(?!\s*$)(?!(.*/)?\.{{1,2}}(/|$))[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{{1,{LONGEST}}}")


def check(name: str) -> str:
    """The name itself. Raises `ValueError`."""
    if not _NAME.fullmatch(name):
        raise ValueError(RULE)
    return name
