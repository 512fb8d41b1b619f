"""Text that means numbers: `1,234`, `3,5`, `45 %`, `$12`, `?` for a missing one.

Taken as text, each of its values would become a category, and a quantity would be lost. Text is read as numbers where
there is one way to read it, with a line that says how; where there are two, or where a few values are no numbers, the
column is refused with three of its values.
"""

from __future__ import annotations

import decimal
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from pandas.api import types

# Missing, in a column that otherwise holds numbers.
MARKERS = frozenset(
    [
        "",
        "na",
        "n/a",
        "n.a.",
        "#n/a",
        "nan",
        "null",
        "none",
        "nil",
        "?",
        "-",
        "--",
        ".",
        "missing",
        "unknown",
        "#div/0!",
    ]
)
MOST_CODES = 10  # so few different values may be codes, which are categories where not all of them are numbers
NEARLY = 0.5  # of the rows: a column with this share of numbers was not meant as text

_SPACES = " \u00a0\u2009\u202f'\u2019"
_MINUS = "\u2212"
_NUMBER = re.compile(
    rf"(?P<sign>[-+{_MINUS}]?)\s?(?P<before>[$€£¥]?)\s?(?P<sign2>-?)(?P<digits>\.?\d[\d.,{_SPACES}]*)"
    rf"(?P<power>[eE][-+]?\d+)?\s?(?P<behind>%|[$€£¥]|°?[A-Za-zµ][A-Za-z/²³]*)?"
)
_GROUPS = re.compile(rf"\d{{1,3}}([{_SPACES}])\d{{3}}(\1\d{{3}})*(?=[.,]|$)")
# Values with three digits behind a comma: of so many different decimal fractions some would end in 0 and be shorter.
CERTAIN = 44


class Reading(NamedTuple):
    """A column of text as numbers.

    Attributes
    ----------
    values
        float64, NaN where nothing is known.
    note
        How the text was read.
    """

    values: pd.Series
    note: str


class _Parts(NamedTuple):
    text: str
    sign: float
    digits: str
    power: str
    unit: tuple[str, str]


def read_numbers(column: pd.Series) -> Reading | None:
    """Return a column of text as the numbers that it means; None where it is text.

    Parameters
    ----------
    column
        Texts, or objects of any kind, with missing values.

    Raises
    ------
    ValueError
        Where the text is nearly all numbers and cannot be read as such: values with two meanings, different units, or
        a few that are no numbers. The message names the column and up to three values.

    Examples
    --------
    >>> read_numbers(pd.Series(["3,5", "12,25", "?"], name="length")).values.tolist()
    [3.5, 12.25, nan]
    >>> read_numbers(pd.Series(["1,234", "20"], name="price"))
    Traceback (most recent call last):
    ...
    ValueError: the column 'price' holds numbers with two meanings ('1,234'): a comma for thousands or for decimals; \
write them without the former and with a point for the latter
    >>> read_numbers(pd.Series(["Ulm", "Graz"])) is None
    True
    """
    known = column.dropna()
    if not len(known) or types.is_numeric_dtype(column):
        return None
    if known.map(lambda value: isinstance(value, (decimal.Decimal, int, float, np.number))).all():
        if known.map(lambda value: isinstance(value, bool)).any():
            return None
        return Reading(column.map(float, na_action="ignore").astype("float64"), "")
    counts = known.astype(str).str.strip().value_counts()
    counts = counts[~counts.index.str.lower().isin(MARKERS)]
    parts = {text: _parts(text) for text in counts.index}
    numbers = [found for found in parts.values() if found is not None]
    others = [text for text, found in parts.items() if found is None]
    share = counts[[found.text for found in numbers]].sum() / max(1, counts.sum())
    if not numbers or share < NEARLY or (others and len(numbers) <= MOST_CODES):
        return None
    where = f"the column {column.name!r}"
    if others:
        raise ValueError(
            f"{where} holds numbers ({_shown(found.text for found in numbers)}) in {share:.0%} of its rows and other "
            f"text ({_shown(others)}) in the rest: make numbers of the latter, or leave them empty"
        )
    units = {found.unit for found in numbers}
    if len(units) > 1 and len(numbers) <= MOST_CODES:
        return None
    if len(units) > 1:
        mixed = [next(found.text for found in numbers if found.unit == unit) for unit in sorted(units)]
        raise ValueError(f"{where} holds numbers with different units ({_shown(mixed)}): write all of them in one")
    comma, how = _decimal_comma(numbers, where)
    values = {found.text: _value(found, comma) for found in numbers}
    wrong = [text for text, value in values.items() if value is None]
    if wrong:
        raise ValueError(f"{where} holds text ({_shown(wrong)}) among its numbers: write those as plain numbers")
    text = column.astype("object").map(lambda value: str(value).strip(), na_action="ignore")
    taken = text.map(values).astype("float64")
    return Reading(taken, _note(column, text, taken, values, units.pop(), how))


