"""What studies on several tasks of `popriskmin compare` share: their runs and their command line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from popriskmin.compare import Task
from popriskmin.compare.loading import load_task_class, make_task
from popriskmin.compare.report.run_summary import Run, read_run
from popriskmin.compare.training.fingerprint import source_digest
from popriskmin.compare.training.progress import Display
from popriskmin.compare.training.runner import Job, make_runs
from popriskmin.compare.training.store import Store


def task_named(name: str, options: Mapping[str, Any]) -> Task:
    """Return a task by the name that `popriskmin compare` knows, with its options."""
    return make_task(load_task_class(name), dict(options))


@dataclasses.dataclass(frozen=True)
class TaskRuns:
    """All runs of a study on one task, kept as `popriskmin compare` keeps them.

    Attributes
    ----------
    name
        The task's name in the study, which also names its folder.
    """

    name: str
    task: Task
    jobs: Sequence[Job]

    def store(self, folder: Path) -> Store:
        """Return where the runs are."""
        return Store(folder / self.name.replace(", ", "-").replace(" ", "-") / "runs")

    def make(self, folder: Path, at_a_time: int) -> None:
        """Make the runs that are missing."""
        print(f"{self.name}: {len(self.jobs)} runs", flush=True)
        store, source = self.store(folder), source_digest(self.task)
        with Display(Console(stderr=True)) as display:
            make_runs(self.task, self.jobs, store, at_a_time, "loky", display, source, keep_going=False)

    def read(self, folder: Path) -> list[Run] | None:
        """Return the runs; None where one is missing."""
        store, source, runs = self.store(folder), source_digest(self.task), []
        for job in self.jobs:
            records = store.read(job.settings(self.task, source))
            if records is None:
                return None
            runs.append(read_run(job, records, self.task.metrics))
        return runs


def present(several: Iterable[TaskRuns], folder: Path) -> Iterable[tuple[str, list[Run]]]:
    """Yield name and runs of each task whose runs are all there, and say which tasks are left out."""
    for one in several:
        runs = one.read(folder)
        if runs is None:
            print(f"{one.name}: runs are missing, so it is left out")
        else:
            yield one.name, runs


def make_parser(description: str, tasks: Sequence[str], name: str) -> argparse.ArgumentParser:
    """Return the command line of a study whose runs are in `runs/NAME` and results in `docs/results/NAME`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=list(tasks), metavar="TASK")
    parser.add_argument("--runs", type=Path, default=Path("runs", name), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("docs/results", name), help="folder of the results")
    return parser
