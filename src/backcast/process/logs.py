"""Sets up the log of a process."""

import logging
import sys


def configure_logging(level: str) -> None:
    """Log one line per event to stderr, without colours or prefixes: the program that shows the lines adds them."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)-7s %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("backcast").setLevel(level.upper())
