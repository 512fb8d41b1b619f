"""Tables and pictures of the study of real tables, from the lines that its runs have left."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables_data import SOURCES

from popriskmin.compare.report.statistics import interval
from popriskmin.mask import MASKS, variance_of_mean

PENALTY = "adamw, L1 on the first layer"
RIVALS = ("adamw", "sgd", PENALTY, "adamw, averaged")
BASE = "adamw"
Z_2 = "threshold z=2"
FIRST_OF_PRM = ("snr", "debias", "soft", "hard", Z_2, "threshold z=3")
TOGETHER = tuple(f"{mask}, L1 on the first layer" for mask in ("snr", Z_2, "soft", "hard"))
REFERENCES = "references"
RESULTS = "results.json"
MARKS = ("<!-- tables: made by experiments/tables.py report -->", "<!-- end of the tables -->")
# A page takes a table of so many rows or more from a file, which holds it as data.
LONG = 12

Cell = dict[str, Any]
Feature = Callable[[dict[str, Cell]], float]
Pick = Callable[[dict[str, Cell]], str]
Key = tuple[str, int]


def write(rows: Sequence[Cell], out: Path, into: Path | None = None) -> None:
    """Write summary and rules as `results.json`, and the pictures; print the tables, or put them into a page."""
    cells = gather(rows)
    if not cells:
        raise SystemExit(f"{out} holds no runs yet: make some with the action run")
    common = studied(cells)
    found = {
        "summary": {str(probes): summary(cells, probes) for probes in sorted({key[1] for key in common})},
        "rules": rules(common),
    }
    (out / RESULTS).write_text(json.dumps(found, indent=1) + "\n")
    draw_ratios(common, out / "ratios.png")
    draw_rule(common, out / "rule.png")
    draw_masks(out / "masks.png")
    tables = page(cells, common, found)
    if into is None:
        print(tables)
    else:
        head, _, rest = into.read_text().partition(f"{MARKS[0]}\n")
        _, mark, tail = rest.partition(MARKS[1])
        if not mark:
            raise SystemExit(f"{into} needs the lines {MARKS[0]} and {MARKS[1]}, between which the tables go")
        into.write_text(f"{head}{MARKS[0]}\n\n{long_tables_as_files(tables, out, into)}\n{MARKS[1]}{tail}")


def long_tables_as_files(text: str, out: Path, page: Path) -> str:
    """Write each long table as a CSV file beside the results, and return the page's text that shows the files."""
    heading = ""
    parts = []
    for part in text.split("\n\n"):
        lines = part.splitlines()
        if part.startswith("### "):
            heading = part[4:]
        if not part.startswith("| ") or len(lines) < LONG + 2:
            parts.append(part)
            continue
        rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in (lines[0], *lines[2:])]
        first = rows[0][0].split(",")[0]
        file = out / f"{re.sub(r'[^a-z0-9]+', '-', f'{heading} {first}'.lower())}.csv"
        written = io.StringIO()
        csv.writer(written, lineterminator="\n").writerows(rows)
        file.write_text(written.getvalue())
        parts.append(f"```{{csv-table}}\n:file: {os.path.relpath(file, page.parent)}\n:header-rows: 1\n```")
    return "\n\n".join(parts)


def gather(rows: Sequence[Cell]) -> dict[Key, dict[str, Cell]]:
    """Return, for each table and number of probes, what each arm reached with the configuration it chose."""
    cells: dict[Key, dict[str, Cell]] = {}
    for row in rows:
        cells.setdefault((row["table"], row["probes"]), {})[row["arm"]] = row
    order = list(SOURCES)
    ordered = sorted(cells.items(), key=lambda item: (item[0][1], order.index(item[0][0])))
    return {key: {arm: reached(row) for arm, row in arms.items()} for key, arms in ordered if BASE in arms}


