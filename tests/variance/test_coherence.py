"""m-coherence, beside its definition by inner products of pairs of examples' gradients."""

import itertools
import math

import pytest
import torch
from simulated import Rows, mean_loss
from torch import nn

from popriskmin.variance import coherence


def squared(model, x, y):
    return (model(x) - y).square().mean()


def rows_of(model, params, x, y):
    gradients = [torch.autograd.grad(squared(model, a[None], b[None]), params) for a, b in zip(x, y)]
    return torch.stack([torch.cat([g.flatten() for g in gs]) for gs in gradients]).double()


@pytest.mark.parametrize("chunk_size", [2, 16])
def test_the_definition(chunk_size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    x, y = torch.randn(9, 5), torch.randn(9, 2)
    result = coherence(model, squared, x, y, chunk_size=chunk_size)
    assert list(result.by_parameter) == [name for name, _ in model.named_parameters()]
    assert all(p.grad is None for p in model.parameters())
    measured = [(result.overall, list(model.parameters()))]
    measured += [(result.by_parameter[name], [param]) for name, param in model.named_parameters()]
    for got, params in measured:
        rows = rows_of(model, params, x, y)
        pairs = [(rows[i] @ rows[j]).item() for i, j in itertools.product(range(9), repeat=2)]
        different = [(rows[i] @ rows[j]).item() for i, j in itertools.permutations(range(9), 2)]
        own = rows.square().sum(1).mean().item()
        assert got.examples == 9
        assert got.alpha == pytest.approx(sum(pairs) / 81 / own, rel=1e-4)
        assert got.m_coherence == pytest.approx(9 * got.alpha)
        assert got.unbiased == pytest.approx(sum(different) / 72 / own, rel=1e-3, abs=1e-6)


def test_identical_orthogonal_and_opposite_gradients():
    model = Rows(8)
    same = coherence(model, mean_loss, torch.ones(5, 8)).overall
    assert same == pytest.approx((5, 1, 5, 1))
    apart = coherence(model, mean_loss, 3 * torch.eye(8)).overall
    assert apart == pytest.approx((8, 1 / 8, 1, 0))
    against = coherence(model, mean_loss, torch.stack([torch.ones(8), -torch.ones(8)])).overall
    assert against == pytest.approx((2, 0, 0, -1))
    nothing = coherence(model, mean_loss, torch.zeros(3, 8)).overall
    assert math.isnan(nothing.alpha)


def test_the_unbiased_one_does_not_depend_on_the_number_of_examples():
    """Mean 1 and variance 3 in each of 20,000 coordinates: a quarter of what an example has is shared."""
    torch.manual_seed(0)
    model = Rows(20_000)
    for examples in (2, 6, 40):
        got = coherence(model, mean_loss, 1 + math.sqrt(3) * torch.randn(examples, 20_000)).overall
        assert got.unbiased == pytest.approx(0.25, abs=0.015)
        assert got.alpha == pytest.approx(0.25 + 0.75 / examples, abs=0.015)


def test_what_cannot_be_measured_is_refused():
    model = Rows(8)
    with pytest.raises(ValueError, match="at least 2 examples"):
        coherence(model, mean_loss, torch.ones(1, 8))
    with pytest.raises(ValueError, match="chunk_size must be a whole number >= 1, got 0"):
        coherence(model, mean_loss, torch.ones(2, 8), chunk_size=0)
    with pytest.raises(ValueError, match="no parameters that require gradients"):
        coherence(model.requires_grad_(False), mean_loss, torch.ones(2, 8))
    with pytest.raises(ValueError, match="BatchNorm1d that normalizes over the batch"):
        coherence(nn.BatchNorm1d(8), lambda model, x: model(x).mean(), torch.ones(2, 8))
