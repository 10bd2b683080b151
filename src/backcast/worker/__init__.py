"""The worker: claims runs, has them executed, stores their results and settles them. Imports no user code."""
