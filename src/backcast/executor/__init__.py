"""Executes tasks: on Prefect's engine, or by a direct call for a task that does not need the engine."""
