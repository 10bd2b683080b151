"""A module of tasks that forks when it is imported."""

import os

from prefect import task

os.fork()


@task
def executor() -> int:
    return os.getpid()