def reached(row: Cell) -> Cell:
    """Return the chosen configuration of an arm and its test values by seed; of references, the values of each."""
    if row["arm"] == REFERENCES:
        names = list(row["values"][0])
        return {name: transposed([seed[name] for seed in row["values"]]) for name in names}
    means = {
        name: np.mean([math.inf if value is None else value for value in found["best"][0][0]])
        for name, found in row["configurations"].items()
    }
    chosen = min(means, key=lambda name: means[name])
    best = row["configurations"][chosen]["best"]
    kept: Cell = {
        "chosen": chosen,
        "validation": best[0][0],
        "loss": best[1][0],
        "rows": row["rows"],
        "columns": row["columns"],
    }
    if len(best[1]) > 1:
        kept["accuracy"] = best[1][1]
    if "opened" in row:
        place = list(row["configurations"]).index(chosen)
        kept["mean q"] = {look: values[0][place] for look, values in row["opened"].items()}
        kept["open"] = {look: values[1][place] for look, values in row["opened"].items()}
    return kept


def transposed(seeds: Sequence[Cell]) -> Cell:
    """Return the metrics of several seeds as lists; the error of a regression is its loss."""
    return {("loss" if name == "error" else name): [seed[name] for seed in seeds] for name in seeds[0]}


def ratio(arms: dict[str, Cell], arm: str, base: str = BASE) -> float:
    """Return the mean test loss of an arm over that of another."""
    return float(np.mean(arms[arm]["loss"]) / np.mean(arms[base]["loss"]))


def verdict(arms: dict[str, Cell], arm: str, base: str = BASE) -> int:
    """Return 1 or -1 where an arm's loss is clearly lower or higher than another's, paired by seed; else 0."""
    bounds = interval([a - b for a, b in zip(arms[arm]["loss"], arms[base]["loss"])])
    if bounds is None or bounds[0] <= 0 <= bounds[1]:
        return 0
    return 1 if bounds[1] < 0 else -1


def best_of(arms: dict[str, Cell], names: Sequence[str]) -> str:
    """Return which of these arms has the best validation loss."""
    return min((name for name in names if name in arms), key=lambda name: float(np.mean(arms[name]["validation"])))


def studied(cells: dict[Key, dict[str, Cell]]) -> dict[Key, dict[str, Cell]]:
    """Return what is there at the numbers of probes that every table has, so that each table counts as much."""
    tables, levels = {key[0] for key in cells}, {key[1] for key in cells}
    everywhere = {probes for probes in levels if all((table, probes) in cells for table in tables)}
    return {key: arms for key, arms in cells.items() if key[1] in everywhere}


def prm_arms(cells: dict[Key, dict[str, Cell]]) -> list[str]:
    """Return the arms of PRM that every table has."""
    return [name for name in FIRST_OF_PRM if any(name in arms for arms in cells.values())]


def summary(cells: dict[Key, dict[str, Cell]], probes: int) -> dict[str, Any]:
    """Return for each arm, over the tables that have it: better, unclear, worse than AdamW, and the mean ratio."""
    mine = [arms for key, arms in cells.items() if key[1] == probes]
    names = [*RIVALS[1:], *prm_arms(cells), *TOGETHER, "adamw-matched to soft", "adamw-matched to snr"]
    found: dict[str, Any] = {}
    for name in names:
        there = [arms for arms in mine if name in arms]
        if not there:
            continue
        rival = [best_of(arms, RIVALS) for arms in there]
        found[name] = {
            "tables": len(there),
            "against adamw": counts([verdict(arms, name) for arms in there]),
            "against the best rival": counts([verdict(arms, name, best) for arms, best in zip(there, rival)]),
            "ratio": mean_ratio([ratio(arms, name) for arms in there]),
            "ratio to the best rival": mean_ratio([ratio(arms, name, best) for arms, best in zip(there, rival)]),
        }
    return found


def counts(verdicts: Sequence[int]) -> list[int]:
    """Return how many are better, unclear and worse."""
    return [verdicts.count(value) for value in (1, 0, -1)]


def mean_ratio(ratios: Sequence[float]) -> float:
    """Return the geometric mean."""
    return float(np.exp(np.mean(np.log(ratios)))) if len(ratios) else math.nan


# What can be known beforehand, or after a part of one run of PRM with the snr mask.
FEATURES: dict[str, Feature] = {
    "columns per training row": lambda arms: float(np.mean(arms[BASE]["columns"]) / arms[BASE]["rows"]),
    "open share of snr after a tenth": lambda arms: -arms["snr"]["open"]["0.1"],
    "open share of snr after three tenths": lambda arms: -arms["snr"]["open"]["0.3"],
}


