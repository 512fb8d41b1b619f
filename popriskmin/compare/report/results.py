"""The answer of a comparison: as plain data, as pandas frames, and in the terminal."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from popriskmin.compare.comparison import Comparison
from popriskmin.compare.report.analysis import (
    BudgetRow,
    RateRow,
    Selection,
    Selections,
    best_rival,
    by_budget,
    by_learning_rate,
    untuned,
)
from popriskmin.compare.report.goals import Goal, by_goal, goal_lines
from popriskmin.compare.report.headline import headline, verdicts
from popriskmin.compare.report.notes import by_arm, edges, warnings_of
from popriskmin.compare.report.run_summary import (
    FIGURES,
    MEANING,
    NO_REFERENCES,
    Choice,
    References,
    Run,
    chosen_runs,
    why_none,
)
from popriskmin.compare.report.statements import Statement, statements
from popriskmin.compare.report.statistics import LEVEL
from popriskmin.compare.report.train_on_validation import STOPPED, JoinedRow, by_joined, renamed
from popriskmin.compare.text import exact
from popriskmin.compare.training.store import plain, write_whole
from popriskmin.compare.training.train import Record
from popriskmin.version import __version__

if TYPE_CHECKING:
    import pandas as pd

NOTHING = "There is nothing to compare: no arm has a configuration that every seed brought to its end."


class Cost(TypedDict):
    """Medians over an arm's runs, in seconds and bytes."""

    seconds_per_step: float
    optimizer_seconds_per_step: float
    state_bytes: float
    parameters: float


