"""Writes the figures of a text in one way before the embedded model reads them: `1.250,40` and `1 250,40` as 1250.40,
and dates in figures as 2025-03-04. A small model knows the English way only.

Decides by form alone. What can be read in two ways (`1.250`, `03/04/2025`) stays as it is, unless the text or the
instructions name the order of day and month.
"""

import re
from datetime import date

_THOUSANDS = r"[1-9]\d{0,2}(?:[.,'’\u00a0\u202f ]\d{3})+"
_NUMBER = re.compile(rf"(?<![\w.,:/])(?<!\w-)(?:{_THOUSANDS}|\d+)(?:[.,]\d+)?(?![\w:/]|[.,-]\d)")
_DATE = re.compile(r"(?<![\w.,:/-])(\d{1,2})([./-])(\d{1,2})\2(\d{4})(?![\w:/-]|[.,]\d)")
_DAY, _MONTH = r"(?:days?|tage?|jours?|d[ií]as?|giorno|dd?)", r"(?:months?|monate?|mois|mes|mese|mm?)"
_DAY_FIRST = re.compile(rf"\b{_DAY}\s*[./-]\s*{_MONTH}\b", re.IGNORECASE)
_MONTH_FIRST = re.compile(rf"\b{_MONTH}\s*[./-]\s*{_DAY}\b", re.IGNORECASE)


def plain_numbers(text: str) -> str:
    return _NUMBER.sub(lambda found: _number(found[0]), text)


def _number(given: str) -> str:
    whole, mark, decimals = re.fullmatch(r"(.*?)(?:([.,])(\d+))?", given).groups(default="")  # type: ignore[union-attr]
    groups = re.findall(r"\D", whole)
    if " " in groups and not decimals:  # 101 204 305: one number, or three
        return given
    if mark in groups and len(set(groups)) == 1:  # 1.250.300: the last mark is one between thousands, too
        whole, mark, decimals = given, "", ""
    elif not groups and len(decimals) == 3 and (mark == "." or len(whole) > 3):  # 1.250: one and a quarter, or more
        return given
    elif not groups and len(decimals) == 3 and not whole.startswith("0"):  # 1,250
        whole, mark, decimals = whole + decimals, "", ""
    digits = re.sub(r"\D", "", whole)
    return f"{digits}.{decimals}" if decimals else digits


def plain_dates(text: str, instructions: str) -> str:
    told = f"{text}\n{instructions}"
    is_day_first, is_month_first = bool(_DAY_FIRST.search(told)), bool(_MONTH_FIRST.search(told))

    def written(found: re.Match[str]) -> str:
        first, second, year = int(found[1]), int(found[3]), int(found[4])
        day_first = found[2] == "." or first > 12 or is_day_first
        month_first = (second > 12 or is_month_first) and found[2] != "."
        if day_first == month_first:
            return found[0]
        day, month = (first, second) if day_first else (second, first)
        try:
            return date(year, month, day).isoformat()
        except ValueError:
            return found[0]

    return _DATE.sub(written, text)
