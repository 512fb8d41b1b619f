"""What a comparison found: as plain data, as pandas frames, and as a table in the terminal."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from popriskmin.compare.report.analysis import Statement, best_rival, number, statements
from popriskmin.compare.report.budget import by_budget, untuned
from popriskmin.compare.report.goals import by_goal
from popriskmin.compare.report.headline import headline, verdicts
from popriskmin.compare.report.notes import edges, warnings_of
from popriskmin.compare.report.references import NONE, References
from popriskmin.compare.report.run_summary import FIGURES, Run, chosen_runs, leading, why_none
from popriskmin.compare.report.statistics import LEVEL, interval
from popriskmin.compare.report.terminal import show
from popriskmin.compare.report.train_on_validation import by_joined, renamed
from popriskmin.compare.task import Task
from popriskmin.compare.text import exact
from popriskmin.compare.training.arms import Arm
from popriskmin.compare.training.store import plain, write_whole
from popriskmin.version import __version__


@dataclasses.dataclass(frozen=True)
class Results:
    """All runs of a comparison and what follows from them.

    Attributes
    ----------
    task, arms, learning_rates, weight_decays, seeds
        What was compared.
    runs
        One `Run` for each arm, configuration and seed; and those on joined data, of arms whose names end in " joined".
    selections
        `selections[figure][arm]`: what each arm reached with the configuration whose `figure` ("final", "best" or
        "area") was best on validation data: "chosen", "test" (for each figure and metric mean, interval and values by
        seed), and "against" (differences to other arms, paired by seed).
    by_budget
        `by_budget[arm]`: for k = 1, 2, ... configurations drawn at random from the grid, the expected final test metric
        of the one that is best on validation data; see `popriskmin.compare.report.budget`.
    by_goal
        `by_goal[metric]`: when each arm first reached the task's goal, where it has one.
    statements
        What is said of every PRM arm and each of its rivals, with p-values that are corrected for all of it.
    edges
        `edges[figure]`: notes on arms that chose at an edge of the grid.
    warnings
        What else to know before believing the tables.
    folder
        Where `results.json`, `report.html` and the runs are.
    source
        The digest of the task's source.
    references
        What the task names beside the optimizers; `references.test[name][metric]` as in `selections`.
    by_joined
        `by_joined[arm]`: what each arm reached on training and validation data joined; empty without
        `spend_validation`.
    """

    task: Task
    arms: Sequence[Arm]
    learning_rates: Sequence[float]
    weight_decays: Sequence[float]
    seeds: Sequence[int]
    runs: Sequence[Run]
    selections: Mapping[str, Any]
    by_budget: Mapping[str, Any]
    by_goal: Mapping[str, Any]
    statements: Sequence[Statement]
    edges: Mapping[str, Sequence[str]]
    warnings: Sequence[str]
    folder: Path
    source: str
    references: References = NONE
    by_joined: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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
        selections: Mapping[str, Any],
        references: References = NONE,
        joined: Sequence[Run] = (),
    ) -> Results:
        """Draw the conclusions from the runs, what the arms chose by them, and the runs on joined data."""
        budget = by_budget(runs, arms, task.metrics)
        spent = by_joined(joined, runs, arms, selections, task.metrics) if joined else {}
        best_untuned = best_rival(arms, untuned(runs, arms, task.metrics))
        # Of untrained networks there is nothing to say.
        trained = _any_trained(runs)
        said = statements(arms, task.metrics, selections, budget, best_untuned, spent) if trained else []
        return cls(
            task=task,
            arms=arms,
            learning_rates=learning_rates,
            weight_decays=weight_decays,
            seeds=seeds,
            runs=[*runs, *map(renamed, joined)],
            selections=selections,
            by_budget=budget,
            by_goal=by_goal(runs, arms, task.metrics, task.goals),
            statements=said,
            edges=edges(arms, selections, learning_rates, weight_decays),
            warnings=[*warnings_of(runs, arms, selections, seeds, task.metrics), *references.warnings],
            folder=folder,
            source=source,
            references=references,
            by_joined=spent,
        )

    def __repr__(self) -> str:
        """Return what was compared, and where it is."""
        arms = ", ".join(arm.name for arm in self.arms)
        return f"<Results of {self.task.name}: {arms}; {len(self.runs)} runs, {len(self.seeds)} seeds; {self.folder}>"

    def _repr_html_(self) -> str:
        """Return the answer for a notebook."""
        answer = self.answer[["verdict", "sentence"]].to_html(index=False)
        return f"<p>{html.escape(repr(self))}</p><p><b>{html.escape(self.headline)}</b></p>{answer}"

    @property
    def has_an_answer(self) -> bool:
        """Whether any arm has a configuration to choose, and not for its untrained network alone."""
        chosen = any(one["chosen"] is not None for found in self.selections.values() for one in found.values())
        return chosen and _any_trained(self.runs)

    @property
    def headline(self) -> str:
        """The answer in one sentence: what is best of all on the page, and what PRM does for the network."""
        return headline(self.task.metrics, self.arms, self.selections, self.references.test, self.statements)

    @property
    def verdicts(self) -> dict[str, str]:
        """The three statements that matter most, by what PRM is compared with."""
        return verdicts(self.statements)

    @property
    def answer(self) -> pd.DataFrame:
        """One row per `Statement`: arm, rival, figure, metric, values, difference, interval, p, verdict, sentence."""
        columns = [*(field.name for field in dataclasses.fields(Statement)), "verdict", "sentence"]
        return pd.DataFrame(self._statements(), columns=columns)

    def _statements(self) -> list[dict[str, Any]]:
        return [
            {**dataclasses.asdict(one), "verdict": one.verdict, "sentence": one.sentence} for one in self.statements
        ]

    @property
    def average(self) -> int:
        """Over about how many steps the weights of the arms that are called averaged are; 0 without."""
        return max((run.job.variant.average for run in self.runs), default=0)

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
                "headline": self.headline,
                "verdicts": self.verdicts,
                "answer": self._statements(),
                "by_budget": self.by_budget,
                "by_goal": self.by_goal,
                "edges": self.edges,
                "references": self.references.test,
                **({"by_joined": self.by_joined} if self.by_joined else {}),
                **({"average": self.average} if self.average else {}),
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
        _, sign = leading(self.task.metrics)
        table: dict[str, list[dict[str, Any]]] = {}
        for arm in self.arms:
            table[arm.name] = []
            for lr in arm.learning_rates or self.learning_rates:
                best: dict[str, Any] = {"lr": lr, "weight_decay": None, "mean": None, "interval": None}
                top = -np.inf
                for decay in arm.weight_decays or self.weight_decays:
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
        found: dict[str, list[str]] = {}
        for one in self.statements:
            found.setdefault(one.opening, []).append(one.sentence)
        return found

    @property
    def correction(self) -> str:
        """What the p-values of the answer mean; empty where there are none."""
        if not any(one.p is not None for one in self.statements):
            return ""
        return (
            f"p is corrected for all {len(self.statements)} statements (Holm): where nothing differs, at most one "
            f"comparison in twenty makes a false claim. A difference is called clear where p is below {LEVEL:g}. "
            "Brackets hold the 95% interval of each difference by itself."
        )

    def goal_lines(self) -> list[str]:
        """Return in words when each arm reached the goals of the task."""
        lines = []
        for metric, found in self.by_goal.items():
            sign = "at least" if self.task.metrics[metric] == "max" else "at most"
            for arm, row in found["arms"].items():
                aim = f"{metric} {sign} {number(found['goal'])}"
                if row["validated"]:
                    lines.append(f"{arm}: test {aim} first {_when(row, row['length'])} ({_place(row['chosen'])})")
                    continue
                late = row["on_test"]
                there = f"on test data {_place(late['chosen'])} did, {_when(late, row['length'])}" if late else ""
                lines.append(
                    f"{arm}: none reached {aim} on validation data by {row['length']:,} steps; "
                    f"{there or 'nor did any on test data'}"
                )
        return lines

    def print(self, console: Console | None = None) -> None:
        """Print the tables, the answer and what to know of them."""
        show(self, console)


def _when(row: Mapping[str, Any], length: int) -> str:
    """Return in words when the runs of a configuration were at a goal."""
    told = ", ".join("never" if step is None else f"{step:,}" for step in row["steps"])
    middle = f"not by {length:,}" if row["median"] is None else f"at {row['median']:,.0f}"
    return f"{middle} steps in the median; by seed {told}"


def _place(chosen: Mapping[str, float]) -> str:
    return f"lr {exact(chosen['lr'])}, decay {exact(chosen['weight_decay'])}"


def _any_trained(runs: Sequence[Run]) -> bool:
    return any(run.finished or run.best_step for run in runs)
