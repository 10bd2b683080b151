"""What callers see of an exception."""

import pytest

from backcast.executor import classification


@pytest.mark.parametrize("message", ["m" * 10_000_000, "a line\n" * 1_000_000], ids=["one line", "many lines"])
def test_of_a_long_message_only_the_start_is_looked_through(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    looked = list[int]()

    def redacted(text: str) -> str:
        looked.append(len(text))
        return text.replace("secret", "***")

    monkeypatch.setattr(classification, "redacted", redacted)
    try:
        raise ValueError(f"secret {message}")
    except ValueError as error:
        found = classification.failed(error)
    assert sum(looked) < 100_000
    assert found.problem.detail.startswith("ValueError: *** ")
    assert "secret" not in found.traceback
    assert found.traceback.endswith("…")
