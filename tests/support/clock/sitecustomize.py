"""Sets the wall clock of a process wrong, by TEST_CLOCK_SHIFT seconds. Python imports it at start if PYTHONPATH names
its folder.
"""

import os
import time

_time, _shift = time.time, float(os.environ.get("TEST_CLOCK_SHIFT", "0"))
time.time = lambda: _time() + _shift
time.time_ns = lambda: int(time.time() * 1e9)
