"""Tables of the study of shrinkage on real tables, from the lines that `tables.py run` has left."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shrinkage_rules
from tables_data import SOURCES
from tables_references import LEARNERS
from tables_report import BASE, REFERENCES, Cell, Key, best_of, counts, gather, heading, mean_ratio, reached, verdict

PENALTIES = (
    "adamw, L1 on the first layer",
    "adamw, L1 of five strengths",
    "adamw, decoupled L1",
    "adamw, decoupled L1, stronger",
)
# Two grids of strengths each.
IN_THE_LOSS = {
    f"{arm}, L1 in the loss": (f"{arm}, L1 on the first layer", f"{arm}, L1 of five strengths")
    for arm in ("adamw", "snr")
}
SHRUNK = "snr, shrinkage"
BOUND = ("snr, bounded shrinkage", "snr, bounded shrinkage of both layers")
FAN_IN = ("snr, fan-in shrinkage", "snr, fan-in shrinkage of both layers")
FOLLOWED = "snr, followed shrinkage"
PROBED = "snr, shrinkage, at one rate"
PERMUTED = 100  # columns that `PROBED` was given beside those of a table
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
    *BOUND,
    *FAN_IN,
    FOLLOWED,
)
SHOWN = {
    BASE: "AdamW",
    "adamw-matched to snr": "AdamW with steps as small as PRM's",
    "adamw, L1 in the loss": "AdamW, L1 in the loss",
    "adamw, decoupled L1": "AdamW, decoupled L1",
    "adamw, decoupled L1, stronger": "AdamW, decoupled L1 of 3 and 10",
    "best penalty": "the best of AdamW's penalties",
    "snr": "PRM, `snr`",
    "snr, L1 in the loss": "PRM, `snr`, L1 in the loss",
    "snr, decoupled L1": "PRM, `snr`, decoupled L1",
    "none, shrinkage": "PRM without a mask, shrinkage",
    SHRUNK: "**PRM, `snr`, shrinkage**",
    "threshold z=2, shrinkage": "PRM, `threshold` (2 errors), shrinkage",
    "snr, shrinkage of both layers": "PRM, `snr`, shrinkage of both layers",
    "snr, shrinkage that holds zeros": "PRM, `snr`, shrinkage that holds zeros",
    BOUND[0]: "PRM, `snr`, bounded shrinkage",
    BOUND[1]: "PRM, `snr`, bounded shrinkage of both layers",
    FAN_IN[0]: "PRM, `snr`, shrinkage by fan-in",
    FAN_IN[1]: "PRM, `snr`, shrinkage of both layers by fan-in",
    FOLLOWED: "PRM, `snr`, shrinkage that follows 50 held-out rows",
    "L1 linear model, tuned": "L1 linear model",
    "elastic net, tuned": "elastic net, a linear model",
    "forest, tuned": "forest",
    "boosted trees, tuned": "boosted trees",
    "best reference, in hindsight": "the best of these four, in hindsight",
    "boosted trees": "scikit-learn's boosted trees, untuned",
    "best arm, in hindsight": "the best arm of each table, in hindsight",
}
HINDSIGHT = ("best reference, in hindsight", "best arm, in hindsight")  # by test data
LEVELS = (500, 0)
FEW = (100, 2000)  # of a few tables


def write(rows: Sequence[Cell], more: Sequence[Cell], out: Path, cache: Path) -> None:
    """Write `tables.json`, the losses of every table and rules for z as CSV, and print what a page shows.

    `more` has lines of further seeds.
    """
    cells = {key: arms for key, arms in gather(rows).items() if SHRUNK in arms and key[1] in LEVELS + FEW}
    if not cells:
        raise SystemExit(f"no run of {SHRUNK!r} is there yet: make some with the action run")
    lines = of_arm_by_table(rows, SHRUNK)
    levels = [level for level in LEVELS + FEW if any(probes == level for _, probes in cells)]
    bounded = {arm: of_arm_by_table(rows, arm) for arm in (*BOUND, *FAN_IN)}
    found = {str(level): summary(cells, lines, bounded, level) for level in levels}
    if more:
        found["ten seeds"] = with_more_seeds(rows, more)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.json").write_text(json.dumps(found, indent=1) + "\n")
    for level in LEVELS:
        write_losses(cells, level, out / f"tables-{level}.csv")
    pairs = [[str(level) for level in levels if level in some] for some in (LEVELS, FEW)]
    usual, few = ({level: found[level] for level in pair} for pair in pairs)
    shown = {
        "arms": arms_table(usual),
        "one-z": z_table(usual),
        "few": arms_table(few),
        "rules": shrinkage_rules.table(rules(rows, cells, lines, bounded, out / "properties.csv", cache)),
        "one-setting": setting_table({str(level): one_setting(rows, cells, level) for level in LEVELS}),
    }
    for name, table in shown.items():
        print("\n".join([*table, ""]))
        with (out / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                line[2:-2].split(" | ") for line in table if "---" not in line
            )


def with_more_seeds(rows: Sequence[Cell], more: Sequence[Cell]) -> dict[str, Any]:
    """Return the summary with 500 columns that say nothing of the tables and arms that `more` has, over all seeds."""
    known = {(row["table"], row["arm"]): row for row in rows if row["probes"] == LEVELS[0]}
    joined = [over_seeds(known[row["table"], row["arm"]], row) for row in more if row["probes"] == LEVELS[0]]
    cells = gather(joined)
    most = max(len(arms) for arms in cells.values())
    return of_arms({table: arms for (table, _), arms in cells.items() if len(arms) == most})


def over_seeds(one: Cell, other: Cell) -> Cell:
    """Return the figures of an arm's configurations over the seeds of both lines."""
    configurations = {
        name: {
            when: [[a + b for a, b in zip(*parts)] for parts in zip(found[when], other["configurations"][name][when])]
            for when in ("best", "final")
        }
        for name, found in one["configurations"].items()
    }
    kept = {name: one[name] for name in ("table", "probes", "arm", "rows")}
    return kept | {"configurations": configurations, "columns": one["columns"] + other["columns"]}


