"""The step that takes variances from outside, in every implementation."""

import math

import pytest
import torch
from conftest import IMPLEMENTATIONS

from popriskmin import PRM

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("debias", [False, True])
def test_given_variances_of_any_type_and_layout(implementation, debias):
    torch.manual_seed(0)
    # Exact in every type, and rho * s + (1 - rho) * z as well.
    values = torch.tensor([[0.5, 1.0, 2.0], [4.0, 0.25, 0.0]])
    results = []
    for z in (
        values,
        values.double(),
        values.bfloat16(),
        values.half(),
        values.t().contiguous().t(),
        torch.stack([values, values], -1)[..., 0],
        torch._neg_view(-values),
        values.clone().requires_grad_(),
    ):
        w = torch.nn.Parameter(torch.ones(2, 3))
        optimizer = PRM([w], rho=0.5, variance="given", debias=debias, **implementation)
        for _ in range(2):
            w.grad = torch.ones(2, 3)
            optimizer.set_variances({w: z})
            optimizer.step()
        assert torch.equal(optimizer.state[w]["exp_avg_var"], values * 0.75)
        assert not optimizer.state[w]["exp_avg_var"].requires_grad
        results.append(w.detach())
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bad_variances_pass_into_s_as_the_formula_says(implementation):
    nan, inf = math.nan, math.inf
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = PRM([w], rho=0.5, variance="given", **implementation)
    for z in ([nan, inf, 1.0, 0.0], [1.0, 1.0, 1.0, inf]):
        w.grad = torch.ones(4)
        optimizer.set_variances({w: torch.tensor(z)})
        optimizer.step()
    s = optimizer.state[w]["exp_avg_var"]
    assert s[0].isnan()
    assert s[1:].tolist() == [inf, 0.75, inf]
    assert w.isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_state_of_given_variances_has_the_right_mean(implementation):
    """It is rounded stochastically: to nearest, an average with decay 0.999 would stand still."""
    n, steps = 20_000, 200
    w = torch.nn.Parameter(torch.zeros(n))
    optimizer = PRM([w], lr=0.0, rho=0.999, variance="given", state_dtype=torch.bfloat16, **implementation)
    for _ in range(steps):
        w.grad = torch.ones(n)
        optimizer.set_variances({w: torch.full((n,), 3.0)})
        optimizer.step()
    s_hat = optimizer.state[w]["exp_avg_var"].double().mean() / (1 - 0.999**steps)
    assert s_hat == pytest.approx(3.0, rel=2e-3)
