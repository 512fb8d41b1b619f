"""Tables of the study of shrinkage on real tables, from the lines that `tables.py run` has left."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tables_report import BASE, REFERENCES, Cell, Key, best_of, counts, gather, heading, mean_ratio, reached, verdict

PENALTIES = (
    "adamw, L1 on the first layer",
    "adamw, L1 of five strengths",
    "adamw, decoupled L1",
    "adamw, decoupled L1, stronger",
)
SHRUNK = "snr, shrinkage"
ARMS = (
    "adamw-matched to snr",
    "snr",
    "threshold z=2",
    "hard",
    *PENALTIES,
    "snr, L1 on the first layer",
    "snr, L1 of five strengths",
    "snr, decoupled L1",
    "snr, decoupled L1, stronger",
    SHRUNK,
    "none, shrinkage",
    "threshold z=2, shrinkage",
    "snr, shrinkage of both layers",
    "snr, shrinkage that holds zeros",
)
LEVELS = (500, 0)
FEW = (100, 2000)  # of a few tables


def write(rows: Sequence[Cell], out: Path) -> None:
    """Write `tables.json` and the losses of every table as CSV, and print what a page shows."""
    cells = {key: arms for key, arms in gather(rows).items() if SHRUNK in arms and key[1] in LEVELS + FEW}
    if not cells:
        raise SystemExit(f"no run of {SHRUNK!r} is there yet: make some with the action run")
    lines = {(row["table"], row["probes"]): row for row in rows if row["arm"] == SHRUNK}
    levels = [level for level in LEVELS + FEW if any(probes == level for _, probes in cells)]
    found = {str(level): summary(cells, lines, level) for level in levels}
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.json").write_text(json.dumps(found, indent=1) + "\n")
    for level in LEVELS:
        write_losses(cells, level, out / f"tables-{level}.csv")
    for part in ([str(level) for level in LEVELS], [str(level) for level in levels if level in FEW]):
        some = {level: found[level] for level in part}
        print("\n".join([*arms_table(some), "", *z_table(some), ""]) if some else "")


def summary(cells: Mapping[Key, Mapping[str, Cell]], lines: Mapping[Key, Cell], level: int) -> dict[str, Any]:
    """Return the figures of a number of columns that say nothing: of each arm, and of each z throughout."""
    mine = {table: dict(arms) for (table, probes), arms in cells.items() if probes == level}
    penalties = [name for name in PENALTIES if all(name in arms for arms in mine.values())]
    for arms in mine.values():
        arms["best penalty"] = arms[best_of(arms, penalties)]
        if REFERENCES in arms:
            references = {name: value for name, value in arms[REFERENCES].items() if "loss" in value}
            best = min(references, key=lambda name: float(np.mean(references[name]["loss"])))
            arms["best reference, in hindsight"] = references[best]
            arms |= {name: value for name, value in references.items() if name not in arms}
    names = [*ARMS, "best penalty", *sorted({n for arms in mine.values() for n in arms.get(REFERENCES, {})})]
    return {
        "tables": list(mine),
        "arms": {name: of_arm(mine, name) for name in [*names, "best reference, in hindsight"] if of_arm(mine, name)},
        "z": {z: of_z(mine, lines, level, z) for z in grid_values(lines)},
    }


def of_arm(mine: Mapping[str, Mapping[str, Cell]], name: str) -> dict[str, Any] | None:
    """Return an arm's mean loss over AdamW's and over the penalty's, and how often it is clearly better or worse.

    "shrinkage over it" is the mean loss of `SHRUNK` over the arm's on the tables that the arm was run on.
    """
    there = [arms for arms in mine.values() if name in arms and "loss" in arms[name]]
    if not there:
        return None
    return {
        "tables": len(there),
        "over adamw": mean_ratio([over(arms, name, BASE) for arms in there]),
        "against adamw": counts([verdict(dict(arms), name, BASE) for arms in there]),
        "over the penalty": mean_ratio([over(arms, name, "best penalty") for arms in there]),
        "against the penalty": counts([verdict(dict(arms), name, "best penalty") for arms in there]),
        "shrinkage over it": mean_ratio([over(arms, SHRUNK, name) for arms in there]),
    }


def over(arms: Mapping[str, Cell], name: str, base: str) -> float:
    """Return an arm's mean test loss over another's."""
    return float(np.mean(arms[name]["loss"]) / np.mean(arms[base]["loss"]))


def grid_values(lines: Mapping[Key, Cell]) -> list[str]:
    """Return the values of z in the grid, as they stand in the names of configurations."""
    first = next(iter(lines.values()))
    return sorted({name.split()[1] for name in first["configurations"]}, key=float)


def of_z(mine: Mapping[str, Mapping[str, Cell]], lines: Mapping[Key, Cell], level: int, z: str) -> dict[str, Any]:
    """Return the mean loss with one z throughout, only the rate chosen, and the zeros at the middle rate."""
    ratios, zeros = [], []
    for table, arms in mine.items():
        line = lines[table, level]
        kept = {name: values for name, values in line["configurations"].items() if name.split()[1] == z}
        one = reached({key: value for key, value in line.items() if key != "opened"} | {"configurations": kept})
        ratios.append(float(np.mean(one["loss"]) / np.mean(arms[BASE]["loss"])))
        place = list(line["configurations"]).index(f"0.01 {z}")
        zeros.append({name: shares[place] for name, shares in line["zeros"].items()})
    means = {name: float(np.mean([one[name] for one in zeros])) for name in zeros[0]}
    return {"over adamw": mean_ratio(ratios), "worst": max(ratios), "zeros": means}


def arms_table(found: Mapping[str, Any]) -> list[str]:
    """Return a line for each arm: mean loss over AdamW's, and how often clearly better, unclear, worse."""
    titles = [f"{level} columns that say nothing" if level else "as they come" for level in map(int, found)]
    figures = ("tables", "over AdamW", "against AdamW", "against L1", "shrinkage over it")
    lines = heading(["arm", *(f"{t}: {f}" for t in titles for f in figures)])
    for name in dict.fromkeys(name for level in found.values() for name in level["arms"]):
        cells = [name]
        for level in found.values():
            one = level["arms"].get(name)
            if one is None:
                cells += [""] * len(figures)
            else:
                cells += [
                    str(one["tables"]),
                    f"{one['over adamw']:.3f}",
                    *(listed(one[f"against {to}"]) for to in ("adamw", "the penalty")),
                    f"{one['shrinkage over it']:.3f}",
                ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def listed(numbers: Sequence[int]) -> str:
    """Return counts as text."""
    return ", ".join(map(str, numbers))


def z_table(found: Mapping[str, Any]) -> list[str]:
    """Return a line for each z: loss over AdamW's, the worst table's, and the shares of exact zeros."""
    lines = heading(["z", *(f"{level}: {f}" for level in found for f in ("mean", "worst", "weights", "columns"))])
    for z in next(iter(found.values()))["z"]:
        cells = [z]
        for level in found.values():
            one = level["z"][z]
            shares = [f"{one['zeros'][name]:.2f}" for name in ("weights", "columns")]
            cells += [f"{one['over adamw']:.3f}", f"{one['worst']:.2f}", *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_losses(cells: Mapping[Key, Mapping[str, Cell]], level: int, path: Path) -> None:
    """Write every table's test losses, the chosen rate and z, and the references."""
    mine = {table: arms for (table, probes), arms in cells.items() if probes == level}
    names = [BASE, *(name for name in ARMS if any(name in arms for arms in mine.values()))]
    references = sorted({name for arms in mine.values() for name in arms.get(REFERENCES, {})})
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["table, rows x columns", *names, *references, "chosen rate and z"])
        for table, arms in mine.items():
            values = [f"{np.mean(arms[name]['loss']):.3f}" if name in arms else "" for name in names]
            there = arms.get(REFERENCES, {})
            values += [f"{np.mean(there[name]['loss']):.3f}" if name in there else "" for name in references]
            size = f"{arms[BASE]['rows']} x {round(np.mean(arms[BASE]['columns']))}"
            writer.writerow([f"{table}, {size}", *values, arms[SHRUNK]["chosen"]])