def rules(cells: dict[Key, dict[str, Cell]]) -> dict[str, Any]:
    """Choose, on half of the tables, the value of each feature above which to take a mask; report on the other half.

    The figure of a rule is the geometric mean of the ratio of the loss to AdamW's, over the tables that have all arms
    that the rule may take, where 0 and 500 probes are two cases.
    """
    names = prm_arms(cells)
    found: dict[str, Any] = {}
    for name in names:
        _judge(found, cells, f"always {name}", [name], _take(name))
    for feature, value in FEATURES.items():
        pairs = [(BASE, "soft"), *(("snr", name) for name in names if name not in ("snr", "debias"))]
        pairs += [(Z_2, name) for name in ("threshold z=3", "soft", "hard") if name in names and Z_2 in names]
        for low, high in pairs:
            chosen = _cases(cells, [low, high, "snr"], True)
            values = sorted(value(arms) for arms in chosen)
            edges = [-math.inf, *((one + other) / 2 for one, other in itertools.pairwise(values)), math.inf]
            edge = min(edges, key=lambda edge, take=(value, low, high): _figure(_above(edge, *take), chosen))
            bound = f"above {edge:.3g}" if feature.startswith("columns") else f"below {-edge:.3g}"
            text = f"{high} where {feature} is {bound}, else {low}"
            _judge(found, cells, text, [low, high, "snr"], _above(edge, value, low, high))
    for arms in ([BASE, "snr"], [BASE, "soft"], [BASE, "snr", "soft"]):
        _judge(found, cells, f"the best of {', '.join(arms)} on validation data", arms, _best(arms))
    everything = [BASE, *names]
    _judge(found, cells, "the best of these on test data, which nobody knows", everything, _oracle(everything))
    return found


def _take(name: str) -> Pick:
    return lambda arms: name


def _above(edge: float, value: Feature, low: str, high: str) -> Pick:
    """Return the rule that takes one arm where a feature is above an edge, and another elsewhere."""
    return lambda arms: high if value(arms) > edge else low


def _best(names: Sequence[str]) -> Pick:
    return lambda arms: best_of(arms, names)


def _oracle(names: Sequence[str]) -> Pick:
    return lambda arms: min(names, key=lambda name: ratio(arms, name))


def _cases(cells: dict[Key, dict[str, Cell]], names: Sequence[str], chosen_on: bool) -> list[dict[str, Cell]]:
    """Return one half of the tables, of those that have all these arms."""
    return [
        arms
        for key, arms in cells.items()
        if SOURCES[key[0]].chosen_on == chosen_on and all(name in arms for name in names)
    ]


def _figure(pick: Pick, cases: Sequence[dict[str, Cell]]) -> float:
    return mean_ratio([ratio(arms, pick(arms)) for arms in cases])


def _judge(
    found: dict[str, Any], cells: dict[Key, dict[str, Cell]], text: str, names: Sequence[str], pick: Pick
) -> None:
    """Add a rule's figures, where there are cases of both halves."""
    chosen, tested = (_cases(cells, names, half) for half in (True, False))
    if chosen and tested:
        found[text] = {
            "cases": [len(chosen), len(tested)],
            "chosen on": _figure(pick, chosen),
            "tested on": _figure(pick, tested),
            "worst tested": max(ratio(arms, pick(arms)) for arms in tested),
        }


def page(cells: dict[Key, dict[str, Cell]], common: dict[Key, dict[str, Cell]], found: dict[str, Any]) -> str:
    """Return all tables as Markdown; `common` is what is there of every table."""
    parts = []
    for probes in sorted({key[1] for key in common}):
        title = f"With {probes} columns that say nothing" if probes else "As they come"
        mine = {table: arms for (table, level), arms in common.items() if level == probes}
        parts += [f"### {title}", "", *loss_table(mine), "", *summary_table(found, probes), ""]
    further = {key[0] for key in cells.keys() - common.keys()}
    if further:
        mine = {f"{table} + {level}": cells[table, level] for table, level in sorted(cells) if table in further}
        parts += ["### From none of such columns to many", "", *loss_table(mine), ""]
    together = together_tables(common)
    if together:
        parts += ["### A mask and the penalty together", "", *together, ""]
    parts += ["### Rules", "", *rules_table(found["rules"])]
    return "\n".join(parts) + "\n"


