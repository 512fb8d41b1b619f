"""Runs made up for tests of the report, and the comparison that they belong to."""

from popriskmin.compare import Task
from popriskmin.compare.comparison import Comparison
from popriskmin.compare.report.run_summary import read_run
from popriskmin.compare.training.arms import make_arms
from popriskmin.compare.training.runner import Job
from popriskmin.compare.training.train import Configuration

ARMS = make_arms()
METRICS = {"accuracy": "max", "loss": "min"}


class MadeUp(Task):
    """A task that nobody trains on."""

    def __init__(self, metrics, goals):
        self.metrics, self.goals = metrics, goals

    def trial(self, seed):
        raise AssertionError


def plan(arms=ARMS, metrics=METRICS, goals=(), rates=(0.1,), decays=(0.1,), seeds=range(5), **others):
    """Return a comparison of these arms."""
    return Comparison(
        task=MadeUp(metrics, dict(goals)), arms=arms, learning_rates=rates, weight_decays=decays, seeds=seeds, **others
    )


def made_up(arm, seed, lr, validation, test, status="finished", decay=0.1, metrics=METRICS, **end):
    """Return a run with these accuracies at steps 0, 10, 20, ...; the loss is one less it."""
    records = []
    for i, (v, t) in enumerate(zip(validation, test)):
        pair = [{"accuracy": x, "loss": None if x is None else 1 - x} for x in (v, t)]
        records.append({"kind": "evaluation", "step": 10 * i, "validation": pair[0], "test": pair[1]})
    start = {"initial_weights": f"w{seed}", "first_batches": [f"a{seed}", f"b{seed}"]}
    records.append({"kind": "end", "status": status, **start, **end})
    return read_run(Job(arm, Configuration(lr, decay, seed)), records, metrics)
