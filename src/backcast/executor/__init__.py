"""Executes tasks: on Prefect's engine, or plainly where a task needs nothing of it."""