def of_arm_by_table(rows: Sequence[Cell], arm: str) -> dict[Key, Cell]:
    """Return an arm's lines by table and number of columns that say nothing."""
    return {(row["table"], row["probes"]): row for row in rows if row["arm"] == arm}


def rules(
    rows: Sequence[Cell],
    cells: Mapping[Key, Mapping[str, Cell]],
    lines: Mapping[Key, Cell],
    bounded: Mapping[str, Mapping[Key, Cell]],
    properties: Path,
    cache: Path,
) -> list[dict[str, str]]:
    """Return what rules for z come to; properties of tables that the file lacks are measured and written."""
    grid = grid_values(lines)
    mine = {
        key: {**arms, **{z: at_one_z(lines[key], z) for z in grid}} for key, arms in cells.items() if key[1] in LEVELS
    }
    further = []
    for arm, its in bounded.items():
        if mine.keys() <= its.keys():
            for bound in grid_values(its):
                further.append(f"{of_rule(arm)}: {bound}")
                for key, arms in mine.items():
                    arms[further[-1]] = at_one_z(its[key], bound)
    if all(FOLLOWED in arms for arms in mine.values()):
        further.append(of_rule(FOLLOWED))
        for arms in mine.values():
            arms[further[-1]] = arms[FOLLOWED]
    known = shrinkage_rules.properties(list(mine), properties, cache)
    used = columns_in_use(of_arm_by_table(rows, PROBED))
    return shrinkage_rules.judged(mine, known, grid, SHRUNK, further, used if mine.keys() <= used.keys() else {})


def of_rule(arm: str) -> str:
    """Return how a table names an arm among forms of shrinkage."""
    return SHOWN[arm].removeprefix("PRM, `snr`, ")


