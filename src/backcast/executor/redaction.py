"""Takes the values of known secrets out of logs and of texts about failures: the keys that the worker has, and what the
environment of the tasks has under a name such as API_TOKEN. It can't know others.
"""

import os
import re
from collections.abc import Iterable

_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
_URL = re.compile(r"(?<=://)([^\s/:@]*):[^\s/@]+@")
"""The part of an address that has a password."""
SHORTEST = 8
"""Characters: a shorter value is no secret, and may be part of any text."""
_known = set[str]()


def know(secrets: Iterable[str]) -> None:
    _known.update(secrets)


def redacted(text: str) -> str:
    # Not `items()`: it raises if another thread deletes a variable meanwhile.
    values = _known | {os.environ.get(name, "") for name in os.environ if _NAMES.search(name)}
    for secret in sorted((value for value in values if len(value) >= SHORTEST), key=len, reverse=True):
        text = text.replace(secret, "***")
    return _URL.sub(r"\1:***@", text)