def loss_table(mine: dict[str, dict[str, Cell]]) -> list[str]:
    """Return the test loss of every row and arm, marked where it is clearly better (+) or worse (-) than AdamW's."""
    names = [name for name in (*RIVALS, *FIRST_OF_PRM) if any(name in arms for arms in mine.values())]
    references = list(next((arms[REFERENCES] for arms in mine.values() if REFERENCES in arms), {}))
    head = ["table, rows x columns", *names, *references]
    lines = heading(head)
    for label, arms in mine.items():
        base = arms[BASE]
        cell = [f"{label}, {base['rows']} x {round(np.mean(base['columns']))}"]
        for name in names:
            if name not in arms:
                cell.append("")
                continue
            mark = {1: " +", 0: "", -1: " -"}[verdict(arms, name)] if name != BASE else ""
            cell.append(f"{np.mean(arms[name]['loss']):.3f}{mark}")
        there = arms.get(REFERENCES, {})
        cell += [f"{np.mean(there[name]['loss']):.3f}" if name in there else "" for name in references]
        lines.append(f"| {' | '.join(cell)} |")
    return lines


def heading(names: Sequence[str]) -> list[str]:
    """Return the first two lines of a table whose columns, but for the first, hold numbers."""
    return [f"| {' | '.join(names)} |", f"| --- |{' ---: |' * (len(names) - 1)}"]