def _parts(text: str) -> _Parts | None:
    match = _NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["sign2"]):
        return None
    digits = match["digits"].strip()
    if any(space in digits for space in _SPACES):
        groups = _GROUPS.match(digits)
        if groups is None:
            return None
        digits = re.sub(f"[{_SPACES}]", "", digits)
    sign = -1.0 if match["sign"] in ("-", _MINUS) or match["sign2"] else 1.0
    return _Parts(text, sign, digits, match["power"] or "", (match["before"], match["behind"] or ""))


def _decimal_comma(numbers: Sequence[_Parts], where: str) -> tuple[bool, str]:
    """Return whether a comma stands before decimals, and in words what commas are."""
    votes: dict[bool, list[str]] = {True: [], False: []}
    unclear: list[str] = []
    plain: list[_Parts] = []
    for found in numbers:
        digits = found.digits
        commas, points = digits.count(","), digits.count(".")
        if commas and points:
            votes[digits.rindex(",") > digits.rindex(".")].append(found.text)
        elif commas > 1 or points > 1:
            votes[points > 1].append(found.text)
        elif commas:
            whole, _, fraction = digits.partition(",")
            clear = len(fraction) != 3 or len(whole) > 3 or whole.startswith("0")
            (votes[True] if clear else unclear).append(found.text)
        elif points and not re.fullmatch(r"[1-9]\d{0,2}\.\d{3}", digits):
            votes[False].append(found.text)
        elif not points:
            plain.append(found)
    if votes[True] and votes[False]:
        raise ValueError(
            f"{where} holds numbers with commas and points in two orders ({_shown([votes[True][0], votes[False][0]])}"
            "): write all of them with a point before the decimals and nothing between thousands"
        )
    if votes[True]:
        return True, "a comma stands before decimals"
    if not unclear:
        return False, "commas divide thousands" if any("," in text for text in votes[False]) else ""
    whole_below = bool(plain) and all(float(found.digits) < 1000 for found in plain)
    if not votes[False] and not (whole_below and len(unclear) >= CERTAIN):
        raise ValueError(
            f"{where} holds numbers with two meanings ({_shown(unclear)}): a comma for thousands or for decimals; "
            "write them without the former and with a point for the latter"
        )
    return False, "commas divide thousands"


def _value(found: _Parts, comma: bool) -> float | None:
    """Return the number, None where the digits are not grouped by threes."""
    thousands, point = (".", ",") if comma else (",", ".")
    whole, _, fraction = found.digits.partition(point)
    if thousands in whole and not re.fullmatch(rf"\d{{1,3}}({re.escape(thousands)}\d{{3}})+", whole):
        return None
    try:
        return found.sign * float(whole.replace(thousands, "") + "." + fraction + found.power)
    except ValueError:
        return None


def _note(
    column: pd.Series,
    text: pd.Series,
    taken: pd.Series,
    values: dict[str, float | None],
    unit: tuple[str, str],
    how: str,
) -> str:
    lost = sorted(set(text[taken.isna() & text.notna()]))
    example = next((one for one in values if not _is_plain(one)), None)
    said = [how] if how else []
    said += [f"the unit {''.join(unit)!r} is left out"] if any(unit) else []
    said += [f"{_shown(lost)} count as missing in {int(text.isin(lost).sum())} rows"] if lost else []
    shown = f", {example!r} as {values[example]:.10g}" if example is not None else ""
    return f"the column {column.name!r} is read as numbers{shown}" + "".join(f"; {one}" for one in said)


def _is_plain(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text) is not None


def _shown(values: Iterable[object], most: int = 3) -> str:
    return ", ".join(repr(value) for value, _ in zip(values, range(most)))
