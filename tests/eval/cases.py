"""The cases that measure the embedded model: twenty kinds of target, five short texts each, two of them in English and
one each in German, French and Spanish, with the right answers. They were written before the prompts that they measure.
"""

import re
from typing import Any, NamedTuple


class Case(NamedTuple):
    language: str
    text: str
    right: Any
    """Several right answers are a tuple."""
    instructions: str | None = None


class Kind(NamedTuple):
    target: str | dict[str, Any]
    cases: list[Case]


_TEXT = {"type": "string"}
_NUMBER = {"type": "integer"}


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _maybe(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_DATE = {"type": "string", "format": "date"}
_EMAIL = {"type": "string", "format": "email"}
_PERSON = _object(name=_TEXT, age=_NUMBER, city=_TEXT, is_student={"type": "boolean"})
_CONTACT = _object(name=_TEXT, email=_maybe(_EMAIL), phone=_maybe(_TEXT))
_CUSTOMER = _object(name=_TEXT, address=_object(street=_TEXT, city=_TEXT), total_orders=_NUMBER)
_ITEMS = {"type": "array", "items": _object(name=_TEXT, quantity=_NUMBER)}
_INVOICE = _object(number=_TEXT, date=_DATE, total={"type": "number"}, currency={"enum": ["EUR", "USD", "GBP"]})
_EVENT = _object(title=_TEXT, day=_DATE, start={"type": "string", "format": "time"}, place=_maybe(_TEXT))


def _person(name: str, age: int, city: str, is_student: bool) -> dict[str, Any]:
    return {"name": name, "age": age, "city": city, "is_student": is_student}


def _contact(name: str, email: str | None, phone: str | None) -> dict[str, Any]:
    return {"name": name, "email": email, "phone": phone}


def _customer(name: str, street: str, city: str, total_orders: int) -> dict[str, Any]:
    return {"name": name, "address": {"street": street, "city": city}, "total_orders": total_orders}


def _items(**quantities: int) -> list[dict[str, Any]]:
    return [{"name": name, "quantity": quantity} for name, quantity in quantities.items()]


def _invoice(number: str, date: str, total: float, currency: str) -> dict[str, Any]:
    return {"number": number, "date": date, "total": total, "currency": currency}


def _event(title: Any, day: str, start: str, place: Any) -> dict[str, Any]:
    return {"title": title, "day": day, "start": start, "place": place}


# fmt: off
# ruff: noqa: E501  # a case is a line
CASES: dict[str, Kind] = {
    "int": Kind(
        "int",
        [
            Case("en", "The hall seats four hundred and fifty people", 450),
            Case("en", "Over 3,275 visitors came last weekend", 3275),
            Case("de", "Wir haben siebzehn Stühle bestellt", 17),
            Case("fr", "Le train compte douze voitures", 12),
            Case("es", "Tengo treinta y cuatro años", 34),
        ],
    ),
    "float": Kind(
        "float",
        [
            Case("en", "The ticket costs $42.75 including tax", 42.75),
            Case("en", "It weighs two and a half kilos", 2.5),
            Case("de", "Der Preis beträgt 18,90 Euro", 18.9),
            Case("fr", "La température est de -3,5 degrés", -3.5),
            Case("es", "El paquete pesa 7,25 kg", 7.25),
        ],
    ),
    "large number": Kind(
        "float",
        [
            Case("en", "Annual revenue was 2,480,300.50 dollars", 2480300.5),
            Case("en", "The bridge cost 1.2 million euros", 1200000),
            Case("de", "Die Rechnung beläuft sich auf 3.480,75 €", 3480.75),
            Case("fr", "Le loyer s'élève à 1 325,40 euros", 1325.4),
            Case("es", "El saldo es de 12.640,15 euros", 12640.15),
        ],
    ),
    "bool": Kind(
        "bool",
        [
            Case("en", "Sure, I'd be happy to join", True),
            Case("en", "The meeting was called off.", False, "Does the meeting take place?"),
            Case("de", "Nein, das möchte ich nicht", False),
            Case("fr", "Oui, avec plaisir", True),
            Case("es", "Claro que sí, cuenta conmigo", True),
        ],
    ),
    "text": Kind(
        "str",
        [
            Case("en", "Parcel PX-2207 was signed for by Nora Lind.", "PX-2207", "the parcel number"),
            Case("en", "The keynote by Omar Said starts in the main hall.", "Omar Said", "who gives the keynote"),
            Case("de", "Bitte wenden Sie sich an Frau Petra Vogel in Köln.", "Köln", "die Stadt"),
            Case("fr", "Le directeur, Jean Morel, a signé le contrat.", "Jean Morel", "le nom du directeur"),
            Case("es", "Escríbenos a ventas@tienda.es si tienes dudas.", "ventas@tienda.es", "el correo electrónico"),
        ],
    ),
    "date": Kind(
        "date",
        [
            Case("en", "The warranty ends on August 23, 2027", "2027-08-23"),
            Case("en", "born on 9 February 1984", "1984-02-09"),
            Case("de", "Der Vertrag beginnt am 1. März 2025", "2025-03-01"),
            Case("fr", "Rendez-vous le 14 juillet 2024", "2024-07-14"),
            Case("es", "La fiesta es el 5 de mayo de 2026", "2026-05-05"),
        ],
    ),
    "date in figures": Kind(
        "date",
        [
            Case("en", "Due 07/11/2025", "2025-11-07", "dates are written day/month/year"),
            Case("en", "Shipped 10/02/2024", "2024-10-02", "dates are written month/day/year"),
            Case("de", "Fällig am 05.09.2025", "2025-09-05"),
            Case("fr", "Livraison prévue le 08/12/2024", "2024-12-08", "le format est jour/mois/année"),
            Case("es", "Fecha de entrega: 02-06-2025 (día-mes-año)", "2025-06-02"),
        ],
    ),
    "list of texts": Kind(
        "list[str]",
        [
            Case("en", "Bring a tent, a torch and a map", ["tent", "torch", "map"], "the things, without articles"),
            Case("en", "Our offices: Oslo; Turin; Porto", ["Oslo", "Turin", "Porto"]),
            Case("de", "Im Team sind Anna, Jonas und Mia", ["Anna", "Jonas", "Mia"], "die Namen"),
            Case("fr", "Nous cultivons des tomates, des poireaux et du maïs", ["tomates", "poireaux", "maïs"], "les légumes, sans article"),
            Case("es", "Visitamos Lima, Quito y Bogotá", ["Lima", "Quito", "Bogotá"], "las ciudades"),
        ],
    ),
    "list of numbers": Kind(
        "list[int]",
        [
            Case("en", "Gates 4, 9 and 17 are closed", [4, 9, 17]),
            Case("en", "She ordered two lamps and six chairs", [2, 6]),
            Case("de", "Die Lose 12, 45 und 78 haben gewonnen", [12, 45, 78]),
            Case("fr", "Les chambres 101, 204 et 305 sont libres", [101, 204, 305]),
            Case("es", "Compró tres camisas y ocho calcetines", [3, 8]),
        ],
    ),
    "sentiment": Kind(
        {"type": "string", "enum": ["positive", "negative", "neutral"]},
        [
            Case("en", "Best coffee in town, I come back every day.", "positive"),
            Case("en", "The store opens at nine and closes at six.", "neutral"),
            Case("de", "Das Hotel war schmutzig und viel zu laut.", "negative"),
            Case("fr", "Le colis contient trois livres.", "neutral"),
            Case("es", "Una película maravillosa, me encantó.", "positive"),
        ],
    ),
    "priority": Kind(
        {"enum": ["low", "medium", "high"]},
        [
            Case("en", "Nobody can log in, fix this right now!", "high"),
            Case("en", "Whenever you find the time, the logo could be a bit larger.", "low"),
            Case("de", "Dringend: der Server ist ausgefallen!", "high"),
            Case("fr", "Rien ne presse, une petite faute de frappe sur la page d'aide.", "low"),
            Case("es", "Prioridad media: actualizar el informe esta semana.", "medium"),
        ],
    ),
    "topic": Kind(
        {"enum": ["billing", "delivery", "technical", "other"]},
        [
            Case("en", "I was charged twice for the same order.", "billing"),
            Case("en", "The app crashes as soon as I open the settings.", "technical"),
            Case("de", "Mein Paket ist seit einer Woche unterwegs und nicht angekommen.", "delivery"),
            Case("fr", "Je n'ai pas reçu ma facture de mars.", "billing"),
            Case("es", "El repartidor dejó mi pedido en la casa equivocada.", "delivery"),
        ],
    ),
    "person": Kind(
        _PERSON,
        [
            Case("en", "Ruth Keller, 23, studies law at the university of Vienna.", _person("Ruth Keller", 23, "Vienna", True)),
            Case("en", "Sam Ortiz is a 41-year-old plumber from Denver.", _person("Sam Ortiz", 41, "Denver", False)),
            Case("de", "Lena Brandt ist 20 Jahre alt und studiert Medizin in Bonn.", _person("Lena Brandt", 20, "Bonn", True)),
            Case("fr", "Paul Girard, 58 ans, est boulanger à Lyon.", _person("Paul Girard", 58, "Lyon", False)),
            Case("es", "Lucía Vega, de 35 años, trabaja como enfermera en Sevilla.", _person("Lucía Vega", 35, "Sevilla", False)),
        ],
    ),
    "contact": Kind(
        _CONTACT,
        [
            Case("en", "You can reach Ivy Stone at ivy@stone.io.", _contact("Ivy Stone", "ivy@stone.io", None)),
            Case("en", "Call Ben Frost on 555-0142.", _contact("Ben Frost", None, "555-0142")),
            Case("de", "Ansprechpartner ist Karl Busch, Telefon 0221 445566.", _contact("Karl Busch", None, "0221 445566")),
            Case("fr", "Contactez Zoé Petit : zoe@petit.fr", _contact("Zoé Petit", "zoe@petit.fr", None)),
            Case("es", "El responsable es Diego Ramos.", _contact("Diego Ramos", None, None)),
        ],
    ),
    "customer": Kind(
        _CUSTOMER,
        [
            Case("en", "Nina Park, 14 Hill Road, Bristol, has ordered nine times.", _customer("Nina Park", "14 Hill Road", "Bristol", 9)),
            Case("en", "customer=Carl Dunn; city=Ottawa; street=77 Maple Avenue; orders=4", _customer("Carl Dunn", "77 Maple Avenue", "Ottawa", 4)),
            Case("de", "Kunde: Tim Roth, Gartenweg 3, Ulm. Bestellungen: 11", _customer("Tim Roth", "Gartenweg 3", "Ulm", 11)),
            Case("fr", "Emma Blanc habite 22 rue Verte à Nantes et a passé 6 commandes.", _customer("Emma Blanc", "22 rue Verte", "Nantes", 6)),
            Case("es", "Clienta: Rosa Gil, Calle Luna 8, Málaga, 13 pedidos", _customer("Rosa Gil", "Calle Luna 8", "Málaga", 13)),
        ],
    ),
    "items": Kind(
        _ITEMS,
        [
            Case("en", "6 plates, 8 forks and 1 bowl", _items(plates=6, forks=8, bowl=1)),
            Case("en", "Please send three ladders and ten buckets.", _items(ladders=3, buckets=10)),
            Case("de", "4 Hosen und 7 Hemden", _items(Hosen=4, Hemden=7)),
            Case("fr", "deux chaises et cinq tables", _items(chaises=2, tables=5)),
            Case("es", "Leche: 3; Huevos: 12; Pan: 2", _items(Leche=3, Huevos=12, Pan=2)),
        ],
    ),
    "number or nothing": Kind(
        "int | None",
        [
            Case("en", "The shop sells bread and cakes.", None, "how many years of guarantee"),
            Case("en", "The kettle has a guarantee of 3 years.", 3, "how many years of guarantee"),
            Case("de", "Die Wohnung liegt im Zentrum und ist sehr hell.", None, "die Anzahl der Zimmer"),
            Case("fr", "L'appartement a 4 chambres.", 4, "le nombre de chambres"),
            Case("es", "La casa tiene un jardín precioso.", None, "el número de habitaciones"),
        ],
    ),
    "date or nothing": Kind(
        "date | None",
        [
            Case("en", "The contract has no fixed end.", None, "the end of the contract"),
            Case("en", "The contract runs until 30 June 2028.", "2028-06-30", "the end of the contract"),
            Case("de", "Die Lieferung erfolgt am 12. Oktober 2025.", "2025-10-12", "das Lieferdatum"),
            Case("fr", "La date de départ n'est pas encore connue.", None, "la date de départ"),
            Case("es", "Todavía no sabemos cuándo llega.", None, "la fecha de llegada"),
        ],
    ),
    "invoice": Kind(
        _INVOICE,
        [
            Case("en", "Invoice 2041-B of 3 April 2025, total $1,250.00", _invoice("2041-B", "2025-04-03", 1250, "USD")),
            Case("en", "Inv. no. 77, dated 2024-12-01: £89.99", _invoice("77", "2024-12-01", 89.99, "GBP")),
            Case("de", "Rechnung R-310 vom 15. Mai 2025 über 2.499,00 €", _invoice("R-310", "2025-05-15", 2499, "EUR")),
            Case("fr", "Facture F-88 du 2 janvier 2025, montant 640,50 €", _invoice("F-88", "2025-01-02", 640.5, "EUR")),
            Case("es", "Factura 5519 del 20 de noviembre de 2024, total 75,20 €", _invoice("5519", "2024-11-20", 75.2, "EUR")),
        ],
    ),
    "event": Kind(
        _EVENT,
        [
            Case("en", "Board meeting on 6 May 2025 at 14:30 in room Atlas", _event("Board meeting", "2025-05-06", "14:30:00", ("room Atlas", "Atlas"))),
            Case("en", "Book club, 2025-03-19, 7 pm", _event("Book club", "2025-03-19", "19:00:00", None)),
            Case("de", "Sommerfest am 28. Juni 2025 um 16 Uhr im Stadtpark", _event("Sommerfest", "2025-06-28", "16:00:00", ("Stadtpark", "im Stadtpark"))),
            Case("fr", "Concert le 9 mai 2025 à 20h30 à la salle Ravel", _event("Concert", "2025-05-09", "20:30:00", ("salle Ravel", "la salle Ravel"))),
            Case("es", "Reunión de padres el 11 de septiembre de 2025 a las 18:00", _event("Reunión de padres", "2025-09-11", "18:00:00", None)),
        ],
    ),
}
# fmt: on


def is_right(answer: Any, right: Any) -> bool:
    """Equal but for case, edge spaces, full stops, seconds of a time, and singular or plural of an item's name."""
    if isinstance(right, tuple):
        return any(is_right(answer, one) for one in right)
    if isinstance(right, dict):
        return (
            isinstance(answer, dict)
            and answer.keys() == right.keys()
            and all(is_right(answer[k], right[k]) for k in right)
        )
    if isinstance(right, list):
        return isinstance(answer, list) and len(answer) == len(right) and all(map(is_right, answer, right))
    if isinstance(right, int | float) and not isinstance(right, bool):
        return isinstance(answer, int | float) and not isinstance(answer, bool) and abs(answer - right) < 1e-6
    if isinstance(right, str):
        return isinstance(answer, str) and _plain(answer) == _plain(right)
    return answer is right


def _plain(text: str) -> str:
    plain = re.sub(r"^(\d\d:\d\d)(:00(\.0+)?)?(z|\+00:00)?$", r"\1", text.strip().strip(".").lower())
    return plain.removesuffix("s")
