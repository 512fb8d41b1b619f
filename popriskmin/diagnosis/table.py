"""A diagnosis in print: a table of the layers, and a few sentences."""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Sequence

from popriskmin.diagnosis.row import FINE, NOISE, SLOWED, Row

WIDTH = 100
MOST_LINES = 30  # of the table, and of the layers named in the sentences of one cause
MOST_REASONS = 5
MOST_NUMBERS = 4  # of layers that share a line, where not all of the pattern do
_NUMBER = re.compile(r"(?<![^.])\d+(?=\.|$)")
COLUMNS = ("tensors", "scalars", "mean q", "over noise", "gradient", "decay/step", "cause")


def table(rows: Sequence[Row]) -> list[str]:
    """Return the table: tensors of one size, cause and figures whose names differ in numbers alone share a line."""
    lines = sorted(_lines(rows), key=lambda line: line[1] in FINE)  # faults first; the sort is stable
    text = [f"{'layer':32} {COLUMNS[0]:>7} {COLUMNS[1]:>10} {COLUMNS[2]:>7} {COLUMNS[3]:>10} {COLUMNS[4]:>8} "]
    text[0] += f"{COLUMNS[5]:>10} {COLUMNS[6]}"
    for name, cause, members in lines[:MOST_LINES]:
        scalars = sum(row.parameter_count for row in members)

        def mean(column: str, members: list[Row] = members, scalars: int = scalars) -> float:
            return math.fsum(row.parameter_count * getattr(row, column) for row in members) / scalars

        shown = name if len(name) <= 32 else f"...{name[-29:]}"
        text.append(
            f"{shown:32} {len(members):7} {scalars:10} {mean('mean_q'):7.3f} {mean('over_noise'):10.1f} "
            f"{mean('gradient'):8.1e} {mean('decay_ratio'):10.2g} {cause}"
        )
    left = [row for *_, members in lines[MOST_LINES:] for row in members]
    if left:
        causes = ", ".join(f"{count} {cause}" for cause, count in Counter(row.cause for row in left).items())
        text.append(f"... and {len(left)} further tensors: {causes}")
    return text


def _lines(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """Return the lines of the table: a name, a cause, and the rows that it stands for."""
    gathered: dict[tuple[str, str, int, int], list[list[Row]]] = {}
    for row in rows:
        lines = gathered.setdefault((_pattern(row.name), row.cause, row.group, row.parameter_count), [])
        for line in lines:
            if _alike(line[0], row):
                line.append(row)
                break
        else:
            lines.append([row])
    counts = Counter(_pattern(row.name) for row in rows)
    return [
        (_shown(line, whole=counts[pattern] == len(line)), cause, line)
        for (pattern, cause, *_), lines in gathered.items()
        for line in lines
    ]


def _alike(one: Row, other: Row) -> bool:
    """Return whether two rows' figures agree within a factor of 2; differences that do not matter count as none."""
    for column, negligible in (("mean_q", 0.02), ("over_noise", 1.0), ("zero_fraction", 0.1)):
        low, high = sorted((getattr(one, column), getattr(other, column)))
        if not (high <= 2 * low or high - low <= negligible or (math.isnan(low) and math.isnan(high))):
            return False
    return True


def _pattern(name: str | int) -> str:
    return _NUMBER.sub("*", name) if isinstance(name, str) else f"parameter {name}"


def _shown(line: Sequence[Row], whole: bool) -> str:
    """Return a name for all of the line: `*` for numbers that differ, or where others have the pattern too, which."""
    names = [str(row.name) for row in line]
    if len(line) == 1:
        return names[0] if isinstance(line[0].name, str) else _pattern(line[0].name)
    parts = [dict.fromkeys(part) for part in zip(*(name.split(".") for name in names))]
    shown = []
    for part in parts:
        listed = list(part)
        few = listed if len(listed) <= MOST_NUMBERS else [*listed[: MOST_NUMBERS - 1], "..", listed[-1]]
        shown.append(listed[0] if len(listed) == 1 else "*" if whole else f"{{{','.join(few)}}}")
    return ".".join(shown)


def sentences(rows: Sequence[Row]) -> list[str]:
    """Return for each cause that is there which layers, why and what to try; what is no fault comes last."""
    text: list[str] = []
    faults = [row for row in rows if row.cause not in FINE]
    for cause, advice in dict.fromkeys((row.cause, row.advice) for row in faults):
        found = [row for row in faults if (row.cause, row.advice) == (cause, advice)]
        for reason_row in found[:MOST_REASONS]:
            text += _wrapped(f"{cause}: {reason_row.name}: {reason_row.reason}.")
        if len(found) > MOST_REASONS:
            text += _wrapped(f"{cause}: and {len(found) - MOST_REASONS} more.")
        text += _wrapped(f"Try {advice}." if cause != "dead" else f"This is {advice}.", "  ")
    if not faults:
        text.append("Nothing is wrong with the mask.")
    counts = Counter(row.cause for row in rows if row.cause in FINE)
    for cause, words in _WORDS.items():
        if counts[cause]:
            text += _wrapped(f"{cause}: {counts[cause]} {'tensor' if counts[cause] == 1 else 'tensors'}. {words}")
    return text


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


_WORDS = {
    "noise": f"Shut because their mean gradient is no more than noise would give; that is what the mask is for. "
    f"Advice: {NOISE}.",
    "slowed": f"More signal than noise, and all move by smaller steps. Advice: {SLOWED}.",
    "early": "Too few steps to say.",
}
