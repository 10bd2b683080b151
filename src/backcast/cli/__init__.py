"""The command line: commands that run the service, commands that use it over HTTP."""
