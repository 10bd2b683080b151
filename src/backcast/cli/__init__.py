"""The command line: starts the processes, and talks to a running service over HTTP."""