def columns_in_use(probed: Mapping[Key, Cell]) -> dict[Key, dict[str, tuple[float, float]]]:
    """Return by z which shares of a table's columns and of those that were permuted for it are not wholly zero.

    A table's columns are its own and those that were added as useless, which the rule does not know from its own.
    """
    found: dict[Key, dict[str, tuple[float, float]]] = {}
    for (table, probes), line in probed.items():
        added, own = probes - PERMUTED, float(np.mean(line["columns"])) - probes
        for place, name in enumerate(line["configurations"]):
            real, useless = (1 - line["zeros"][kind][place] for kind in ("columns", "columns that say nothing"))
            shares = (own * real + added * useless) / (own + added), useless
            found.setdefault((table, added), {})[name.split()[1]] = shares
    return found


def summary(
    cells: Mapping[Key, Mapping[str, Cell]],
    lines: Mapping[Key, Cell],
    bounded: Mapping[str, Mapping[Key, Cell]],
    level: int,
) -> dict[str, Any]:
    """Return the figures of a number of columns that say nothing: of each arm, each z and each bound throughout."""
    mine = {table: dict(arms) for (table, probes), arms in cells.items() if probes == level}
    return of_arms(mine) | {
        "z": {z: of_z(mine, lines, level, z) for z in grid_values(lines)},
        "bounds": {
            f"{of_rule(arm)}: {bound}": of_z(mine, its, level, bound)
            for arm, its in bounded.items()
            if all((table, level) in its for table in mine)
            for bound in grid_values(its)
        },
    }


