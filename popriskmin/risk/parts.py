"""Samples of single groups and parameters: which part of a network still learns something that generalizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from popriskmin.optimizer.groups import parameter_names
from popriskmin.risk.series import Sample

PARTS = ("group", "parameter")


def by_part(
    samples: Sequence[Sample], rows: Sequence[Tensor], groups: Sequence[Mapping[str, Any]], kept: str, by: str
) -> dict[str, list[Sample]]:
    """Return the samples of each part by its name.

    Parameters
    ----------
    samples, rows
        As many: each sample, and the table of shape (parts, 2) that it is the sum of.
    groups
        The optimizer's.
    kept, by
        "group" or "parameter": what a row of the tables is, and what is asked for.
    """
    names = parameter_names(groups)
    if kept == "group":
        owners = [f"group {i}" for i in range(len(groups))]
    else:
        owners = [f"group {i}" if by == "group" else str(name) for i, names_of in enumerate(names) for name in names_of]
    found: dict[str, list[Sample]] = {}
    for sample, table in zip(samples, rows):
        sums: dict[str, list[float]] = {}
        for owner, (fresh, influence) in zip(owners, table.tolist()):
            held = sums.setdefault(owner, [0.0, 0.0])
            held[0] += fresh
            held[1] += influence
        for owner, pair in sums.items():
            found.setdefault(owner, []).append(Sample(sample.step, *pair))
    return found
