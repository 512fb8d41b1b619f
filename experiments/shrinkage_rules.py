"""Rules for z that are known before a training: chosen on half of the study's tables, reported on the other half.

A rule takes one z where a property of the training rows is above an edge, and another z elsewhere. Both z and the edge
are chosen on the tables that `tables_data.SOURCES` names for that, with 0 and 500 columns that say nothing. In every
case the learning rate is chosen by validation data.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tables_data import SOURCES, make_task
from tables_report import Cell, Key, heading, mean_ratio, ratio

CORRELATED = 0.95
COLUMNS = "columns per training row"
SHARE = "share of columns that another equals nearly"
IN_USE = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)  # shares of the permuted columns
PROBE = "1"  # the z at which the table's columns are held beside permuted ones
Pick = Callable[[Key], str]
InUse = Mapping[Key, Mapping[str, tuple[float, float]]]  # by table and z, the shares of its columns and permuted ones


def properties(keys: Sequence[Key], path: Path, cache: Path) -> dict[Key, dict[str, float]]:
    """Return the properties of tables, which are measured on the rows of seed 0 where `path` does not have them."""
    known: dict[Key, dict[str, float]] = {}
    for row in csv.DictReader(path.read_text().splitlines()) if path.exists() else []:
        known[row["table"], int(row["useless columns"])] = {name: float(row[name]) for name in (COLUMNS, SHARE)}
    for table, probes in keys:
        if (table, probes) not in known:
            known[table, probes] = measured(make_task(table, probes, cache).prepare(0).training[0].double().numpy())
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["table", "useless columns", COLUMNS, SHARE])
        writer.writerows([*key, *(f"{value:.4g}" for value in known[key].values())] for key in keys)
    return known


def measured(x: np.ndarray) -> dict[str, float]:
    """Return the columns per row, and the share of columns with |correlation| > `CORRELATED` to another one."""
    varying = x[:, x.std(0) > 0]
    correlation = np.abs(np.corrcoef(varying, rowvar=False))
    np.fill_diagonal(correlation, 0)
    return {COLUMNS: x.shape[1] / x.shape[0], SHARE: float((correlation.max(0) > CORRELATED).mean())}


def judged(
    cells: Mapping[Key, Mapping[str, Cell]],
    known: Mapping[Key, Mapping[str, float]],
    grid: Sequence[str],
    base: str,
    further: Sequence[str] = (),
    used: InUse | None = None,
) -> list[dict[str, str]]:
    """Return a line for each rule: mean loss over AdamW's on the tables it was chosen on, on the others, the worst.

    `cells` has, beside AdamW's, arms named by z, each at its best rate, and the arm `base`, which chooses z by
    validation data. Those of `further` are rules of their own. `used` has, by z, the shares of columns in use, of the
    table's and of permuted ones.
    """

    def figure(pick: Pick, chosen_on: bool) -> list[float]:
        halves = [key for key in cells if SOURCES[key[0]].chosen_on == chosen_on]
        return [ratio(dict(cells[key]), pick(key)) for key in halves]

    def take(name: str) -> Pick:
        return lambda key: name

    def above(of: str, edge: float, low: str, high: str) -> Pick:
        return lambda key: high if known[key][of] > edge else low

    rules: dict[str, Pick] = {f"z = {z}": take(z) for z in grid}
    for of in (COLUMNS, SHARE):
        values = sorted({known[key][of] for key in cells if SOURCES[key[0]].chosen_on})
        edges = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(values))]
        tries = [(of, edge, *pair) for edge in edges for pair in itertools.permutations(grid, 2)]
        of, edge, low, high = min(tries, key=lambda rule: mean_ratio(figure(above(*rule), True)))
        rules[f"z = {high} where the {of} is above {edge:.2g}, else {low}"] = above(of, edge, low, high)
    rules |= {name: take(name) for name in further}
    if used:
        rules |= by_permuted_columns(used, grid, lambda pick: mean_ratio(figure(pick, True)))
    rules["z by validation data"] = take(base)
    rules["the best z on test data, which nobody knows"] = lambda key: min(
        grid, key=lambda z: ratio(dict(cells[key]), z)
    )
    return [
        {
            "rule": name,
            "chosen on": f"{mean_ratio(figure(pick, True)):.3f}",
            "tested on": f"{mean_ratio(figure(pick, False)):.3f}",
            "worst tested": f"{max(figure(pick, False)):.2f}",
        }
        for name, pick in rules.items()
    ]


def by_permuted_columns(used: InUse, grid: Sequence[str], loss: Callable[[Pick], float]) -> dict[str, Pick]:
    """Return the rules that read which columns are in use, with the share and the z that `loss` is least with."""
    most = min(IN_USE, key=lambda share: loss(few_in_use(used, grid, share)))
    low, high = min(itertools.permutations(grid, 2), key=lambda pair: loss(fewer_than_permuted(used, *pair)))
    fewer = f"z = {low} where at z = {PROBE} fewer of the table's columns than of permuted ones are in use, else {high}"
    return {
        f"the least z at which {most:.0%} of permuted columns at most are in use": few_in_use(used, grid, most),
        fewer: fewer_than_permuted(used, low, high),
        "z at which most more of the table's columns than of permuted ones are in use": told_apart(used, grid),
    }


def few_in_use(used: InUse, grid: Sequence[str], most: float) -> Pick:
    """Take the least z at which no more of the permuted columns are in use, or the largest of all."""
    return lambda key: next((z for z in grid if used[key][z][1] <= most), grid[-1])


def fewer_than_permuted(used: InUse, low: str, high: str) -> Pick:
    """Take `low` where the table's columns close before permuted ones do, which have no others to stand in for them."""
    return lambda key: low if used[key][PROBE][0] < used[key][PROBE][1] else high


def told_apart(used: InUse, grid: Sequence[str]) -> Pick:
    """Take the z at which the share of the table's columns in use is furthest above that of permuted ones."""
    return lambda key: max(grid, key=lambda z: used[key][z][0] - used[key][z][1])


def table(lines: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the lines as a table in Markdown."""
    return [*heading(list(lines[0])), *(f"| {' | '.join(line.values())} |" for line in lines)]
