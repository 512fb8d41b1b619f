"""State in 8 bits beside state in float32: the loss after training, and how open the mask is.

    python experiments/eight_bits.py run --runs runs/eight-bits      # resumes after a kill
    python experiments/eight_bits.py report --runs runs/eight-bits --out docs/results/eight-bits

Both train from the same weights on the same batches, with one learning rate and five
seeds. The table has 500 useless columns and PRM's shrinkage.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from popriskmin.compare import Task
from popriskmin.compare.loading import load_task_class, make_task
from popriskmin.compare.report.run_summary import read_run
from popriskmin.compare.training.arms import Arm
from popriskmin.compare.training.fingerprint import source_digest
from popriskmin.compare.training.progress import Display
from popriskmin.compare.training.runner import Job, make_jobs, make_runs
from popriskmin.compare.training.store import Store, write_whole

SEEDS = range(5)
DECAY = 0.01
STATES: dict[str, Any] = {"float32": torch.float32, "8bit": "8bit"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A task with its options, the learning rate, and options of PRM."""

    task: str
    rate: float
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prm: Mapping[str, Any] = dataclasses.field(default_factory=dict)


SOURCES = {
    "digits": Source("digits", 3e-3),
    "table, 500 probes": Source(
        "table", 3e-3, {"data": "breast_cancer", "probes": 500}, {"mask": "soft", "shrinkage": 1.0}
    ),
    "dpo": Source("dpo", 1e-3),
    "text": Source("text", 1e-2),
}


def task_of(name: str) -> Task:
    """Return a task of the study."""
    source = SOURCES[name]
    return make_task(load_task_class(source.task), dict(source.options))


def jobs_of(name: str) -> list[Job]:
    """Return all runs of a task, of both kinds of state for each seed."""
    source = SOURCES[name]
    arms = [Arm(name, "prm", {**source.prm, "state_dtype": value}) for name, value in STATES.items()]
    return make_jobs(arms, [source.rate], [DECAY], SEEDS)


def store_of(folder: Path, name: str) -> Store:
    """Return where a task's runs are."""
    return Store(folder / name.replace(", ", "-").replace(" ", "-") / "runs")


def run(names: Sequence[str], folder: Path) -> None:
    """Make the runs that are missing."""
    for name in names:
        task = task_of(name)
        print(f"{name}:", flush=True)
        with Display(Console(stderr=True)) as display:
            make_runs(task, jobs_of(name), store_of(folder, name), 1, "loky", display, source_digest(task), False)


def read(name: str, folder: Path) -> dict[str, dict[str, list[float]]] | None:
    """Return by state the test metrics after training, the mean q over all steps, and bytes; None for missing runs."""
    task, store = task_of(name), store_of(folder, name)
    source = source_digest(task)
    found: dict[str, dict[str, list[float]]] = {state: {} for state in STATES}
    for job in jobs_of(name):
        records = store.read(job.settings(task, source))
        if records is None:
            return None
        mine, run = found[job.arm.name], read_run(job, records, task.metrics)
        for metric in task.metrics:
            mine.setdefault(metric, []).append(float(run.test[metric][-1]))
        factors = [record["factor"] for record in records if record["kind"] == "step"]
        mine.setdefault("mean q", []).append(statistics.fmean(factors))
    return found


def row(name: str, found: Mapping[str, Mapping[str, Sequence[float]]], metric: str) -> dict[str, object]:
    """Return the means of a metric, their difference with its standard error over the seeds, and the ratio."""
    one, other = (found[state][metric] for state in STATES)
    apart = [b - a for a, b in zip(one, other)]
    return {
        "task": name,
        "": metric,
        "float32": f"{statistics.fmean(one):.4f} ± {statistics.stdev(one) / len(one) ** 0.5:.4f}",
        "8bit": f"{statistics.fmean(other):.4f} ± {statistics.stdev(other) / len(other) ** 0.5:.4f}",
        "8bit less float32": f"{statistics.fmean(apart):.4f} ± {statistics.stdev(apart) / len(apart) ** 0.5:.4f}",
        "8bit / float32": f"{statistics.fmean(other) / statistics.fmean(one):.4f}",
    }


def report(folder: Path, out: Path) -> None:
    """Write `results.json` and `results.csv` of the tasks whose runs are all there."""
    found = {name: read(name, folder) for name in SOURCES}
    rows = []
    for name, values in found.items():
        if values is None:
            print(f"{name}: runs are missing, so it is left out")
        else:
            rows += [row(name, values, metric) for metric in values["8bit"]]
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: dataclasses.asdict(SOURCES[name]) for name, values in found.items() if values is not None}
    results = {"settings": settings, "values": {name: v for name, v in found.items() if v is not None}}
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["task"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for line in rows:
        print(" | ".join(map(str, line.values())))


def main() -> None:
    """Make runs, or report on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--runs", type=Path, default=Path("runs/eight-bits"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/results/eight-bits"), help="folder of the results")
    parser.add_argument("--tasks", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    args = parser.parse_args()
    if args.what == "run":
        run(args.tasks, args.runs)
    else:
        report(args.runs, args.out)


if __name__ == "__main__":
    main()
