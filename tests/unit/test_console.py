"""The console's parts that need no API: shapes, numbers, sessions, files of others."""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from importlib import resources

import pytest
from itsdangerous import TimestampSigner
from pydantic import SecretStr

from backcast.console import pages, session, sign_in
from backcast.console.shapes import target
from backcast.console.tasks import fields
from backcast.errors import InvalidInput

KEYS = [SecretStr("the-first-key-of-two"), SecretStr("the-second-key-of-two")]


def test_files_of_others_are_unchanged() -> None:
    folder = resources.files("backcast.console") / "static"
    vendored = json.loads((folder / "VENDORED.json").read_text())
    assert {name: one["sha256"] for name, one in vendored.items()} == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in vendored
    }
    ours = {"VENDORED.json", "console.css", "console.js", "icon.svg"}
    assert {file.name for file in folder.iterdir()} == ours | set(vendored)


def test_a_list_of_fields_is_a_schema() -> None:
    schema = target("name, age, Full address, price: number, tags: list[str], born: date, is_new")
    kinds = {name: one["type"] for name, one in schema["properties"].items()}
    assert kinds == {
        "name": "string",
        "age": "integer",
        "Full_address": "string",
        "price": "number",
        "tags": "array",
        "born": "string",
        "is_new": "boolean",
    }
    assert schema["required"] == list(kinds)
    assert schema["properties"]["tags"]["items"] == {"type": "string"}


@pytest.mark.parametrize("text", ["int", "list[str]", " date "])
def test_a_single_name_is_left_to_the_api(text: str) -> None:
    assert target(text) == text.strip()


def test_a_schema_is_sent_as_it_is() -> None:
    assert target('{"type": "integer"}') == {"type": "integer"}


DEEP = '{"a": ' + "[" * 9000
NOT_SHAPES = ["", "  ", "{", "a: nonsense", "<b>, c", "a, b: list[nonsense]", '{"a": "\\ud800"}', DEEP, '{"a": NaN}']


@pytest.mark.parametrize("text", NOT_SHAPES, ids=lambda text: text[:20])
def test_what_is_no_shape_is_explained(text: str) -> None:
    with pytest.raises(InvalidInput):
        target(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12 ms"), (3.21, "3.2 s"), (42, "42 s"), (90, "1 min 30 s"), (3600, "1 h"), (90_000, "1 d 1 h")],
)
def test_a_duration_has_two_units(seconds: float, text: str) -> None:
    assert pages.span(seconds) == pages.span(timedelta(seconds=seconds)) == text


def test_times_and_numbers() -> None:
    assert pages.ago(datetime.now(UTC) - timedelta(minutes=5, seconds=1)) == "5 min ago"
    assert pages.ago(datetime.now(UTC) + timedelta(hours=2, seconds=9)) == "in 2 h"
    assert (pages.number(1234567), pages.number(0.5), pages.number(None)) == ("1\u2009234\u2009567", "0.5", "–")
    assert len(pages.pretty("x" * 1_000_000)) < 70_000


def test_a_session_lives_as_long_as_its_key() -> None:
    both, one = session.Sessions(KEYS), session.Sessions(KEYS[1:])
    first, second = both.open("the-first-key-of-two"), both.open(" the-second-key-of-two ")
    assert both.key(first) == "the-first-key-of-two"
    assert one.key(second) == "the-second-key-of-two"
    assert one.key(first) is None
    assert both.open("the-first-key-of-") is None
    assert both.open("") is None


def test_a_session_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = session.Sessions(KEYS)
    begun = TimestampSigner.get_timestamp
    monkeypatch.setattr(
        TimestampSigner, "get_timestamp", lambda self: begun(self) - int(session.LIFE.total_seconds()) - 9
    )
    cookie = sessions.open("the-first-key-of-two")
    monkeypatch.undo()
    assert sessions.key(cookie) is None


@pytest.mark.parametrize("cookie", [None, "", "signed-in", "signed-in.x.y", "\xff", "signed-in.." + "A" * 43])
def test_a_made_up_cookie_opens_nothing(cookie: str | None) -> None:
    assert session.Sessions(KEYS).key(cookie) is None


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("/runs/1", "/runs/1"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("https://evil.example", "/"),
        ("/a\r\nSet-Cookie: b=c", "/"),
        (None, "/"),
    ],
)
def test_signing_in_leads_nowhere_else(given: str | None, place: str) -> None:
    assert sign_in._place(given) == place


def test_a_form_has_a_control_for_each_property() -> None:
    form = fields(
        {
            "properties": {
                "words": {"type": "string", "description": "some"},
                "many": {"type": "integer", "default": 3},
                "size": {"enum": ["S", "M"]},
                "loud": {"type": "boolean", "default": False},
                "rest": {"anyOf": [{"type": "array"}, {"type": "null"}], "default": [1]},
                "any": True,
            },
            "required": ["words"],
        }
    )
    assert [(each.name, each.kind, each.required, each.value) for each in form] == [
        ("words", "text", True, ""),
        ("many", "int", False, "3"),
        ("size", "choice", False, ""),
        ("loud", "bool", False, "false"),
        ("rest", "json", False, "[1]"),
        ("any", "json", False, ""),
    ]
