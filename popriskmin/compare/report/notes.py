"""What a reader must know before believing the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from popriskmin.compare.report.run_summary import FIGURES, Run, runs_of, why_none
from popriskmin.compare.report.statistics import FEWEST_SEEDS
from popriskmin.compare.text import exact
from popriskmin.compare.training.arms import Arm


def warnings_of(
    runs: Sequence[Run],
    arms: Sequence[Arm],
    selections: Mapping[str, Any],
    seeds: Sequence[int],
    metrics: Mapping[str, str],
) -> list[str]:
    """Return what to know beside the edges of the grid: few seeds, runs that did not end, arms that started unlike."""
    found = []
    if len(seeds) < FEWEST_SEEDS:
        given = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        found.append(f"With {given} no verdict is given, only values; use --seeds {FEWEST_SEEDS} or more.")
    for arm in arms:
        mine = runs_of(runs, arm)
        # Averaged weights share the runs, and what became of them, with the plain ones.
        for status in () if arm.averaged else ("diverged", "failed"):
            count = sum(run.end["status"] == status for run in mine)
            if count:
                found.append(f"{arm.name}: {count} of {len(mine)} runs {status}.")
        if selections["final"][arm.name]["chosen"] is None:
            found.append(f"{arm.name}: {why_none(mine, 'final', next(iter(metrics)))}.")
    return found + _unlike_starts(runs, seeds)


def edges(
    arms: Sequence[Arm], selections: Mapping[str, Any], learning_rates: Sequence[float], weight_decays: Sequence[float]
) -> dict[str, list[str]]:
    """Return, for each figure, a note for every arm whose chosen configuration lies at an edge of the grid."""
    found: dict[str, list[str]] = {}
    for figure in FIGURES:
        found[figure] = []
        for arm in arms:
            chosen = selections[figure][arm.name]["chosen"] or {}
            for name, flag, grid in (
                (
                    "lr",
                    "--lr" if arm.learning_rates is None else f"--arm-lr {arm.name}",
                    arm.learning_rates or learning_rates,
                ),
                # Of two decays each is an edge; and there is no decay below 0.
                ("weight_decay", "--weight-decay", weight_decays if len(weight_decays) > 2 else []),
            ):
                edge = _edge(chosen[name], grid) if chosen and grid else None
                if edge:
                    value, word = exact(chosen[name]), {"lr": "learning rate", "weight_decay": "weight decay"}[name]
                    found[figure].append(
                        f"{arm.name}: the {word} {value} is the {edge} of the grid; extend it ({flag})."
                    )
    return found


def extended(
    arms: Sequence[Arm], selections: Mapping[str, Any], learning_rates: Sequence[float], weight_decays: Sequence[float]
) -> tuple[list[float], list[float], dict[str, list[float]]]:
    """Return the learning rates, decays and arms' own rates, with two more values beyond each edge that was chosen."""
    rates, decays = list(learning_rates), list(weight_decays)
    own: dict[str, list[float]] = {}
    for arm in arms:
        for figure in FIGURES:
            chosen = selections[figure][arm.name]["chosen"]
            if chosen is None:
                continue
            if arm.learning_rates is not None:
                grid = own.get(arm.name, list(arm.learning_rates))
                own[arm.name] = _beyond(grid, arm.learning_rates, chosen["lr"])
            else:
                rates = _beyond(rates, learning_rates, chosen["lr"])
            if len(weight_decays) > 2 and arm.weight_decays is None:
                decays = _beyond(decays, weight_decays, chosen["weight_decay"])
    return rates, decays, own


def _beyond(grid: list[float], given: Sequence[float], chosen: float) -> list[float]:
    """Return a grid with the next two of 1, 3, 10, 30, ... where the choice is an edge of the given one.

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
    """Return the notes of all figures, each once, with the figures that it is true of.

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
    """Return a warning for each seed with which the arms did not start alike, which makes them incomparable."""
    found = []
    for seed in seeds:
        ends = [run.end for run in runs if run.job.configuration.seed == seed and "initial_weights" in run.end]
        unlike = []
        if len({end["initial_weights"] for end in ends}) > 1:
            unlike.append("initial weights")
        # A run that diverged at once has seen fewer batches than the others.
        if any(len(set(digests)) > 1 for digests in zip(*_padded([end["first_batches"] for end in ends]))):
            unlike.append("batches")
        if unlike:
            what = " and ".join(unlike)
            found.append(f"seed {seed}: the arms did not get the same {what}; trial(seed) must depend on seed alone.")
    return found


def _padded(lists: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the lists at the length of the longest, which lends the others what they lack."""
    longest = max(lists, key=len, default=[])
    return [[*found, *longest[len(found) :]] for found in lists]
