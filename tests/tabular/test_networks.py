"""Networks that are trained side by side are those that PRM trains alone."""

import numpy as np
import pytest
import torch
from torch import nn

from popriskmin import PRM
from popriskmin.tabular.networks import (
    WEIGHT_DECAY,
    Data,
    Part,
    Setting,
    Stack,
    answers,
    batches,
    gradients,
    initial,
    train,
)


def problem(rows=60, columns=7, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    y = (x[:, :classes] + 0.1 * torch.randn(rows, classes, generator=generator)).argmax(1)
    return Data(x, y, torch.ones(rows), classes)


@pytest.mark.parametrize("classes", [2, 3, 0])
def test_gradients_are_autograd_s(classes):
    data = problem(classes=max(classes, 1))
    generator = torch.Generator().manual_seed(3)
    data = data._replace(weight=torch.rand(60, generator=generator))
    if not classes:
        data = data._replace(y=torch.randn(60, generator=generator))
    weights = [torch.randn(w.shape, generator=generator) for w in initial(data, 2, 3, 4, generator)]
    rows = torch.randint(0, 60, (3, 8), generator=generator)
    leaves = [w.clone().requires_grad_() for w in weights]
    (data.losses(answers(leaves, data.x[rows]), rows) * data.weight[rows]).mean(2).sum().backward()
    found = [torch.zeros_like(w) for w in weights]
    gradients(weights, data, rows, out=found)
    for leaf, gradient in zip(leaves, found):
        assert torch.allclose(leaf.grad, gradient, atol=1e-6)


PARTS = [Part(np.arange(0, 40), np.arange(40, 60)), Part(np.arange(20, 60), np.arange(0, 15))]
SETTINGS = [Setting(0.01, 0.0), Setting(0.03, 2.0)]


def test_each_network_is_the_one_that_prm_trains_alone():
    data = problem()
    weights = initial(data, len(SETTINGS), len(PARTS), 5, torch.Generator().manual_seed(1))
    stack = Stack(SETTINGS, [w.clone() for w in weights], 8, 40)
    rows = [b for b, _ in zip(batches(PARTS, 8, torch.Generator().manual_seed(2)), range(12))]
    for number, batch in enumerate(rows):
        if number == 6:  # the state goes along
            stack = stack.only([1])
        stack.step(data, batch)
    for s in range(len(PARTS)):
        model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
        with torch.no_grad():
            for parameter, w in zip((model[0].weight, model[0].bias, model[2].weight, model[2].bias), weights):
                parameter.copy_(w[1, s])
        groups = [
            {"params": [model[0].weight], "shrinkage": 2.0},
            {"params": [model[0].bias, *model[2].parameters()]},
        ]
        optimizer = PRM(groups, lr=0.03, weight_decay=WEIGHT_DECAY, batch_size=8, n_dataset=40)
        for batch in rows:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.x[batch[s]]), data.y[batch[s]]).backward()
            optimizer.step()
        found = answers([w[:1] for w in stack.weights], data.x[None].expand(2, -1, -1))[0, s]
        assert torch.allclose(found, model(data.x), atol=1e-4)
        assert torch.equal(stack.weights[0][0, s] == 0, model[0].weight == 0)


def test_batches_are_passes_over_the_rows_of_each_part():
    drawn = [b for b, _ in zip(batches(PARTS, 8, torch.Generator().manual_seed(0)), range(5))]
    for s, part in enumerate(PARTS):
        assert sorted(torch.cat([batch[s] for batch in drawn]).tolist()) == part.training.tolist()


def test_a_network_starts_as_a_constant():
    data = problem()
    weights = initial(data, 2, 1, 4, torch.Generator().manual_seed(0))
    shares = torch.bincount(data.y) / len(data.y)
    assert torch.allclose(answers(weights, data.x[None]).softmax(3), shares.expand(2, 1, 60, 3), atol=1e-4)


def test_weights_are_those_of_the_best_evaluation():
    data = problem()
    trained = train(data, SETTINGS, PARTS, 6, 8, 80, torch.Generator().manual_seed(0))
    for c, setting in enumerate(trained.settings):
        for s, part in enumerate(PARTS):
            found = answers([w[c : c + 1, s : s + 1] for w in trained.weights], data.x[None, part.held_out])
            loss = nn.functional.cross_entropy(found[0, 0], data.y[part.held_out]).item()
            assert abs(loss - trained.curves[setting][:, s].min().item()) < 1e-5
    assert trained.loss(trained.best()) == min(trained.loss(setting) for setting in trained.settings)


def test_each_shrinkage_goes_on_with_its_best_rate():
    settings = [Setting(lr, z) for lr in (1e-5, 0.03) for z in (0.0, 1.0)]
    trained = train(problem(), settings, PARTS, 6, 8, 80, torch.Generator().manual_seed(0))
    assert trained.settings == [Setting(0.03, 0.0), Setting(0.03, 1.0)]
    assert set(trained.curves) == set(settings)
    assert len(trained.curves[settings[0]]) < len(trained.curves[settings[2]])
