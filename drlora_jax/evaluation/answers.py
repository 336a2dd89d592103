"""Extracts the answer from generated text.

GSM8K answers are compared as numbers: 18, 18.0, $18 and 18. are equal. `strict` is the number after
the first `####`, where a model that has learned the format puts it; `flexible` is the last number
of the text.
"""

import decimal
import re

_NUMBER = r"[\d][\d,]*(?:\.\d+)?|\.\d+"
# A minus after a digit or a bracket is a subtraction, not a sign.
_SIGNED = re.compile(rf"(?<![\d.)])([-\u2212]?)\s?\$?\s?({_NUMBER})|({_NUMBER})")
_MARKED = re.compile(rf"####\s*([-\u2212]?)\s*\$?\s*([-\u2212]?)({_NUMBER})")
_NOTES = re.compile(r"<<[^<>\n]*>>")


def strict_number(text: str) -> decimal.Decimal | None:
    """Returns the number after the first `####`; None if there is no `####` with a number."""
    first = text.find("####")
    found = _MARKED.match(text, first) if first >= 0 else None
    return _number(found[1] or found[2], found[3]) if found else None


def last_number(text: str) -> decimal.Decimal | None:
    """Returns the last number of a text; None if there is none."""
    last = None
    for found in _SIGNED.finditer(text):
        last = _number(found[1] or "", found[2] or found[3])
    return last


def without_notes(text: str) -> str:
    """Removes the calculator notes of GSM8K's reference answers, <<48/2=24>>."""
    return _NOTES.sub("", text)


def option_of(text: str, options: tuple[str, ...]) -> str | None:
    """Returns the option that is named first: `answer2` in "the correct answer is answer2".

    Case is ignored, and an option must be a whole word: answer12 does not contain answer1.
    """
    names = "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True))
    found = re.search(rf"(?<!\w)(?:{names})(?!\w)", text, re.IGNORECASE)
    wanted = found[0].lower() if found else None
    return next((option for option in options if option.lower() == wanted), None)


def _number(sign: str, digits: str) -> decimal.Decimal | None:
    try:
        value = decimal.Decimal(digits.replace(",", "").rstrip("."))
    except decimal.InvalidOperation:
        return None
    return -value if sign else value
