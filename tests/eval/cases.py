"""The cases that measure the embedded model: five short English texts per kind of target, with the right answers."""

from typing import Any, NamedTuple


class Case(NamedTuple):
    text: str
    right: Any
    """Several right answers are a tuple."""
    instructions: str | None = None


_TEXT = {"type": "string"}
_NUMBER = {"type": "integer"}


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


PERSON = _object(name=_TEXT, age=_NUMBER, email=_TEXT, city=_TEXT, is_student={"type": "boolean"})
CUSTOMER = _object(name=_TEXT, address=_object(street=_TEXT, city=_TEXT), total_orders=_NUMBER)
ITEMS = {"type": "array", "items": _object(name=_TEXT, quantity=_NUMBER)}


def _person(name: str, age: int, email: str, city: str, is_student: bool) -> dict[str, Any]:
    return {"name": name, "age": age, "email": email, "city": city, "is_student": is_student}


def _customer(name: str, street: str, city: str, total_orders: int) -> dict[str, Any]:
    return {"name": name, "address": {"street": street, "city": city}, "total_orders": total_orders}


def _items(**quantities: int) -> list[dict[str, Any]]:
    return [{"name": name, "quantity": quantity} for name, quantity in quantities.items()]


CASES: dict[str, tuple[str | dict[str, Any], list[Case]]] = {
    "int": (
        "int",
        [
            Case("three", 3),
            Case("The order contains 12 boxes", 12),
            Case("I have two dogs", 2),
            Case("1,234 units were sold", 1234),
            Case("She is twenty-five years old", 25),
        ],
    ),
    "float": (
        "float",
        [
            Case("three point five", 3.5),
            Case("The price is $19.99", 19.99),
            Case("It was -4.2 degrees outside", -4.2),
            Case("one half", 0.5),
            Case("3 dollars fifty cents", 3.5),
        ],
    ),
    "bool": (
        "bool",
        [
            Case("yes", True),
            Case("no", False),
            Case("Absolutely, count me in!", True),
            Case("I refuse.", False),
            Case("The server is down.", False, "Is the server up?"),
        ],
    ),
    "str": (
        "str",
        [
            Case("My name is Ada Lovelace and I live in London.", "Ada Lovelace", "the person's full name"),
            Case("Contact us at bob@example.com for help.", "bob@example.com", "the email address"),
            Case("Paris is the capital of France.", "France", "the country"),
            Case("Order #A-1043 has been shipped.", ("A-1043", "#A-1043"), "the order number"),
            Case("hello world", "HELLO WORLD", "convert to upper case"),
        ],
    ),
    "date": (
        "date",
        [
            Case("2024-03-15", "2024-03-15"),
            Case("March 5, 2023", "2023-03-05"),
            Case("the 1st of January 2020", "2020-01-01"),
            Case("12 Dec 1999", "1999-12-12"),
            Case("July 4th, 1976", "1976-07-04"),
        ],
    ),
    "list[str]": (
        "list[str]",
        [
            Case("apples, pears and plums", ["apples", "pears", "plums"]),
            Case("We visited Rome, Milan and Turin last summer.", ["Rome", "Milan", "Turin"], "the cities"),
            Case("Team: Ann, Bob, Carl", ["Ann", "Bob", "Carl"]),
            Case("red green blue", ["red", "green", "blue"]),
            Case("monday; tuesday; wednesday", ["monday", "tuesday", "wednesday"]),
        ],
    ),
    "sentiment": (
        {"type": "string", "enum": ["positive", "negative", "neutral"]},
        [
            Case("I love this product!", "positive"),
            Case("This is the worst thing I ever bought.", "negative"),
            Case("The package arrived on Tuesday.", "neutral"),
            Case("Fantastic service, thank you.", "positive"),
            Case("It broke after one day, very disappointed.", "negative"),
        ],
    ),
    "priority": (
        {"enum": ["low", "medium", "high"]},
        [
            Case("URGENT: production is down!", "high"),
            Case("Low priority, whenever you have time.", "low"),
            Case("This is of medium importance.", "medium"),
            Case("Critical security hole, fix it immediately", "high"),
            Case("Just a typo in the footer, no hurry.", "low"),
        ],
    ),
    "person": (
        PERSON,
        [
            Case(
                "Ada Smith is 36 years old, lives in London, works as an engineer and can be reached at ada@x.org.",
                _person("Ada Smith", 36, "ada@x.org", "London", False),
            ),
            Case(
                "Bob Jones (bob@mail.com), 21, is a student in Paris.",
                _person("Bob Jones", 21, "bob@mail.com", "Paris", True),
            ),
            Case(
                "name: Carla Diaz; age: 45; email: carla@diaz.es; city: Madrid; student: no",
                _person("Carla Diaz", 45, "carla@diaz.es", "Madrid", False),
            ),
            Case(
                "Dan Lee, 19 years, Berlin, dan.lee@uni.de, currently studying physics at university",
                _person("Dan Lee", 19, "dan.lee@uni.de", "Berlin", True),
            ),
            Case(
                "Eve Adams, a 52 year old retired teacher from Oslo. Email: eve@adams.no",
                _person("Eve Adams", 52, "eve@adams.no", "Oslo", False),
            ),
        ],
    ),
    "customer": (
        CUSTOMER,
        [
            Case(
                "Ann Ray lives at 12 Oak Street in Boston and has placed 7 orders.",
                _customer("Ann Ray", "12 Oak Street", "Boston", 7),
            ),
            Case(
                "Customer: Tom Hill. Address: 5 Main Road, Leeds. Orders so far: 3",
                _customer("Tom Hill", "5 Main Road", "Leeds", 3),
            ),
            Case(
                "Mia Wong, 88 Queen Avenue, Sydney - 15 orders", _customer("Mia Wong", "88 Queen Avenue", "Sydney", 15)
            ),
            Case(
                "After two orders, Leo Marsh of 9 Park Lane, Dublin, closed his account.",
                _customer("Leo Marsh", "9 Park Lane", "Dublin", 2),
            ),
            Case(
                "total_orders=21 name=Zoe King street='1 River Walk' city=Perth",
                _customer("Zoe King", "1 River Walk", "Perth", 21),
            ),
        ],
    ),
    "items": (
        ITEMS,
        [
            Case("2 apples and 3 bananas", _items(apples=2, bananas=3)),
            Case("I need five pens, one notebook and 12 envelopes.", _items(pens=5, notebook=1, envelopes=12)),
            Case("chairs x4, tables x1", _items(chairs=4, tables=1)),
            Case("Milk: 2; Eggs: 12; Bread: 1", _items(Milk=2, Eggs=12, Bread=1)),
            Case("Order of 7 lamps", _items(lamps=7)),
        ],
    ),
}


def is_right(answer: Any, right: Any) -> bool:
    """Equal but for case, edge spaces, full stops, and singular or plural of an item's name."""
    if isinstance(right, tuple):
        return any(is_right(answer, one) for one in right)
    if isinstance(right, float):
        return isinstance(answer, int | float) and not isinstance(answer, bool) and abs(answer - right) < 1e-6
    return _plain(answer) == _plain(right)


def _plain(value: Any) -> Any:
    match value:
        case str():
            return value.strip().strip(".").lower()
        case {"name": str(name), "quantity": quantity, **rest} if not rest:
            return (_plain(name).removesuffix("s"), quantity)
        case dict():
            return {key: _plain(each) for key, each in value.items()}
        case list():
            return [_plain(each) for each in value]
        case bool():
            return ("bool", value)  # True is not 1
        case _:
            return value