def of_arms(mine: Mapping[str, dict[str, Cell]]) -> dict[str, Any]:
    """Return the tables and the figures of each arm; arms that are the best of several are added to each table."""
    penalties = [name for name in PENALTIES if all(name in arms for arms in mine.values())]
    for arms in mine.values():
        arms["best arm, in hindsight"] = min(
            (arms[name] for name in (BASE, *ARMS) if name in arms), key=lambda one: float(np.mean(one["loss"]))
        )
        arms["best penalty"] = arms[best_of(arms, penalties)]
        arms |= {name: arms[best_of(arms, grids)] for name, grids in IN_THE_LOSS.items() if arms.keys() & set(grids)}
        tuned = [arms[name] for name in LEARNERS if name in arms]
        if tuned:
            arms["best reference, in hindsight"] = min(tuned, key=lambda one: float(np.mean(one["loss"])))
        references = arms.get(REFERENCES, {}).items()
        arms |= {name: value for name, value in references if "loss" in value and name not in arms}
    names = [
        *ARMS,
        "best penalty",
        *IN_THE_LOSS,
        *LEARNERS,
        *sorted({n for arms in mine.values() for n in arms.get(REFERENCES, {})}),
    ]
    return {
        "tables": list(mine),
        "arms": {name: of_arm(mine, name) for name in [*names, *HINDSIGHT] if of_arm(mine, name)},
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
    """Return the mean loss with one z or bound throughout, only the rate chosen, and the zeros at the middle rate."""
    ratios, zeros = [], []
    for table, arms in mine.items():
        line = lines[table, level]
        ratios.append(float(np.mean(at_one_z(line, z)["loss"]) / np.mean(arms[BASE]["loss"])))
        place = list(line["configurations"]).index(f"0.01 {z}")
        zeros.append({name: shares[place] for name, shares in line["zeros"].items()})
    means = {name: float(np.mean([one[name] for one in zeros])) for name in zeros[0]}
    return {"over adamw": mean_ratio(ratios), "worst": max(ratios), "zeros": means}


def one_setting(rows: Sequence[Cell], cells: Mapping[Key, Mapping[str, Cell]], level: int) -> dict[str, Any]:
    """Return what an arm comes to with one rate and strength on all tables, best on those that choose rules.

    Of each arm that all tables have: the setting, and the mean loss over tuned AdamW's on the tables that chose it, on
    the others, and the worst of these.
    """
    found: dict[str, Any] = {}
    for name in (
        BASE,
        "adamw, L1 in the loss",
        "adamw, decoupled L1",
        "snr",
        "snr, decoupled L1",
        "none, shrinkage",
        SHRUNK,
        *BOUND,
    ):
        arm = IN_THE_LOSS[name][1] if name in IN_THE_LOSS else name  # one grid, with as many settings as the others
        mine = {row["table"]: row for row in rows if row["arm"] == arm and row["probes"] == level}
        if any(table not in mine for table, probes in cells if probes == level):
            continue
        halves: list[dict[str, list[float]]] = [{}, {}]
        for table, row in mine.items():
            for setting, values in row["configurations"].items():
                loss = np.mean([math.inf if loss is None else loss for loss in values["best"][1][0]])
                ratio = float(loss / np.mean(cells[table, level][BASE]["loss"]))
                halves[not SOURCES[table].chosen_on].setdefault(setting, []).append(ratio)
        best = min(halves[0], key=lambda setting: mean_ratio(halves[0][setting]))
        tested = halves[1][best]
        found[name] = {
            "setting": best,
            "chosen on": mean_ratio(halves[0][best]),
            "tested on": mean_ratio(tested),
            "worst tested": max(tested),
        }
    return found


def setting_table(found: Mapping[str, Any]) -> list[str]:
    """Return a line for each arm with one setting on all tables."""
    figures = ("rate and strength", "chosen on", "tested on", "worst tested")
    lines = heading(["arm", *(f"{columns_named(level)}: {figure}" for level in found for figure in figures)])
    for name in dict.fromkeys(name for level in found.values() for name in level):
        ones = [level.get(name) for level in found.values()]
        cells = [
            text
            for one in ones
            for text in (
                [one["setting"], f"{one['chosen on']:.3f}", f"{one['tested on']:.3f}", f"{one['worst tested']:.2f}"]
                if one
                else [""] * len(figures)
            )
        ]
        lines.append(f"| {' | '.join([SHOWN[name], *cells])} |")
    return lines


def at_one_z(line: Cell, z: str) -> Cell:
    """Return what an arm reached with one z and the best rate."""
    kept = {name: values for name, values in line["configurations"].items() if name.split()[1] == z}
    return reached({key: value for key, value in line.items() if key != "opened"} | {"configurations": kept})


def arms_table(found: Mapping[str, Any]) -> list[str]:
    """Return a line for each arm of `SHOWN`: its loss over AdamW's, how often clearly lower, and ours over it."""
    figures = ("loss", "better, unclear, worse", "shrinkage over it")
    lines = heading(["arm", *(f"{columns_named(level)}: {figure}" for level in found for figure in figures)])
    for name, title in SHOWN.items():
        ones = [level["arms"].get(name) for level in found.values()]
        cells = [title]
        for one in ones:
            counted = one and f"{', '.join(map(str, one['against adamw']))}{of_tables(one, found)}"
            cells += [f"{one['over adamw']:.3f}", counted, f"{one['shrinkage over it']:.3f}"] if one else [""] * 3
        if any(ones):
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def columns_named(level: str) -> str:
    """Return how a page names a number of useless columns."""
    return f"with {int(level):,}" if int(level) else "as they come"


def of_tables(one: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return on how many tables an arm was run, where these are not all."""
    most = max(len(level["tables"]) for level in found.values())
    return "" if one["tables"] == most else f" (of {one['tables']})"


def z_table(found: Mapping[str, Any]) -> list[str]:
    """Return a line for each z and bound: loss over AdamW's, the worst table's, and the shares of exact zeros."""
    figures = ("loss", "worst table", "zero weights", "zero columns")
    lines = heading(["z or bound", *(f"{columns_named(level)}: {f}" for level in found for f in figures)])
    levels = [level["z"] | level["bounds"] for level in found.values()]
    for z in levels[0]:
        if any(z not in level for level in levels):
            continue  # not run on all tables of a level yet
        cells = [z]
        for level in levels:
            one = level[z]
            shares = [f"{one['zeros'][name]:.2f}" for name in ("weights", "columns")]
            cells += [f"{one['over adamw']:.3f}", f"{one['worst']:.2f}", *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_losses(cells: Mapping[Key, Mapping[str, Cell]], level: int, path: Path) -> None:
    """Write every table's test losses, the chosen rate and z, and the references."""
    mine = {table: arms for (table, probes), arms in cells.items() if probes == level}
    names = [BASE, *(name for name in (*ARMS, *LEARNERS) if any(name in arms for arms in mine.values()))]
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
