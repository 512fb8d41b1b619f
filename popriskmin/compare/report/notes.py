"""Notes that a reader needs before believing the tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from popriskmin.compare.comparison import Comparison
from popriskmin.compare.report.analysis import Selections
from popriskmin.compare.report.run_summary import FIGURES, Choice, Run, runs_of, why_none
from popriskmin.compare.report.statistics import FEWEST_SEEDS
from popriskmin.compare.text import exact
from popriskmin.compare.training.arms import Arm

C = TypeVar("C", bound=Comparison)


def warnings_of(comparison: Comparison, runs: Sequence[Run], selections: Selections) -> list[str]:
    """Return warnings of few seeds, of runs that did not end, and of unlike starts."""
    warnings = []
    number = len(comparison.seeds)
    if number < FEWEST_SEEDS:
        shown = f"{number} seed{'s' if number > 1 else ''}"
        warnings.append(f"With {shown} no verdict is given, only values; use --seeds {FEWEST_SEEDS} or more.")
    for arm in comparison.arms:
        own = runs_of(runs, arm)
        # Averaged weights share the runs and their ends with the plain ones.
        for status in () if arm.averaged else ("diverged", "failed"):
            count = sum(run.end["status"] == status for run in own)
            if count:
                warnings.append(f"{arm.name}: {count} of {len(own)} runs {status}.")
        if selections["final"][arm.name].chosen is None:
            warnings.append(f"{arm.name}: {why_none(own, 'final', comparison.metric)}.")
    return warnings + _unlike_starts(runs, comparison.seeds)


def edges(comparison: Comparison, selections: Selections) -> dict[str, list[str]]:
    """Return, for each figure, a note for every arm that chose at an edge of the grid."""
    notes: dict[str, list[str]] = {}
    for figure in FIGURES:
        notes[figure] = []
        for arm in comparison.arms:
            chosen = selections[figure][arm.name].chosen
            if chosen is not None:
                notes[figure] += _edges_of(comparison, arm, chosen)
    return notes


def _edges_of(comparison: Comparison, arm: Arm, chosen: Choice) -> Iterator[str]:
    """Yield a note for each value of an arm's choice that is an edge of its grid."""
    rates, flag = arm.learning_rates, f"--arm-lr {arm.name}"
    if rates is None:
        rates, flag = tuple(comparison.learning_rates), "--lr"
    edge = _edge(chosen.lr, rates)
    if edge:
        yield f"{arm.name}: the learning rate {exact(chosen.lr)} is the {edge} of the grid; extend it ({flag})."
    # Of two decays each is an edge; and there is no decay below 0.
    edge = _edge(chosen.weight_decay, comparison.weight_decays) if len(comparison.weight_decays) > 2 else None
    if edge:
        value = exact(chosen.weight_decay)
        yield f"{arm.name}: the weight decay {value} is the {edge} of the grid; extend it (--weight-decay)."


def extended(comparison: C, selections: Selections) -> C:
    """Return the comparison with two more values beyond each edge that an arm chose."""
    rates, decays = list(comparison.learning_rates), list(comparison.weight_decays)
    own: dict[str, list[float]] = {}
    for arm in comparison.arms:
        for figure in FIGURES:
            chosen = selections[figure][arm.name].chosen
            if chosen is None:
                continue
            if arm.learning_rates is not None:
                grid = own.get(arm.name, list(arm.learning_rates))
                own[arm.name] = _beyond(grid, arm.learning_rates, chosen.lr)
            else:
                rates = _beyond(rates, comparison.learning_rates, chosen.lr)
            if len(comparison.weight_decays) > 2 and arm.weight_decays is None:
                decays = _beyond(decays, comparison.weight_decays, chosen.weight_decay)
    arms = [
        dataclasses.replace(arm, learning_rates=tuple(own[arm.name])) if arm.name in own else arm
        for arm in comparison.arms
    ]
    return dataclasses.replace(comparison, learning_rates=rates, weight_decays=decays, arms=arms)


def _beyond(grid: list[float], given: Sequence[float], chosen: float) -> list[float]:
    """Return a grid with the next two of 1, 3, 10, 30, ... beyond an edge that was chosen.

    Examples
    --------
    >>> _beyond([0.001, 0.003, 0.01], [0.001, 0.003, 0.01], 0.001)
    [0.0001, 0.0003, 0.001, 0.003, 0.01]
    """
    edge = _edge(chosen, given)
    if edge is None:
        return grid
    place = math.floor(math.log10(chosen))
    series = [float(f"{digit}e{place + i}") for i in range(-2, 3) for digit in (1, 3)]
    smaller, larger = [x for x in series if x < chosen], [x for x in series if x > chosen]
    return sorted({*grid, *(smaller[-2:] if edge == "smallest" else larger[:2])})


def _edge(value: float, grid: Sequence[float]) -> str | None:
    if len(grid) < 2 or value == 0 or min(grid) < value < max(grid):
        return None
    return "smallest" if value == min(grid) else "largest"


def by_arm(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the notes of all figures, each once, with the figures that it holds for.

    Examples
    --------
    >>> by_arm({"final": ["a: it is so."], "best": ["a: it is so."], "area": []})
    ['a: it is so. (final, best)']
    """
    figures: dict[str, list[str]] = {}
    for figure, lines in notes.items():
        for line in lines:
            figures.setdefault(line, []).append(figure)
    return [f"{line} ({', '.join(of)})" for line, of in figures.items()]


def _unlike_starts(runs: Sequence[Run], seeds: Sequence[int]) -> list[str]:
    """Return a warning for each seed with which the arms did not start alike.

    Such arms cannot be compared.
    """
    warnings = []
    for seed in seeds:
        ends = [run.end for run in runs if run.seed == seed and "initial_weights" in run.end]
        unlike = []
        if len({end["initial_weights"] for end in ends}) > 1:
            unlike.append("initial weights")
        # A run that diverged at once has seen fewer batches than the others.
        if any(len(set(digests)) > 1 for digests in zip(*_padded([end["first_batches"] for end in ends]))):
            unlike.append("batches")
        if unlike:
            parts = " and ".join(unlike)
            warnings.append(
                f"seed {seed}: the arms did not get the same {parts}; trial(seed) must depend on seed alone."
            )
    return warnings


def _padded(lists: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the lists at the length of the longest, with its end in place of theirs."""
    longest = max(lists, key=len, default=[])
    return [[*short, *longest[len(short) :]] for short in lists]
