"""The pictures of the estimators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, GREY = "#2a6fbb", "#888888"


def path(path: Mapping[str, np.ndarray], chosen: float, ax: Axes | None) -> Axes:
    """Draw the held-out loss and the number of columns by shrinkage, and mark the chosen one."""
    ax = _axes(ax)
    ax.plot(path["shrinkage"], path["loss"], "o-", color=BLUE)
    ax.axvline(chosen, color=GREY, linewidth=1, linestyle=":")
    ax.set(xlabel="shrinkage (standard errors)", ylabel="held-out loss")
    ax.yaxis.label.set_color(BLUE)
    right = ax.twinx()
    right.plot(path["shrinkage"], path["n_columns"], "s--", color=GREY)
    right.set(ylabel="columns with weights", ylim=(0, None))
    right.yaxis.label.set_color(GREY)
    return ax


def importances(values: np.ndarray, selected: np.ndarray, names: Sequence[str], most: int, ax: Axes | None) -> Axes:
    """Draw the largest importances as bars, filled where the column is selected."""
    ax = _axes(ax)
    order = np.argsort(values)[::-1][:most][::-1]
    ax.barh(
        [str(names[i]) for i in order],
        values[order],
        color=[BLUE if selected[i] else "none" for i in order],
        edgecolor=BLUE,
    )
    ax.set(xlabel="importance (filled: selected)")
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("drawing needs the package matplotlib: pip install matplotlib") from error
    axes: Axes = plt.subplots(layout="constrained")[1]
    return axes
