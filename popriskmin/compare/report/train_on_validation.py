"""Whether to train on the validation data too, or to keep it and stop by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from popriskmin.compare.comparison import Comparison
from popriskmin.compare.report.analysis import Selections
from popriskmin.compare.report.run_summary import BySeed, Choice, Run, chosen_runs
from popriskmin.compare.report.statistics import Difference, Estimate, difference, estimate
from popriskmin.compare.training.arms import ADAMW
from popriskmin.compare.training.runner import Job
from popriskmin.compare.training.train import Configuration, Variant

JOINED = Variant(joined=True)
STOPPED = "stopped"  # the arm's own early stop, in `JoinedRow.against`


@dataclasses.dataclass(frozen=True)
class JoinedRow:
    """What an arm reached on joined data after the last step, and by stopping early.

    Attributes
    ----------
    chosen
        The configuration of the runs on joined data.
    test, stopped
        By metric, on joined data and with an early stop.
    against
        `against["stopped"][metric]`, the difference to the arm's own early stop, and
        `against["adamw"][metric]`, to AdamW on joined data; both paired by seed.
    """

    chosen: Choice
    test: Mapping[str, Estimate]
    stopped: Mapping[str, Estimate]
    against: Mapping[str, Mapping[str, Difference]]


def jobs_of_joined(comparison: Comparison, selections: Selections) -> list[Job]:
    """Return the runs on joined data, each arm's at the choice of its final value.

    The run that a matched arm follows, at the same configuration, comes before it.
    """
    by_name = {arm.name: arm for arm in comparison.arms}
    jobs: list[Job] = []
    for arm in comparison.trained:
        chosen = selections["final"][arm.name].chosen
        if chosen is None:
            continue
        for seed in comparison.seeds:
            configuration = Configuration(chosen.lr, chosen.weight_decay, seed)
            leader = [] if arm.follows is None else [Job(by_name[arm.follows], configuration, JOINED)]
            jobs += [*leader, Job(arm, configuration, JOINED)]
    return list(dict.fromkeys(jobs))


def by_joined(
    comparison: Comparison, joined: Sequence[Run], runs: Sequence[Run], selections: Selections
) -> dict[str, JoinedRow]:
    """Return the results of each arm; one of which a run diverged or failed has none."""
    metrics = comparison.task.metrics
    table: dict[str, JoinedRow] = {}
    values: dict[str, BySeed] = {}
    for name in (arm.name for arm in comparison.trained):
        final, best = selections["final"][name].chosen, selections["best"][name].chosen
        here = _values(chosen_runs(joined, name, final), "final", metrics)
        stopped = _values(chosen_runs(runs, name, best), "best", metrics)
        if final is None or here is None or stopped is None:
            continue
        values[name] = here
        against = {STOPPED: {metric: difference(here[metric], stopped[metric]) for metric in metrics}}
        if ADAMW.name in table:  # AdamW is the first of the arms
            other = values[ADAMW.name]
            against[ADAMW.name] = {metric: difference(here[metric], other[metric]) for metric in metrics}
        table[name] = JoinedRow(
            chosen=final,
            test={metric: estimate(list(here[metric].values())) for metric in metrics},
            stopped={metric: estimate(list(stopped[metric].values())) for metric in metrics},
            against=against,
        )
    return table


def renamed(run: Run) -> Run:
    """Return a run on joined data under a name of its own, to stand beside the others."""
    arm = dataclasses.replace(run.job.arm, name=f"{run.job.arm.name} joined")
    return dataclasses.replace(run, job=dataclasses.replace(run.job, arm=arm))


def _values(runs: Sequence[Run], figure: str, metrics: Mapping[str, str]) -> BySeed | None:
    """Return a figure's test values by metric and seed; None where a run lacks one."""
    values: BySeed = {metric: {} for metric in metrics}
    for run in runs:
        for metric in metrics:
            pair = run.figures[figure][metric]
            if pair is None:
                return None
            values[metric][run.seed] = pair[1]
    return values if runs else None
