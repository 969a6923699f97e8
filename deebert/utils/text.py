"""Texts of others, such as labels, in what shows them: terminals and spreadsheets."""

import re

FORMULA = tuple("=+-@\t\r\uff1d\uff0b\uff0d\uff20")  # the first characters of formulas, also in their wide forms


def printable(text: str) -> str:
    """The text with escapes, such as \\x1b and \\n, in place of the control characters that a terminal would obey."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda match: ascii(match[0])[1:-1], text)


def no_formula(field: str) -> str:
    """The field with a ' before it where a spreadsheet would take it for a formula. Numbers stay as they are."""
    formula = field[:1] in FORMULA and len(field) > 1 and not re.fullmatch(r"[+-]?[\d.,]+(e[+-]?\d+)?%?", field, re.I)
    return f"'{field}" if formula else field
