"""The rows of a diagnosis, and how they print: a table of the layers, and sentences."""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

# Causes that are no faults, and those that are.
FINE = ("open", "warmup", "early", "noise", "slowed")
FAULTS = ("rounded", "weak", "epsilon", "strict", "decay", "closed", "dead", "not finite")
# Advice on causes that are no faults.
SLOWED = "none is needed; a larger lr makes up for it, or a smaller softness"
NOISE = (
    "none is needed, unless the module must learn from a signal weaker than its noise, as a router may: then "
    "mask='none' for its group, min_q, a smaller softness or a larger batch"
)

WIDTH = 100
MOST_LINES = 30  # of the table
MOST_REASONS = 5  # for one cause
MOST_NUMBERS = 4  # of layers that share a line, if not all of the pattern do
_NUMBER = re.compile(r"(?<![^.])\d+(?=\.|$)")
COLUMNS = ("tensors", "scalars", "mean q", "over noise", "gradient", "decay/step", "cause")


class Row(NamedTuple):
    """The diagnosis of one parameter tensor; plain numbers, of the last step.

    Attributes
    ----------
    name
        As in `get_mask_stats(by="parameter")`: the parameter's name, or its place if
        the optimizer has no names.
    group
        The number of its parameter group.
    step
        The steps that it has taken. With 0, before its first gradient, no other number
        is known.
    parameter_count
        The number of scalars.
    mean_q, active_fraction, snr
        As in `get_mask_stats`.
    over_noise
        The squared mean gradient in units of the gradient's variance, `m^**2 / z`,
        averaged over the scalars that have gradients (each counted as 1 at most) and
        divided by its value for pure noise, `popriskmin.mask.variance_of_mean`. 1 means
        noise alone; at 2 the mean holds as much signal as noise.
    gradient
        Root mean square of the gradient, from `v^`.
    zero_fraction
        Share of the scalars that have had no gradient for about the last 100 steps. The
        cause is that of the other scalars.
    decay_ratio
        Length of the weight decay's step over that of the masked gradient step; 0
        without weight decay.
    cause
        "open", "warmup", "early" (too few steps to say), "noise" and "slowed" are no
        faults; "rounded", "weak", "epsilon", "strict", "decay", "closed", "dead" and
        "not finite" are.
    reason, advice
        In words. The advice may be empty.
    """

    name: str | int
    group: int
    step: int
    parameter_count: int
    mean_q: float
    active_fraction: float
    snr: float
    over_noise: float
    gradient: float
    zero_fraction: float
    decay_ratio: float
    cause: str
    reason: str
    advice: str


def table(rows: Sequence[Row]) -> list[str]:
    """Return the table.

    Tensors share a line if they agree in size, cause and measured numbers, and their
    names differ in layer numbers alone.
    """
    # Faults come first; the sort is stable.
    lines = sorted(_lines(rows), key=lambda line: line[1] in FINE)
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
    """Return the lines of the table: a name, a cause, and the rows behind it."""
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
    """Return whether two rows' numbers agree within a factor of 2 or differ little."""
    for column, negligible in (("mean_q", 0.02), ("over_noise", 1.0), ("zero_fraction", 0.1)):
        low, high = sorted((getattr(one, column), getattr(other, column)))
        if not (high <= 2 * low or high - low <= negligible or (math.isnan(low) and math.isnan(high))):
            return False
    return True


def _pattern(name: str | int) -> str:
    return _NUMBER.sub("*", name) if isinstance(name, str) else f"parameter {name}"


def _shown(line: Sequence[Row], whole: bool) -> str:
    """Return a name for the whole line.

    `*` stands for numbers that differ. If rows of other lines share the pattern, the
    numbers are listed instead.
    """
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
    """Return layers, reason and advice for each cause; faults come first."""
    text: list[str] = []
    faults = [row for row in rows if row.cause not in FINE]
    for cause, advice in dict.fromkeys((row.cause, row.advice) for row in faults):
        alike = [row for row in faults if (row.cause, row.advice) == (cause, advice)]
        for row in alike[:MOST_REASONS]:
            text += _wrapped(f"{cause}: {row.name}: {row.reason}.")
        if len(alike) > MOST_REASONS:
            text += _wrapped(f"{cause}: and {len(alike) - MOST_REASONS} more.")
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
