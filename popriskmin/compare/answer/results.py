"""What a comparison found: as plain data, as pandas frames, and as a table in the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from popriskmin.compare.answer.analysis import (
    FIGURES,
    Run,
    analyse,
    chosen_runs,
    interval,
    over_grid,
    warnings_of,
    why_none,
)
from popriskmin.compare.runs.arms import Arm
from popriskmin.compare.runs.store import plain, write_whole
from popriskmin.compare.task import Task
from popriskmin.compare.text import exact
from popriskmin.version import __version__

MEANING = {
    "final": "after the last step",
    "best": "at the step with the best validation metric",
    "area": "mean over the training",
}
OPENINGS = {
    "final": "Trained to the end",
    "best": "Stopped at the best validation step",
    "area": "Averaged over the training",
}


@dataclasses.dataclass(frozen=True)
class Results:
    """All runs of a comparison and what follows from them.

    Attributes
    ----------
    task, arms, learning_rates, weight_decays, seeds
        What was compared.
    runs
        One `Run` for each arm, configuration and seed.
    selections
        `selections[figure][arm]`: what each arm reached with the configuration whose `figure` ("final", "best" or
        "area") was best on validation data: "chosen", "test" (for each figure and metric mean, interval and values by
        seed), and "against" (differences to other arms, paired by seed, with a sentence).
    over_grid
        `over_grid[arm]`: the final metric without tuning, as its mean over all configurations of the grid; "test" and
        "against" as in `selections`, "test" None where a run diverged.
    warnings
        What to know before believing the table.
    folder
        Where `results.json`, `report.html` and the runs are.
    source
        The digest of the task's source.
    """

    task: Task
    arms: Sequence[Arm]
    learning_rates: Sequence[float]
    weight_decays: Sequence[float]
    seeds: Sequence[int]
    runs: Sequence[Run]
    selections: Mapping[str, Any]
    over_grid: Mapping[str, Any]
    warnings: Sequence[str]
    folder: Path
    source: str

    @classmethod
    def of_runs(
        cls,
        task: Task,
        arms: Sequence[Arm],
        learning_rates: Sequence[float],
        weight_decays: Sequence[float],
        seeds: Sequence[int],
        runs: Sequence[Run],
        folder: Path,
        source: str,
    ) -> Results:
        """Draw the conclusions from the runs."""
        selections = analyse(runs, arms, task.metrics)
        found = warnings_of(runs, arms, selections, learning_rates, seeds, task.metrics)
        untuned = over_grid(runs, arms, task.metrics)
        return cls(task, arms, learning_rates, weight_decays, seeds, runs, selections, untuned, found, folder, source)

    @property
    def metric(self) -> str:
        """The metric on which configurations are chosen."""
        return next(iter(self.task.metrics))

    @property
    def frame(self) -> pd.DataFrame:
        """One row per run: arm, configuration, status, and every figure of every metric on validation and test data."""
        rows = []
        for run in self.runs:
            row: dict[str, Any] = {"arm": run.job.arm.name, **dataclasses.asdict(run.job.configuration)}
            row |= {"status": run.end["status"], "steps": run.end.get("steps"), "best_step": run.best_step}
            for figure in FIGURES:
                for metric in self.task.metrics:
                    pair = run.figures[figure][metric] or (np.nan, np.nan)
                    row[f"validation {figure} {metric}"], row[f"test {figure} {metric}"] = pair
            row |= {key: run.end.get(key) for key in ("seconds_per_step", "optimizer_seconds_per_step", "state_bytes")}
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def curves(self) -> pd.DataFrame:
        """One row per run and evaluation: arm, configuration, step, and every metric on validation and test data."""
        frames = []
        for run in self.runs:
            columns: dict[str, Any] = {"arm": run.job.arm.name, **dataclasses.asdict(run.job.configuration)}
            columns["step"] = run.steps
            for metric in self.task.metrics:
                columns[f"validation {metric}"] = run.validation[metric]
                columns[f"test {metric}"] = run.test[metric]
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)

    def chosen(self, arm: str, figure: str = "final") -> list[Run]:
        """Return the runs of an arm with the configuration it chose by a figure."""
        return chosen_runs(self.runs, arm, self.selections[figure][arm]["chosen"])

    def to_dict(self) -> dict[str, Any]:
        """Return settings and conclusions as JSON holds them; the same runs always give the same."""
        data: dict[str, Any] = plain(
            {
                "task": self.task.name,
                "task_options": plain(self.task.options, setting=True),
                "task_source": self.source,
                "metrics": dict(self.task.metrics),
                "optimizer_options": dict(self.task.optimizer_options),
                "arms": [dataclasses.asdict(arm) for arm in self.arms],
                "learning_rates": list(self.learning_rates),
                "weight_decays": list(self.weight_decays),
                "seeds": list(self.seeds),
                "popriskmin": __version__,
                "torch": str(torch.__version__),
                "selections": self.selections,
                "over_grid": self.over_grid,
                "warnings": list(self.warnings),
                "by_learning_rate": self.by_learning_rate(),
                "state_bytes": {arm.name: self.state_bytes(arm.name) for arm in self.arms},
            }
        )
        return data

    def write(self) -> Path:
        """Write `results.json` into the folder and return its path."""
        path = self.folder / "results.json"
        write_whole(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return path

    def by_learning_rate(self) -> dict[str, list[dict[str, Any]]]:
        """Return, for each arm and learning rate, the final test metric with the best weight decay by validation.

        A learning rate at which some run diverged has no mean.
        """
        sign = 1 if self.task.metrics[self.metric] == "max" else -1
        table: dict[str, list[dict[str, Any]]] = {}
        for arm in self.arms:
            table[arm.name] = []
            for lr in self.learning_rates:
                best: dict[str, Any] = {"lr": lr, "weight_decay": None, "mean": None, "interval": None}
                top = -np.inf
                for decay in self.weight_decays:
                    pairs = [
                        run.figures["final"][self.metric]
                        for run in chosen_runs(self.runs, arm.name, {"lr": lr, "weight_decay": decay})
                    ]
                    usable = [pair for pair in pairs if pair is not None]
                    if len(usable) < len(pairs) or not usable:
                        continue
                    score = sign * float(np.mean([validation for validation, _ in usable]))
                    if score > top:
                        top, test = score, [value for _, value in usable]
                        best |= {"weight_decay": decay, "mean": float(np.mean(test)), "interval": interval(test)}
                table[arm.name].append(best)
        return table

    def state_bytes(self, arm: str) -> int | None:
        """Return the bytes of an arm's optimizer state."""
        mine = [run.end for run in self.runs if run.job.arm.name == arm]
        # A run that diverged before its first step has no state.
        return max((end["state_bytes"] for end in mine if "state_bytes" in end), default=None)

    def cost(self, arm: str) -> dict[str, float] | None:
        """Return the medians over an arm's runs of seconds per step, whole and the optimizer's part, and its state."""
        ends = [run.end for run in self.runs if run.job.arm.name == arm and "seconds_per_step" in run.end]
        if not ends:
            return None
        keys = ("seconds_per_step", "optimizer_seconds_per_step", "state_bytes", "parameters")
        return {key: float(np.median([end[key] for end in ends])) for key in keys}

    def why_none(self, arm: str, figure: str) -> str:
        """Say why an arm chose no configuration by a figure."""
        return why_none([run for run in self.runs if run.job.arm.name == arm], figure, self.metric)

    def answers(self) -> dict[str, list[str]]:
        """Return the answer in sentences, by what they are about."""
        prm = [arm.name for arm in self.arms if arm.kind == "prm"]
        found: dict[str, list[str]] = {}
        for figure, opening in OPENINGS.items():
            rivals = [rival for arm in prm for rival in self.selections[figure][arm]["against"].values()]
            found[opening] = [
                rival[figure][self.metric]["sentence"] for rival in rivals if self.metric in rival[figure]
            ]
        found["Trained to the end without tuning, mean over the grid"] = [
            rival["sentence"] for arm in prm for rival in self.over_grid[arm]["against"].values()
        ]
        return {opening: sentences for opening, sentences in found.items() if sentences}

    def print(self, console: Console | None = None) -> None:
        """Print the tables, the answer and the warnings."""
        # Where no terminal limits the width, names of arms need not be broken.
        console = console or (Console() if Console().is_terminal else Console(width=120))
        direction = "higher" if self.task.metrics[self.metric] == "max" else "lower"
        title = f"\n{self.task.name}: test {self.metric}, {direction} is better"
        console.print(title, style="bold", highlight=False, markup=False)
        # A terminal's lines are broken between words; elsewhere a sentence stays on one line.
        style: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": not console.is_terminal}
        console.print("Each arm's configuration is the best on validation data by the same figure.\n", highlight=False)
        for figure in FIGURES:
            console.print(self._table(figure))
        for opening, sentences in self.answers().items():
            console.print(f"{opening}:", **style)
            for sentence in sentences:
                # Padding indents the lines that a sentence goes on to, too, but would break it where none should be.
                line = Padding(Text(sentence), (0, 0, 0, 2)) if console.is_terminal else f"  {sentence}"
                console.print(line, **style)
        for line in self.warnings:
            console.print(f"Note: {line}", style="yellow", **style)

    def _table(self, figure: str) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left", title_style="")
        table.title = f"{figure}: {MEANING[figure]}"
        table.add_column("arm", overflow="fold")
        for column in ("lr", "decay"):
            table.add_column(column, no_wrap=True)
        for column in (f"{figure} [95% interval]", "less adamw's"):
            table.add_column(column, justify="right", no_wrap=True)
        for arm in self.arms:
            summary = self.selections[figure][arm.name]
            if summary["chosen"] is None:
                table.add_row(Text(arm.name), "-", "-", "-", "")
                continue
            chosen = (exact(summary["chosen"]["lr"]), exact(summary["chosen"]["weight_decay"]))
            found = summary["against"].get("adamw", {}).get(figure, {}).get(self.metric)
            against = format_estimate(found, signed=True) if found else ""
            table.add_row(Text(arm.name), *chosen, format_estimate(summary["test"][figure][self.metric]), against)
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
