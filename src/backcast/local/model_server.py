"""Serves the embedded model: llama.cpp from a wheel, with OpenAI's API, in a process of its own.

Knows a file and a port, and nothing of prompts.
"""

import logging
import os
import signal
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

from backcast.errors import ConfigurationError
from backcast.settings import Model

log = logging.getLogger("backcast.model")

ALIAS = "embedded"
"""The model's name in requests and answers."""

_CONTEXT = 4096
"""Tokens of prompt and answer per slot; each costs about 12 KB of memory."""


def main(model: Model, weights: Path) -> None:
    """Serve until SIGTERM or SIGINT; `GET /health` answers 200 once the model is loaded.

    Raises:
        ConfigurationError: the wheel is not installed, or the file or port can't be used.
    """
    # Threads that spin while waiting starve their neighbours: with one of them busy, loading took 6 s and not 0.5 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for number in (signal.SIGTERM, signal.SIGINT):
        # At once: the orderly end took a minute in a pod with clients. A cast that is cut off is tried again.
        signal.signal(number, lambda _number, _frame: os._exit(0))
    server = _start(model, weights)
    log.info("serving the model on %s:%d", model.host, model.port)
    threading.Event().wait()
    del server  # never: it serves for as long as it is referred to


def _start(model: Model, weights: Path) -> Any:
    try:
        xllamacpp: Any = import_module("xllamacpp")
    except ImportError as error:
        raise ConfigurationError(f"backcast model needs xllamacpp ({error}): pip install 'backcast[llm]'.") from None
    log.info("loading %s", weights)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(weights)
    parameters.model_alias = {ALIAS}
    parameters.hostnames, parameters.port = [model.host], model.port
    parameters.n_parallel, parameters.n_ctx = model.slots, _CONTEXT * model.slots
    parameters.n_predict = model.max_tokens
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.cache_ram_mib = 0  # its cache of prompts may grow to 8 GiB by default
    parameters.use_jinja = True
    parameters.ui = False
    parameters.cors_origins = "http://127.0.0.1"  # or any web page that is open on this machine could use the model
    parameters.verbosity = 1  # errors
    try:
        return xllamacpp.Server(parameters)
    except RuntimeError as error:
        raise ConfigurationError(
            f"llama.cpp can't serve {weights} on {model.host}:{model.port}: is the port free (BACKCAST_MODEL__PORT), "
            "and is there enough memory (0.9 GB, or 2.4 GB for 1.5b)?"
        ) from error