def together_tables(common: dict[Key, dict[str, Cell]]) -> list[str]:
    """Return the arms that have a mask and the penalty beside the penalty alone: how often better, and every loss."""
    there = {key: arms for key, arms in common.items() if all(name in arms for name in (PENALTY, *TOGETHER))}
    levels = sorted({key[1] for key in there})
    if not there:
        return []
    better = "better, unclear, worse than the penalty alone (loss over the penalty's)"
    lines = heading([better, *(f"{level} columns that say nothing" for level in levels)])
    for name in TOGETHER:
        cells = []
        for level in levels:
            mine = [arms for key, arms in there.items() if key[1] == level]
            verdicts = ", ".join(map(str, counts([verdict(arms, name, PENALTY) for arms in mine])))
            cells.append(f"{verdicts} ({mean_ratio([ratio(arms, name, PENALTY) for arms in mine]):.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    names = [BASE, PENALTY, *TOGETHER]
    lines += ["", *heading(["table", *names])]
    for (table, level), arms in there.items():
        losses = (f"{np.mean(arms[name]['loss']):.3f}" for name in names)
        lines.append(f"| {table} + {level} | {' | '.join(losses)} |")
    return lines


def summary_table(found: dict[str, Any], probes: int) -> list[str]:
    """Return how often each arm was better, and by which factor its loss differs."""
    lines = [
        "| arm | tables | better, unclear, worse than adamw | loss over adamw's | better, unclear, worse than the best "
        "rival | loss over the best rival's |",
        "| --- | ---: | --- | ---: | --- | ---: |",
    ]
    for name, row in found["summary"][str(probes)].items():
        better, rival = (", ".join(map(str, row[key])) for key in ("against adamw", "against the best rival"))
        lines.append(
            f"| {name} | {row['tables']} | {better} | {row['ratio']:.3f} | {rival} | "
            f"{row['ratio to the best rival']:.3f} |"
        )
    return lines


def rules_table(found: dict[str, Any]) -> list[str]:
    """Return the rules and their figures on both halves of the tables."""
    lines = [
        "| rule | loss over adamw's where chosen | where tested | worst tested | cases |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in found.items():
        figures = " | ".join(f"{row[key]:.3f}" for key in ("chosen on", "tested on", "worst tested"))
        lines.append(f"| {name} | {figures} | {row['cases'][0]} + {row['cases'][1]} |")
    return lines


COLORS = {
    PENALTY: "#17212f",
    "snr": "#4c78a8",
    "debias": "#72b7b2",
    "soft": "#e45756",
    "hard": "#f58518",
    "threshold z=2": "#54a24b",
    "threshold z=3": "#b279a2",
}


def draw_ratios(cells: dict[Key, dict[str, Cell]], path: Path) -> None:
    """Draw each arm's loss over AdamW's, a line for each table, a panel for each number of probes."""
    plt = _pyplot()
    levels = sorted({key[1] for key in cells})
    tables = [name for name in SOURCES if any(key[0] == name for key in cells)]
    size = (4.6 * len(levels), 1.4 + 0.24 * len(tables))
    figure, axes = plt.subplots(1, len(levels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for ax, probes in zip(axes[0], levels):
        ax.axvline(1, color="0.4", lw=1)
        for arm in [PENALTY, *prm_arms(cells)]:
            points = [
                (ratio(cells[table, probes], arm), place)
                for place, table in enumerate(tables)
                if arm in cells.get((table, probes), {})
            ]
            if points:
                marker, style = ("D", {"mfc": "none"}) if arm == PENALTY else ("o", {"alpha": 0.85})
                ax.plot(*zip(*points), marker, ms=4.5, color=COLORS[arm], label=arm, **style)
        ax.set_xscale("log")
        ticks = [0.1, 0.2, 0.5, 0.8, 1, 1.25, 2, 4]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        ax.minorticks_off()
        ax.set_xlabel("test loss over AdamW's", fontsize=9)
        ax.set_title(f"with {probes} columns that say nothing" if probes else "as they come", fontsize=10)
        ax.grid(axis="y", color="0.92")
    axes[0][0].set_yticks(range(len(tables)), tables, fontsize=8)
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=7, fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_rule(cells: dict[Key, dict[str, Cell]], path: Path) -> None:
    """Draw the ratio of soft's loss to AdamW's against the columns for each training row."""
    plt = _pyplot()
    figure, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    value = FEATURES["columns per training row"]
    for chosen_on, marker in ((True, "o"), (False, "s")):
        for probes in sorted({key[1] for key in cells}):
            points = [
                (value(arms), ratio(arms, "soft"))
                for key, arms in cells.items()
                if SOURCES[key[0]].chosen_on == chosen_on and key[1] == probes and "soft" in arms
            ]
            if points:
                half = "rule chosen on" if chosen_on else "tested on"
                filled = {"mfc": "none"} if probes == 0 else {}
                ax.plot(*zip(*points), marker, ms=5, color="#e45756" if probes else "#4c78a8", **filled,
                        label=f"{half}, {probes} probes")  # fmt: skip
    ax.axhline(1, color="0.4", lw=1)
    ax.set(xscale="log", yscale="log", xlabel="columns per training row", ylabel="loss of soft over AdamW's")
    ticks = [0.1, 0.2, 0.5, 1, 2]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_masks(path: Path) -> None:
    """Draw what each mask lets through of a mean gradient, given in its own standard errors, once training runs."""
    plt = _pyplot()
    k = variance_of_mean(0.9, 10_000)
    x = torch.linspace(0, 8, 801)
    signal, noise = x.square() * k, torch.ones_like(x)  # the variance of one gradient is 1, that of the mean k
    through = {
        "snr": MASKS["snr"].of_tensor(signal, noise, 1.0, 1.0, 0.0),
        "debias": MASKS["snr"].of_tensor((signal - k).clamp(min=0), noise, 1.0, 1.0, 1e-30),
        "soft": MASKS["soft"].of_tensor(signal, noise, 1.0, 1.0, 0.0),
        "hard": MASKS["hard"].of_tensor(signal, noise, 1.0, 1.0, 0.0),
        "threshold z=2": MASKS["threshold"].of_tensor(signal, noise * k, 1.0, 4.0, 1e-30),
    }
    figure, ax = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    ax.fill_between(x, 8 * torch.exp(-x.square() / 2), color="0.9", label="how often noise alone is so large")
    ax.plot(x, x, color="0.4", lw=1.2, label="AdamW")
    for name, q in through.items():
        ax.plot(x, q * x, color=COLORS[name], lw=1.6, label=name)
    ax.set(xlabel="mean gradient, in its own standard errors", ylabel="what is let through", xlim=(0, 8), ylim=(0, 8))
    ax.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
