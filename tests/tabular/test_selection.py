"""Permuted columns: the rise of the loss is scikit-learn's, and columns that say nothing are left out as promised."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.inspection import permutation_importance
from torch.nn import functional

from popriskmin.tabular import selection
from popriskmin.tabular.networks import Data, Part
from popriskmin.tabular.selection import FALSE_DISCOVERIES, evidence

OUTPUTS = 3


def networks(count, columns, hidden=8, outputs=OUTPUTS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, hidden, columns), (count, hidden), (count, outputs, hidden), (count, outputs)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def rows(count, columns, classes=OUTPUTS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator)
    y = torch.randint(0, classes, (count,), generator=generator) if classes else torch.randn(count, generator=generator)
    return Data(x, y, torch.ones(count), max(classes, 1))


class Network:
    """One network with scikit-learn's methods, a table's column being several of its own."""

    def __init__(self, weights, sources, x):
        self.weights, self.sources, self.x = weights, sources, x

    def fit(self, x, y):
        """Nothing is learnt."""

    def loss(self, numbers, y):
        """Return minus the loss of rows, each column of the table given by numbers of rows."""
        w, b, v, c = (one[0] for one in self.weights)
        x = torch.stack([self.x[numbers[:, s].astype(int), i] for i, s in enumerate(self.sources)], 1)
        answers = functional.linear(functional.linear(x, w, b).relu(), v, c)
        if y.dtype.kind == "f":
            return -np.square(answers[:, 0].numpy() - y).mean()
        return -functional.cross_entropy(answers, torch.as_tensor(y)).item()


@pytest.mark.parametrize("classes", [OUTPUTS, 0])
def test_the_rise_is_that_of_scikit_learn_s_permutation_importance(classes, monkeypatch):
    monkeypatch.setattr(selection, "DRAWS", 400)
    data, sources = rows(60, 5, classes), np.array([0, 1, 1, 1, 3])  # three columns are one category; 2 is unused
    weights = networks(1, 5, outputs=max(classes, 1))
    held_out = np.arange(20, 60)
    part = Part(np.arange(20), held_out)
    found = evidence(weights, [part], data, sources, 4, torch.Generator().manual_seed(0))
    numbers = np.repeat(held_out[:, None], 4, 1).astype(float)
    network = Network(weights, sources, data.x)
    expected = permutation_importance(
        network, numbers, data.y[held_out].numpy(), scoring=lambda model, x, y: model.loss(x, y), n_repeats=400
    )
    error = expected.importances_std / np.sqrt(200)
    assert (np.abs(found.rise - expected.importances_mean) < 4 * error + 1e-6).all()
    assert found.rise[2] == 0
    assert found.p_value[2] == 1


def test_each_row_counts_by_the_networks_that_did_not_see_it(monkeypatch):
    """The test is Student's, over rows; parts differ in length, one row is held out twice, and rows have weights."""
    monkeypatch.setattr(selection, "_permuted", lambda parts, numbers, generator: numbers.roll(1, 1))
    monkeypatch.setattr(selection, "_some", lambda parts, generator: parts)
    data = rows(9, 1)
    data = data._replace(weight=torch.linspace(0.5, 1.5, 9))
    weights = networks(2, 1)
    parts = [Part(np.arange(4, 9), np.arange(0, 4)), Part(np.arange(0, 3), np.arange(3, 7))]
    found = evidence(weights, parts, data, np.zeros(1, dtype=int), 1, torch.Generator())
    rises = np.full((2, 9), np.nan)
    for s, part in enumerate(parts):
        w, b, v, c = (one[s] for one in weights)
        loss = [
            functional.cross_entropy((x @ w.T + b).relu() @ v.T + c, data.y[part.held_out], reduction="none")
            for x in (data.x[np.roll(part.held_out, 1)], data.x[part.held_out])
        ]
        rises[s, part.held_out] = ((loss[0] - loss[1]) * data.weight[part.held_out]).numpy()
    each = np.nanmean(rises[:, :7], 0)
    assert found.rise[0] == pytest.approx(each.mean(), rel=1e-4)
    assert found.p_value[0] == pytest.approx(stats.ttest_1samp(each, 0, alternative="greater").pvalue, rel=1e-3)


def test_p_values_of_columns_that_say_nothing():
    """Networks that use every column, on a target that depends on none: small p-values are as rare as promised."""
    data = rows(200, 200)
    halves = np.split(np.arange(200), 2)
    parts = [Part(*halves), Part(*halves[::-1])]
    alone = []
    for column in range(200):
        one = data._replace(x=data.x[:, column : column + 1])
        found = evidence(
            networks(2, 1, seed=column), parts, one, np.zeros(1, int), 1, torch.Generator().manual_seed(column)
        )
        alone.append(found.p_value[0])
    assert stats.binomtest(int((np.array(alone) < 0.05).sum()), 200, 0.05, alternative="greater").pvalue > 0.01
    together = evidence(networks(2, 200), parts, data, np.arange(200), 200, torch.Generator().manual_seed(0))
    assert not together.selected.any()
    assert np.array_equal(together.selected, together.p_value <= FALSE_DISCOVERIES)


@pytest.mark.parametrize("case", ["rows that were trained on", "one row", "no weights", "no columns"])
def test_where_nothing_can_be_tested(case):
    data, weights = rows(10, 2), networks(1, 2)
    part = Part(np.arange(5), np.arange(5, 10))
    if case == "rows that were trained on":
        part = Part(np.arange(6), np.arange(5, 10))
    elif case == "one row":
        part = Part(np.arange(9), np.arange(9, 10))
    elif case == "no weights":
        weights[0].zero_()
    else:
        data, weights = rows(10, 0), networks(1, 0)
    found = evidence(weights, [part], data, np.arange(data.x.shape[1]), 2, torch.Generator())
    assert (found.rise == 0).all()
    assert (found.p_value == 1).all()
    assert not found.selected.any()