class Style(TypedDict):
    """Options of rich for lines that are no markup."""

    highlight: bool
    markup: bool
    soft_wrap: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results(Comparison):
    """A comparison with all its runs and what follows from them.

    Attributes
    ----------
    task, arms, learning_rates, weight_decays, seeds, average, spend_validation
        What was compared.
    folder
        The folder of `results.json`, `report.html` and the runs.
    source
        The digest of the task's source.
    runs
        One `Run` for each arm, configuration and seed, and those on joined data, of arms
        whose names end in " joined".
    selections
        `selections[figure][arm]`, for `figure` the one that chose on validation data
        ("final", "best" or "area"). It has `chosen`, the configuration; `test`, for each
        figure and metric the mean, interval and values by seed; and `against`, differences
        to other arms, paired by seed.
    by_budget
        `by_budget[arm]`: for k = 1, 2, ... configurations drawn at random from the grid, the
        expected final test metric of the one that is best on validation data.
    by_goal
        `by_goal[metric]`: when each arm first reached the task's goal, where it has one.
    statements
        The statements on every PRM arm and each of its rivals, with p-values that are
        corrected for all of them.
    edges
        `edges[figure]`: notes on arms that chose at an edge of the grid.
    warnings
        What else to know before believing the tables.
    references
        The values that the task gives beside the arms, as `references.test[name][metric]`.
    by_joined
        `by_joined[arm]`: what each arm reached on training and validation data together;
        empty without `spend_validation`.
    """

    runs: Sequence[Run]
    selections: Selections
    by_budget: Mapping[str, Sequence[BudgetRow]]
    by_goal: Mapping[str, Goal]
    statements: Sequence[Statement]
    edges: Mapping[str, Sequence[str]]
    warnings: Sequence[str]
    references: References = NO_REFERENCES
    by_joined: Mapping[str, JoinedRow] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_runs(
        cls,
        comparison: Comparison,
        runs: Sequence[Run],
        selections: Mapping[str, Mapping[str, Selection]],
        references: References = NO_REFERENCES,
        joined: Sequence[Run] = (),
    ) -> Results:
        """Draw the conclusions from the runs, the arms' choices, and runs on joined data."""
        budget = by_budget(comparison, runs)
        on_joined = by_joined(comparison, joined, runs, selections) if joined else {}
        best_untuned = best_rival(comparison.arms, untuned(comparison, runs))
        # Untrained networks tell nothing.
        said = statements(comparison, selections, budget, best_untuned, on_joined) if _any_trained(runs) else []
        return cls(
            **{field.name: getattr(comparison, field.name) for field in dataclasses.fields(comparison)},
            runs=[*runs, *map(renamed, joined)],
            selections=selections,
            by_budget=budget,
            by_goal=by_goal(comparison, runs),
            statements=said,
            edges=edges(comparison, selections),
            warnings=[*warnings_of(comparison, runs, selections), *references.warnings],
            references=references,
            by_joined=on_joined,
        )

    def __repr__(self) -> str:
        """Return what was compared, and the folder."""
        arms = ", ".join(arm.name for arm in self.arms)
        return f"<Results of {self.task.name}: {arms}; {len(self.runs)} runs, {len(self.seeds)} seeds; {self.folder}>"

    def _repr_html_(self) -> str:
        """Return the answer for a notebook."""
        answer = self.answer[["verdict", "sentence"]].to_html(index=False)
        return f"<p>{html.escape(repr(self))}</p><p><b>{html.escape(self.headline)}</b></p>{answer}"

    @property
    def has_an_answer(self) -> bool:
        """Whether any arm has a configuration to choose, and not only untrained networks."""
        chosen = any(one.chosen is not None for by_arm in self.selections.values() for one in by_arm.values())
        return chosen and _any_trained(self.runs)

    @property
    def headline(self) -> str:
        """The answer in one sentence: the best on the page, and what PRM does."""
        return headline(self, self.selections, self.references.test, self.statements)

    @property
    def verdicts(self) -> dict[str, str]:
        """The three statements that matter most, by what PRM is compared with."""
        return verdicts(self.statements)

    @property
    def answer(self) -> pd.DataFrame:
        """One row per `Statement`, with its attributes, its verdict and its sentence."""
        import pandas as pd  # here, as each worker imports this module and few callers ask for frames

        columns = [*(field.name for field in dataclasses.fields(Statement)), "verdict", "sentence"]
        return pd.DataFrame(self._statements(), columns=columns)

    def _statements(self) -> list[dict[str, object]]:
        return [
            {**dataclasses.asdict(one), "verdict": one.verdict, "sentence": one.sentence} for one in self.statements
        ]

    @property
    def frame(self) -> pd.DataFrame:
        """One row per run: arm, configuration, status, and every figure of every metric."""
        import pandas as pd

        rows = []
        for run in self.runs:
            row: dict[str, object] = {"arm": run.job.arm.name, **dataclasses.asdict(run.job.configuration)}
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
        """One row per run and evaluation: arm, configuration, step, and every metric."""
        import pandas as pd

        frames = []
        for run in self.runs:
            columns: dict[str, object] = {"arm": run.job.arm.name, **dataclasses.asdict(run.job.configuration)}
            columns["step"] = run.steps
            for metric in self.task.metrics:
                columns[f"validation {metric}"] = run.validation[metric]
                columns[f"test {metric}"] = run.test[metric]
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)

    def chosen(self, arm: str, figure: str = "final") -> list[Run]:
        """Return the runs of an arm with the configuration it chose by a figure."""
        return chosen_runs(self.runs, arm, self.selections[figure][arm].chosen)

    def to_dict(self) -> Record:
        """Return settings and conclusions as JSON holds them; equal runs give equal ones."""
        data = {
            "task": self.task.name,
            "task_options": plain(self.task.options, setting=True),
            "task_source": self.source,
            "metrics": dict(self.task.metrics),
            "optimizer_options": dict(self.task.optimizer_options),
            "arms": list(self.arms),
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
        return {name: plain(value) for name, value in data.items()}

    def write(self) -> Path:
        """Write `results.json` into the folder and return its path."""
        path = self.folder / "results.json"
        write_whole(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return path

    def by_learning_rate(self) -> dict[str, list[RateRow]]:
        """Return, for each arm, the final test metric at each of its learning rates."""
        return by_learning_rate(self, self.runs)

    def state_bytes(self, arm: str) -> int | None:
        """Return the bytes of an arm's optimizer state."""
        ends = [run.end for run in self.runs if run.job.arm.name == arm]
        # A run that diverged before its first step has no state.
        return max((end["state_bytes"] for end in ends if "state_bytes" in end), default=None)

    def cost(self, arm: str) -> Cost | None:
        """Return an arm's times and state; None where no run of it took a step."""
        ends = [run.end for run in self.runs if run.job.arm.name == arm and "seconds_per_step" in run.end]
        if not ends:
            return None

        def median(key: str) -> float:
            return float(np.median([end[key] for end in ends]))

        return Cost(
            seconds_per_step=median("seconds_per_step"),
            optimizer_seconds_per_step=median("optimizer_seconds_per_step"),
            state_bytes=median("state_bytes"),
            parameters=median("parameters"),
        )

    def why_none(self, arm: str, figure: str) -> str:
        """Say why an arm chose no configuration by a figure."""
        return why_none([run for run in self.runs if run.job.arm.name == arm], figure, self.metric)

    def answers(self) -> dict[str, list[str]]:
        """Return the statements in words, by the situation that they are about."""
        by_opening: dict[str, list[str]] = {}
        for one in self.statements:
            by_opening.setdefault(one.opening, []).append(one.sentence)
        return by_opening

    @property
    def correction(self) -> str:
        """What the p-values of the statements mean; empty where there are none."""
        if not any(one.p is not None for one in self.statements):
            return ""
        return (
            f"p is corrected for all {len(self.statements)} statements (Holm): where nothing differs, at most one "
            f"comparison in twenty makes a false claim. A difference is called clear where p is below {LEVEL:g}. "
            "Brackets hold the 95% interval of each difference by itself."
        )

    def goal_lines(self) -> list[str]:
        """Return in words when each arm reached the goals of the task."""
        return goal_lines(self, self.by_goal)

    def print(self, console: Console | None = None) -> None:
        """Print the tables, the answer and the notes."""
        # Where no terminal limits the width, names of arms need not be broken.
        console = console or (Console() if Console().is_terminal else Console(width=120))
        _print_tables(self, console)
        _print_answer(self, console)


def _any_trained(runs: Sequence[Run]) -> bool:
    return any(run.finished or run.best_step for run in runs)


def _style(console: Console) -> Style:
    """Return a style that breaks lines between words on a terminal, and nowhere elsewhere."""
    return {"highlight": False, "markup": False, "soft_wrap": not console.is_terminal}


def _print_tables(results: Results, console: Console) -> None:
    direction = "higher" if results.direction == "max" else "lower"
    title = f"\n{results.task.name}: test {results.metric}, {direction} is better"
    console.print(title, style="bold", highlight=False, markup=False)
    for line in results.task.about:
        console.print(line, **_style(console))
    if not results.has_an_answer:
        console.print(NOTHING, **_style(console))
        return
    console.print("Each arm's configuration is the best on validation data by the same figure.\n", highlight=False)
    for figure in FIGURES:
        console.print(_table(results, figure))
    if results.by_joined:
        console.print(_joined_table(results))


def _print_answer(results: Results, console: Console) -> None:
    style = _style(console)
    if results.headline:
        console.print(results.headline, style="bold", **style)
    verdict_lines = [f"{label}: {sentence}" for label, sentence in results.verdicts.items()]
    for line in (*verdict_lines, *results.goal_lines()):
        # Padding also indents the lines on which a sentence goes on, but would break it
        # where no line should be broken.
        console.print(Padding(Text(line), (0, 0, 0, 2)) if console.is_terminal else f"  {line}", **style)
    if results.statements:
        console.print(f"All {len(results.statements)} statements, and what p means, are on the page.", **style)
    # Notes on edges belong to choices that the tables show.
    for line in (*results.warnings, *(by_arm(results.edges) if results.has_an_answer else ())):
        console.print(f"Note: {line}", style="yellow", **style)


def _empty_table(title: str, columns: Sequence[str]) -> Table:
    """Return a table with columns for the arm, its configuration, and these."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left", title_style="")
    table.title = title
    table.add_column("arm", overflow="fold")
    for column in ("lr", "decay"):
        table.add_column(column, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _place(chosen: Choice) -> tuple[str, str]:
    return exact(chosen.lr), exact(chosen.weight_decay)


def _table(results: Results, figure: str) -> Table:
    columns = (f"{figure} [95% interval]", "difference to adamw")
    table = _empty_table(f"{figure}: {MEANING[figure]}", columns)
    for arm in results.arms:
        selection = results.selections[figure][arm.name]
        if selection.chosen is None or selection.test is None:
            table.add_row(Text(arm.name), "-", "-", "-", "")
            continue
        apart = selection.against.get("adamw", {}).get(figure, {}).get(results.metric)
        value = selection.test[figure][results.metric].text()
        table.add_row(Text(arm.name), *_place(selection.chosen), value, apart.text(signed=True) if apart else "")
    for name, metrics in results.references.test.items():
        value = metrics[results.metric].text() if results.metric in metrics else "-"
        table.add_row(Text(name), "-", "-", value, "")
    return table


def _joined_table(results: Results) -> Table:
    columns = ("joined [95% interval]", "stopped [95% interval]", "joined less stopped")
    table = _empty_table("joined: trained on training and validation data, after the last step", columns)
    for name, row in results.by_joined.items():
        values = (by_metric[results.metric].text() for by_metric in (row.test, row.stopped))
        apart = row.against[STOPPED][results.metric].text(signed=True)
        table.add_row(Text(name), *_place(row.chosen), *values, apart)
    return table
