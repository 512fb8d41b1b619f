"""The drawings of the report, as SVG text."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from popriskmin.compare.report.results import Results
from popriskmin.compare.report.run_summary import Run
from popriskmin.compare.report.statistics import interval
from popriskmin.compare.text import exact
from popriskmin.compare.training.arms import AVERAGED, Arm
from popriskmin.compare.training.runner import Job
from popriskmin.compare.training.train import Record

# Okabe and Ito's colours, which people with any colour vision tell apart.
PALETTE = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8A6D00", "#7F3C8D")
COLORS = {"adamw": "#555555", "prm": "#0072B2", "adamw-matched": "#D55E00"}
STYLE: dict[Any, Any] = {
    # Text stays text: letters as outlines would be a third of the page. DejaVu Sans comes with matplotlib, which lays
    # the drawing out by it. Where a browser lacks it, Verdana is as wide and other fonts are narrower.
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "svg.hashsalt": "popriskmin",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
}


def color_of(arm: str, arms: Sequence[Arm]) -> str:
    """Return an arm's colour, the same in every drawing."""
    arm = arm.removesuffix(AVERAGED)  # which is drawn dashed
    if arm in COLORS:
        return COLORS[arm]
    others = [other.name for other in arms if other.name not in COLORS and not other.averaged]
    return PALETTE[others.index(arm) % len(PALETTE)]


def line_of(arm: str) -> str:
    """Return an arm's line: dashed where it is averaged weights, which have the colour of the plain ones."""
    return "--" if arm.endswith(AVERAGED) else "-"


CELLS_DPI = 100  # of what is drawn in pixels

# A tenth of a pixel is what can be seen; matplotlib writes six places behind the point.
_PATH, _PLACES = re.compile(r'\bd="[^"]*"'), re.compile(r"(\.\d)\d+")
_SPARE = re.compile(r"; font-family: [^;\"]*|(?<=\n) +")  # the page names the font once


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), dpi=CELLS_DPI)
    text = file.getvalue()[file.getvalue().index("<svg") :]
    return _SPARE.sub("", _PATH.sub(lambda path: _PLACES.sub(r"\1", path[0]).replace(" \n", " "), text))


def learning_curves(results: Results) -> str:
    """Draw the test metric over the training, of each arm as chosen by its final value and as chosen by its area."""
    titles = {"final": "chosen by the final value", "area": "chosen by the mean over the training"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 6.2), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        for axes, (choosing, title) in zip(panels, titles.items()):
            for arm in results.arms:
                runs = [run for run in results.chosen(arm.name, choosing) if run.finished]
                if runs:
                    lr = exact(runs[0].job.configuration.lr)
                    _curve(axes, runs, results, f"{arm.name}, lr {lr}")
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_ylabel(f"test {results.metric}")
            if axes.get_lines():
                axes.legend(fontsize=8, framealpha=0.8, edgecolor="none")
            _references(results, axes)
            _zoom(results, choosing, axes)
        panels[-1].set_xlabel("step")
        return _svg(figure)


def _curve(axes: mpl.axes.Axes, runs: Sequence[Run], results: Results, label: str) -> None:
    name = runs[0].job.arm.name
    color = color_of(name, results.arms)
    curves = np.array([run.test[results.metric] for run in runs])
    axes.plot(runs[0].steps, curves.mean(0), color=color, linestyle=line_of(name), label=label)
    bounds = [interval(list(column)) for column in curves.T]
    if all(bound is not None for bound in bounds):
        low, high = np.array(bounds).T
        axes.fill_between(runs[0].steps, low, high, color=color, alpha=0.18, linewidth=0)


def _references(results: Results, axes: mpl.axes.Axes) -> None:
    """Draw what the task names beside the optimizers, as lines with their names."""
    known = {name: metrics[results.metric].mean for name, metrics in results.references.test.items()
             if results.metric in metrics}  # fmt: skip
    for i, (name, mean) in enumerate(sorted(known.items(), key=lambda item: item[1])):
        axes.axhline(mean, color="#222222", linewidth=0.9, linestyle=("--", ":", "-.")[i % 3])
        # The names of lines that may lie close together stand side by side.
        place = (1 - 0.26 * (i % 2), mean)
        axes.annotate(name, place, xycoords=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)


