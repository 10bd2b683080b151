"""Decides who has signed in: a browser whose cookie one of the API's keys has signed, while that key is set.

The cookie names no key and has no secret in it. Any API process with the same keys accepts it, and none once the key is
removed.
"""

import hashlib
import hmac
from collections.abc import Iterable
from datetime import timedelta

from itsdangerous import TimestampSigner
from pydantic import SecretStr

COOKIE = "backcast_console"
LIFE = timedelta(hours=12)
"""A working day; then the key is asked for again."""
_SIGNED = "signed-in"


class Sessions:
    """The sessions that these keys can open; with those of `read_keys` nothing can be changed."""

    def __init__(self, keys: Iterable[SecretStr], read_keys: Iterable[SecretStr] = ()) -> None:
        self._reading = {key.get_secret_value() for key in read_keys}
        texts = [*(key.get_secret_value() for key in keys), *self._reading]
        self._signers = {key: TimestampSigner(key, "backcast.console", digest_method=hashlib.sha256) for key in texts}

    @property
    def are_needed(self) -> bool:
        """Whether the API asks for keys at all."""
        return bool(self._signers)

    def may_change(self, key: str | None) -> bool:
        return key not in self._reading

    def open(self, given: str) -> str | None:
        """The value of the cookie for whoever has this key; None if it is not a key of ours."""
        shown = given.strip().encode(errors="replace")
        # Every key is compared, in a time that reveals nothing about any of them.
        are_same = [hmac.compare_digest(key.encode(), shown) for key in self._signers]
        found = [signer for signer, it_is in zip(self._signers.values(), are_same, strict=True) if it_is]
        return found[0].sign(_SIGNED).decode() if found else None

    def key(self, cookie: str | None) -> str | None:
        """The key that has signed the cookie not too long ago."""
        for key, signer in self._signers.items():
            if cookie and signer.validate(cookie, max_age=int(LIFE.total_seconds())):
                return key
        return None
