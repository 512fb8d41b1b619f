"""The sparse task: its data are what it says, its references are right, and the mask does there what it is for."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tasks.every import check_task

from popriskmin.compare.training.arms import ADAMW, make_arms
from popriskmin.compare.training.train import Configuration, run
from popriskmin.tasks.sparse import Sparse

SMALL = {"inputs": 40, "informative": 4, "examples": 60, "steps": 12, "batch_size": 8}


@given(
    st.integers(1, 30),
    st.integers(1, 50),
    st.integers(1, 40),
    st.booleans(),
    st.floats(0, 3),
    st.integers(0, 2**32 - 1),
)
def test_the_target_is_a_sum_over_what_matters_plus_noise(informative, examples, batch_size, fresh, noise, seed):
    task = Sparse(
        inputs=30, informative=informative, examples=examples, batch_size=batch_size, fresh=fresh, noise=noise, steps=3
    )
    data = task.prepare(seed)
    sizes = data.coefficients[data.coefficients != 0].abs()
    assert len(sizes) == informative
    assert ((sizes >= 0.5) & (sizes <= 1.5)).all()
    x, y = data.test
    assert torch.allclose(x @ data.coefficients, y, atol=1e-5)
    batches = list(data.training)
    assert len(batches) == 3
    size = batch_size if fresh else min(batch_size, examples)
    assert all(x.shape == (size, 30) and y.shape == (size,) for x, y in batches)
    again = list(data.training)
    assert all(torch.equal(a, b) for one, other in zip(batches, again) for a, b in zip(one, other))


@pytest.mark.parametrize("fresh", [False, True])
def test_the_noise_is_as_large_as_asked_for(fresh):
    data = Sparse(noise=0.7, fresh=fresh, steps=50, batch_size=64, examples=3200).prepare(0)
    x, y = data.training.all()
    assert (y - x @ data.coefficients).std().item() == pytest.approx(0.7, rel=0.05)
    x, y = data.validation
    assert (y - x @ data.coefficients).std().item() == pytest.approx(0.7, rel=0.1)


def test_reused_examples_come_again_and_fresh_ones_do_not():
    def seen(fresh):
        task = Sparse(**{**SMALL, "steps": 60}, fresh=fresh)
        return {row.numpy().tobytes() for x, _ in task.prepare(0).training for row in x}

    assert len(seen(False)) == 60
    assert len(seen(True)) == 60 * 8


def test_fresh_examples_are_not_the_held_out_ones():
    data = Sparse(**SMALL, fresh=True).prepare(5)
    held_out = {row.numpy().tobytes() for x, _ in (data.validation, data.test) for row in x}
    assert not held_out & {row.numpy().tobytes() for row in data.training.all()[0]}


@pytest.mark.parametrize("options", [{}, {"model": "network"}, {"fresh": True}])
def test_its_smallest_size_runs(options):
    check_task(Sparse(scale="test", **options))


@pytest.mark.parametrize("model", ["linear", "network"])
def test_a_seed_gives_the_same_trial_and_another_seed_another(model):
    def parts(seed):
        torch.manual_seed(seed)
        trial = Sparse(**SMALL, model=model).trial(seed)
        return [*trial.model.parameters(), *next(iter(trial.batches))], trial.test(trial.model)

    (first, metrics), (again, same), (other, different) = parts(3), parts(3), parts(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert metrics == same != different
    if model == "network":
        assert not any(torch.equal(a, b) for a, b in zip(first, other))


def test_the_metric_is_the_distance_to_the_function_without_noise():
    task = Sparse(**SMALL)
    trial, data = task.trial(0), task.prepare(0)
    with torch.no_grad():
        variance = trial.test(trial.model)["excess risk"]  # of a model that says 0
        assert variance == pytest.approx(data.coefficients.square().sum().item(), rel=0.15)
        trial.model[0].weight.copy_(data.coefficients)
    assert trial.test(trial.model)["excess risk"] == pytest.approx(0, abs=1e-9)
    # The validation targets have noise, whose variance is taken off.
    assert trial.validation(trial.model)["excess risk"] == pytest.approx(0, abs=0.3)


def test_references():
    """Ridge and the Lasso against their normal equations and optimality, and whoever knows what matters is best."""
    task = Sparse(inputs=60, informative=3, examples=80)
    found = {name: metrics["excess risk"] for name, metrics in task.references(0).items()}
    assert found["least squares on what matters"] < found["Lasso"] < found["ridge"]
    data = task.prepare(0)
    x, y = (part.double().numpy() for part in data.training.all())
    matter = data.coefficients.numpy() != 0
    known = np.linalg.solve(x[:, matter].T @ x[:, matter], x[:, matter].T @ y)
    answer = data.test[0].double().numpy()[:, matter] @ known
    expected = np.square(answer - data.test[1].double().numpy()).mean()
    assert found["least squares on what matters"] == pytest.approx(expected)
    assert found["ridge"] < data.coefficients.square().sum()
    assert task.references(0) == task.references(0)


def test_selection_wins_where_few_inputs_matter():
    """At a learning rate where AdamW learns the noise of 196 inputs, the soft mask keeps to the four that matter."""
    task = Sparse(inputs=200, informative=4, examples=150, steps=300)
    (_, _, _, soft) = make_arms([{"mask": "soft"}])
    best = {}
    for name, arm in (("adamw", ADAMW), ("soft", soft)):
        records = run(task, arm, Configuration(lr=0.03, weight_decay=0.0, seed=0))
        assert records[-1]["status"] == "finished"
        evaluations = [record for record in records if record["kind"] == "evaluation"]
        stopped = min(evaluations, key=lambda record: record["validation"]["excess risk"])
        best[name] = stopped["test"]["excess risk"]
    assert best["soft"] < 0.5 * best["adamw"]


@pytest.mark.parametrize(
    "options", [{"inputs": 0}, {"informative": 0}, {"examples": 0}, {"steps": 0}, {"batch_size": 0}, {"noise": -1.0}]
)
def test_bad_numbers(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
        Sparse(**options)


def test_bad_combinations():
    with pytest.raises(ValueError, match="informative must be at most inputs, got 10 of 5"):
        Sparse(inputs=5)
    with pytest.raises(ValueError, match="model must be linear or network, got 'mlp'"):
        Sparse(model="mlp")
