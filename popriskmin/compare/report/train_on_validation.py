"""What validation data is worth: to train on it too and to the end, or to keep it and stop by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from popriskmin.compare.report.run_summary import Run, chosen_runs, runs_of
from popriskmin.compare.report.statistics import difference, estimate
from popriskmin.compare.training.arms import ADAMW, Arm
from popriskmin.compare.training.runner import Job
from popriskmin.compare.training.train import Configuration, Variant

JOINED = Variant(joined=True)
STOPPED = "stopped"  # the arm's own early stop, as what its joined runs are held against; the other is AdamW


def jobs_of_joined(arms: Sequence[Arm], selections: Mapping[str, Any], seeds: Sequence[int]) -> list[Job]:
    """Return the runs on joined data: each arm's at the configuration with its best final value on validation data.

    Before those of an arm that follows another come the other's at the same configuration, whose factors it takes.
    """
    by_name = {arm.name: arm for arm in arms}
    jobs: list[Job] = []
    for arm in arms:
        chosen = selections["final"][arm.name]["chosen"]
        if chosen is None or arm.averaged:
            continue
        for seed in seeds:
            configuration = Configuration(chosen["lr"], chosen["weight_decay"], seed)
            leader = [] if arm.follows is None else [Job(by_name[arm.follows], configuration, JOINED)]
            jobs += [*leader, Job(arm, configuration, JOINED)]
    return list(dict.fromkeys(jobs))


def by_joined(
    joined: Sequence[Run],
    runs: Sequence[Run],
    arms: Sequence[Arm],
    selections: Mapping[str, Any],
    metrics: Mapping[str, str],
) -> dict[str, Any]:
    """Return for each arm what it reached on joined data after the last step, and what stopping early had given.

    Returns
    -------
    dict
        `table[arm] = {"chosen", "test", "stopped", "against"}`: `test[metric]` and `stopped[metric]` with mean,
        interval and values by seed; `against["stopped"]` and `against["adamw"]` the differences, paired by seed, to
        the arm's own early stop and to AdamW on joined data. An arm of which a run diverged or failed has none.
    """
    found: dict[str, Any] = {}
    values: dict[str, Values] = {}
    for arm in (arm for arm in arms if not arm.averaged):
        name = arm.name
        mine, stopped = _finals(arm, joined, selections, metrics), _stopped(runs, name, selections, metrics)
        if mine is None or stopped is None:
            continue
        values[name] = mine
        against = {STOPPED: {metric: difference(mine[metric], stopped[metric]) for metric in metrics}}
        if ADAMW.name in found:  # AdamW is the first of the arms
            other = values[ADAMW.name]
            against[ADAMW.name] = {metric: difference(mine[metric], other[metric]) for metric in metrics}
        found[name] = {
            "chosen": selections["final"][name]["chosen"],
            "test": {metric: estimate(list(mine[metric].values())) for metric in metrics},
            "stopped": {metric: estimate(list(stopped[metric].values())) for metric in metrics},
            "against": against,
        }
    return found


def renamed(run: Run) -> Run:
    """Return a run on joined data under a name of its own, to stand beside the others."""
    arm = dataclasses.replace(run.job.arm, name=f"{run.job.arm.name} joined")
    return dataclasses.replace(run, job=dataclasses.replace(run.job, arm=arm))


Values = dict[str, dict[int, float]]


def _finals(
    arm: Arm, joined: Sequence[Run], selections: Mapping[str, Any], metrics: Mapping[str, str]
) -> Values | None:
    """Return the final test values by metric and seed; None where a run lacks one."""
    mine = chosen_runs(runs_of(joined, arm), arm.name, selections["final"][arm.name]["chosen"])
    return _values(mine, "final", metrics)


def _stopped(runs: Sequence[Run], arm: str, selections: Mapping[str, Any], metrics: Mapping[str, str]) -> Values | None:
    return _values(chosen_runs(runs, arm, selections["best"][arm]["chosen"]), "best", metrics)


def _values(mine: Sequence[Run], figure: str, metrics: Mapping[str, str]) -> Values | None:
    values: Values = {metric: {} for metric in metrics}
    for run in mine:
        for metric in metrics:
            pair = run.figures[figure][metric]
            if pair is None:
                return None
            values[metric][run.job.configuration.seed] = pair[1]
    return values if mine else None
