"""How a process logs."""

import logging
import sys


def configure_logging(level: str) -> None:
    """One line per event on stderr; colours and prefixes are the business of who reads it."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)-7s %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("backcast").setLevel(level.upper())
