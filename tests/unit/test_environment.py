"""What tasks see of the environment of their worker."""

import pytest

from backcast.settings import Settings
from backcast.worker.executors import environment


@pytest.mark.parametrize("has_own_key", [True, False])
def test_the_identity_of_a_store_is_not_for_tasks(monkeypatch: pytest.MonkeyPatch, has_own_key: bool) -> None:
    given = {
        "AWS_ACCESS_KEY_ID": "AKIA",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/token",
        "AWS_REGION": "eu",
        "PGPASSWORD": "p",
        "backcast_store__secret_key": "s",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    store = {"url": "s3://b", "access_key": "k" if has_own_key else None, "secret_key": "s" if has_own_key else None}
    seen = environment(Settings.model_validate({"store": store}))
    expected = {"AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE"} if has_own_key else {"AWS_REGION"}
    assert given.keys() & seen.keys() == expected
    assert "PATH" in seen
