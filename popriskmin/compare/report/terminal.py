"""A comparison's answer in the terminal: the tables, the sentences and the notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from popriskmin.compare.report.notes import by_arm
from popriskmin.compare.report.run_summary import FIGURES
from popriskmin.compare.text import exact

# `Results`, whose module imports this one.
Results: TypeAlias = Any

MEANING = {
    "final": "after the last step",
    "best": "at the step with the best validation metric",
    "area": "mean over the training",
}


def show(results: Results, console: Console | None = None) -> None:
    """Print the tables, the answer and what to know of them."""
    # Where no terminal limits the width, names of arms need not be broken.
    console = console or (Console() if Console().is_terminal else Console(width=120))
    direction = "higher" if results.task.metrics[results.metric] == "max" else "lower"
    title = f"\n{results.task.name}: test {results.metric}, {direction} is better"
    console.print(title, style="bold", highlight=False, markup=False)
    # A terminal's lines are broken between words; elsewhere a sentence stays on one line.
    style: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": not console.is_terminal}
    for line in results.task.about:
        console.print(line, **style)
    if results.has_an_answer:
        console.print("Each arm's configuration is the best on validation data by the same figure.\n", highlight=False)
        for figure in FIGURES:
            console.print(_table(results, figure))
        if results.by_joined:
            console.print(_joined_table(results))
    else:
        console.print(
            "There is nothing to compare: no arm has a configuration that every seed brought to its end.", **style
        )
    if results.headline:
        console.print(results.headline, style="bold", **style)
    found = [f"{label}: {sentence}" for label, sentence in results.verdicts.items()]
    for line in (*found, *(results.goal_lines() if results.by_goal else ())):
        # Padding indents the lines that a sentence goes on to, too, but would break it where none should be.
        console.print(Padding(Text(line), (0, 0, 0, 2)) if console.is_terminal else f"  {line}", **style)
    if results.statements:
        console.print(f"All {len(results.statements)} statements, and what p means, are on the page.", **style)
    # Edges are those of what the tables say was chosen.
    for line in (*results.warnings, *(by_arm(results.edges) if results.has_an_answer else ())):
        console.print(f"Note: {line}", style="yellow", **style)


def _empty_table(title: str, columns: Sequence[str]) -> Table:
    """Return a table with a column for the arm, its configuration, and each of the figures."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left", title_style="")
    table.title = title
    table.add_column("arm", overflow="fold")
    for column in ("lr", "decay"):
        table.add_column(column, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _table(results: Results, figure: str) -> Table:
    columns = (f"{figure} [95% interval]", "difference to adamw")
    table = _empty_table(f"{figure}: {MEANING[figure]}", columns)
    for arm in results.arms:
        summary = results.selections[figure][arm.name]
        if summary["chosen"] is None:
            table.add_row(Text(arm.name), "-", "-", "-", "")
            continue
        chosen = (exact(summary["chosen"]["lr"]), exact(summary["chosen"]["weight_decay"]))
        found = summary["against"].get("adamw", {}).get(figure, {}).get(results.metric)
        against = format_estimate(found, signed=True) if found else ""
        table.add_row(Text(arm.name), *chosen, format_estimate(summary["test"][figure][results.metric]), against)
    for name, metrics in results.references.test.items():
        shown = format_estimate(metrics[results.metric]) if results.metric in metrics else "-"
        table.add_row(Text(name), "-", "-", shown, "")
    return table


def _joined_table(results: Results) -> Table:
    columns = ("joined [95% interval]", "stopped [95% interval]", "joined less stopped")
    table = _empty_table("joined: trained on training and validation data, after the last step", columns)
    for name, found in results.by_joined.items():
        chosen = (exact(found["chosen"]["lr"]), exact(found["chosen"]["weight_decay"]))
        estimates = (format_estimate(found[key][results.metric]) for key in ("test", "stopped"))
        apart = format_estimate(found["against"]["stopped"][results.metric], signed=True)
        table.add_row(Text(name), *chosen, *estimates, apart)
    return table


def format_estimate(found: Mapping[str, Any], signed: bool = False) -> str:
    """Write a mean with its interval.

    Examples
    --------
    >>> format_estimate({"mean": 0.93126, "interval": (0.92, 0.94)})
    '0.931 [0.920, 0.940]'
    """
    style = "+.3f" if signed else ".3f"
    text = format(found["mean"], style)
    if found["interval"] is not None:
        low, high = found["interval"]
        text += f" [{format(low, style)}, {format(high, style)}]"
    return text
