"""The steward: recovers the runs of dead workers, and keeps tables, store and history in bounds."""
