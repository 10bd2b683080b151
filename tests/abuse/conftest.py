from tests.integration.conftest import _no_ambient_environment, _template, database, server

__all__ = ["_no_ambient_environment", "_template", "database", "server"]
