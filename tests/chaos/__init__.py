"""Proves that every accepted run is finished, whatever dies: `python -m tests.chaos --minutes 15 --seed 1`."""
