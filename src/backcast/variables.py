"""The environment variables that are no settings: the command line reads them without the settings' libraries."""

CONFIG_VARIABLE = "BACKCAST_CONFIG"
"""The YAML file of the settings."""
URL_VARIABLE = "BACKCAST_URL"
"""Read by the command line and `delay`: the address of the API."""
KEY_VARIABLE = "BACKCAST_API_KEY"
"""Read by the command line and `delay`: the key that they send to the API."""
