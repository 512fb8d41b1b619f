"""The variance that the risk monitor keeps for Adam."""

import io

import pytest
import torch

from popriskmin.mask import variance_of_mean
from popriskmin.risk.adam_variance import HORIZON, Variances
from popriskmin.risk.terms import hyperparameters

SHAPES = [(3, 4), (5,), ()]


def fed(steps, every=1, build=torch.optim.AdamW, noise=1.0, **options):
    torch.manual_seed(0)
    params = [torch.ones(shape, requires_grad=True) for shape in SHAPES]
    optimizer = build(params, **options)
    variances = Variances()
    gradients = []
    for step in range(1, steps + 1):
        gradients.append([noise * torch.randn(shape) for shape in SHAPES])
        for param, g in zip(params, gradients[-1]):
            param.grad = g
        optimizer.step()
        if step % every == 0:
            variances.update(params, optimizer, hyperparameters(optimizer, optimizer.param_groups[0]), step)
    return optimizer, params, variances, gradients


@pytest.mark.parametrize("every", [1, 3])
def test_against_a_weighted_mean_of_squared_deviations(every):
    _, params, variances, gradients = fed(14, every)
    for i, param in enumerate(params):
        m, total, weights = torch.zeros(SHAPES[i], dtype=torch.float64), 0.0, 0.0
        for t, gradient in enumerate(gradients, 1):
            g = gradient[i].double()
            if t >= 2 and t % every == 0:
                squared = (g - m / (1 - 0.9 ** (t - 1))) ** 2 / (1 + variance_of_mean(0.9, t - 1))
                weight = (1 - 1 / HORIZON) ** (14 - t)
                total, weights = total + weight * squared, weights + weight
            m = 0.9 * m + 0.1 * g
        torch.testing.assert_close(variances.tensors[param], (total / weights).float(), rtol=1e-4, atol=1e-6)


def test_it_is_unbiased():
    torch.manual_seed(0)
    w = torch.zeros(2000, requires_grad=True)
    optimizer, variances = torch.optim.Adam([w], lr=1e-4), Variances()
    for step in range(1, 60):
        w.grad = 3 * torch.randn(2000) + 0.5
        optimizer.step()
        variances.update([w], optimizer, hyperparameters(optimizer, optimizer.param_groups[0]), step)
        if step in (2, 59):
            assert variances.tensors[w].mean().item() == pytest.approx(9, rel=0.1)


def test_a_parameter_without_a_gradient_is_left_alone():
    optimizer, params, variances, _ = fed(5)
    before = variances.tensors[params[0]].clone()
    params[0].grad = None
    variances.update(params, optimizer, hyperparameters(optimizer, optimizer.param_groups[0]), 6)
    assert torch.equal(variances.tensors[params[0]], before)


def test_half_precision_is_kept_in_float32():
    w = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer, variances = torch.optim.AdamW([w]), Variances()
    for step in range(1, 4):
        w.grad = torch.randn(4).bfloat16()
        optimizer.step()
        variances.update([w], optimizer, hyperparameters(optimizer, optimizer.param_groups[0]), step)
    assert variances.tensors[w].dtype == torch.float32


def test_its_state_is_loaded_by_place_and_checked_first():
    optimizer, params, variances, _ = fed(5)
    file = io.BytesIO()
    torch.save(variances.state(optimizer), file)
    file.seek(0)
    other = Variances()
    other.load(torch.load(file, weights_only=True), optimizer)
    assert all(torch.equal(other.tensors[param], variances.tensors[param]) for param in params)
    assert all(other.tensors[param] is not variances.tensors[param] for param in params)
    small = torch.optim.AdamW([torch.ones(2, requires_grad=True)])
    with pytest.raises(ValueError, match=r"parameter 0 has a variance of shape \(3, 4\), expected \(2,\)"):
        other.load(variances.state(optimizer), small)
    assert all(param in other.tensors for param in params)
