"""What every task must hold; each task's own tests call it with its smallest size."""

import pytest
import torch

from popriskmin.compare.training.arms import make_arms
from popriskmin.compare.training.fingerprint import content_digest
from popriskmin.compare.training.train import Configuration, run


def check_task(task, lr=1e-3):
    """Run the task's smallest size with AdamW and PRM; return the test metrics before and after, of AdamW."""
    trials = []
    for _ in range(2):
        torch.manual_seed(3)
        trials.append(task.trial(3))
    first, second = ([list(t.model.parameters()), list(t.batches)[:3]] for t in trials)
    assert content_digest(first) == content_digest(second)
    torch.manual_seed(4)
    other = task.trial(4)
    assert content_digest(list(other.batches)[:3]) != content_digest(first[1])
    ends = {}
    for arm in make_arms([], match_all=False)[:2]:
        records = run(task, arm, Configuration(lr=lr, weight_decay=0.01, seed=0))
        assert records[-1]["status"] == "finished", records[-1].get("error")
        evaluations = [r for r in records if r["kind"] == "evaluation"]
        assert set(evaluations[0]["test"]) == set(evaluations[0]["validation"]) == set(task.metrics)
        ends[arm.name] = evaluations
    assert ends["adamw"][0] == ends["prm"][0]
    assert ends["adamw"][-1] != ends["prm"][-1]
    return ends["adamw"][0]["test"], ends["adamw"][-1]["test"]


def check_joined(task):
    """Hold the trial on joined data against the ordinary one: model and test data are the same, training has more."""
    torch.manual_seed(3)
    trial = task.trial(3)
    torch.manual_seed(3)
    joined = task.joined(3)
    weights, others = (list(one.model.parameters()) for one in (trial, joined))
    assert content_digest(weights) == content_digest(others)
    with torch.no_grad():
        assert joined.test(joined.model) == trial.test(trial.model)
    assert joined.n_dataset > trial.n_dataset
    more = joined.n_dataset / trial.n_dataset
    assert len(list(joined.batches)) / len(list(trial.batches)) == pytest.approx(more, rel=0.25)
    seen = {int(row) for rows in joined.batches for row in rows}
    assert max(seen) < joined.n_dataset
    assert len(seen) > trial.n_dataset