def _zoom(results: Results, choosing: str, axes: mpl.axes.Axes) -> None:
    """Leave the first evaluation, of the untrained network, out of the range if it would dwarf the rest."""
    runs = [run for arm in results.arms for run in results.chosen(arm.name, choosing) if run.finished]
    values = np.array([value for run in runs for value in run.test[results.metric][1:] if np.isfinite(value)])
    if values.size:
        low, high = np.quantile(values, [0.05, 1.0] if results.direction == "max" else [0.0, 0.95])
        lines = [
            metrics[results.metric].mean for metrics in results.references.test.values() if results.metric in metrics
        ]
        low, high = min([low, *lines]), max([high, *lines])
        margin = 0.08 * (high - low or 1)
        axes.set_ylim(low - margin, high + margin)


def by_budget(results: Results) -> str | None:
    """Draw the expected final test metric against the number of configurations tried; None for a grid of one."""
    if len(results.learning_rates) * len(results.weight_decays) == 1:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for arm_name, rows in results.by_budget.items():
            color = color_of(arm_name, results.arms)
            known = [(row.k, row.test) for row in rows if row.test is not None]
            means = [test.mean for _, test in known]
            axes.plot([k for k, _ in known], means, color=color, linestyle=line_of(arm_name))
            banded = [(k, *test.interval) for k, test in known if test.interval is not None]
            if banded:
                k, low, high = np.array(banded).T
                axes.fill_between(k, low, high, color=color, alpha=0.18, linewidth=0)
        axes.set_xlabel("configurations tried, drawn at random from the grid")
        axes.set_ylabel(f"expected final test {results.metric}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure)


def by_learning_rate(results: Results) -> str:
    """Draw the final test metric against the learning rate, with the best weight decay for each."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for arm_name, rows in results.by_learning_rate().items():
            color = color_of(arm_name, results.arms)
            x = [row.lr for row in rows]
            y = [np.nan if row.mean is None else row.mean for row in rows]
            axes.plot(x, y, color=color, marker="o", markersize=4, linestyle=line_of(arm_name))
            known = [(row.lr, *row.interval) for row in rows if row.interval is not None]
            if known:
                lr, low, high = np.array(known).T
                axes.fill_between(lr, low, high, color=color, alpha=0.18, linewidth=0)
            lost = [row.lr for row in rows if row.mean is None]
            axes.plot(lost, [0.02] * len(lost), "x", color=color, transform=axes.get_xaxis_transform(), clip_on=False)
        if min(results.learning_rates) > 0:
            axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel(f"final test {results.metric}")
        _references(results, axes)
        return _svg(figure)


def mask_by_layer(results: Results, records: Mapping[Job, Sequence[Record]]) -> str | None:
    """Draw, for each PRM arm at its chosen configuration, the mean `q` of every layer over the training."""
    panels = []
    for arm in results.arms:
        if arm.kind == "prm" and not arm.averaged:
            layers, steps, values = _openness([records[run.job] for run in results.chosen(arm.name)])
            if layers:
                panels.append((arm.name, layers, steps, values))
    if not panels:
        return None
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        heights = [0.26 * len(layers) + 1.0 for _, layers, _, _ in panels]
        figure = Figure(figsize=(9.6, sum(heights)), layout="constrained")
        rows = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (name, layers, steps, values) in zip(rows, panels):
            edges = np.concatenate([[0], steps])
            drawn = axes.pcolormesh(
                edges,
                np.arange(len(layers) + 1),
                np.clip(values, 1e-3, 1),
                norm=LogNorm(1e-3, 1),
                rasterized=True,  # a path for each of thousands of cells would be most of the page
            )
            axes.set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=9)
            axes.invert_yaxis()
            axes.set_title(name, loc="left", fontsize=10)
            axes.set_xlabel("step")
        figure.colorbar(drawn, ax=list(rows), label="mean q", ticks=[1e-3, 1e-2, 1e-1, 1], format="%g")
        return _svg(figure)


def _openness(runs: Sequence[Sequence[Record]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return layers, steps, and the mean `q` over runs by layer and step."""
    tables = [[record for record in records if record["kind"] == "mask"] for records in runs]
    tables = [table for table in tables if table]
    if not tables:
        return [], np.array([]), np.array([])
    layers = list(tables[0][-1]["layers"])
    shortest = min(len(table) for table in tables)
    steps = np.array([record["step"] for record in tables[0][:shortest]])
    values = np.array(
        [
            [[_number(record["layers"].get(layer)) for record in table[:shortest]] for layer in layers]
            for table in tables
        ]
    )
    return layers, steps, values.mean(0)


def _number(row: Mapping[str, float] | None) -> float:
    return np.nan if row is None or row["mean_q"] is None else row["mean_q"]
