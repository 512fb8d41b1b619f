"""Shrinkage as an option of the optimizer: exact zeros, untouched weights, checkpoints, and the Lasso."""

import io
import math

import numpy as np
import pytest
import torch
from conftest import HOW
from sklearn.linear_model import Lasso

from popriskmin import PRM

COUNTS = {"batch_size": 8, "n_dataset": 200}


def noise(optimizer, params, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mask", ["snr", "none", "threshold"])
def test_weights_reach_zero_exactly_and_biases_are_left_alone(how, mask):
    weight, bias = (torch.nn.Parameter(torch.full(shape, 0.01)) for shape in [(6, 7), (7,)])
    optimizer = PRM([weight, bias], lr=1e-2, mask=mask, shrinkage=6.0, **COUNTS, **how)
    noise(optimizer, [weight, bias], 100)
    assert (weight == 0).float().mean() > 0.8
    assert (bias != 0).all()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_an_untouched_weight_is_the_first_one_bit_for_bit(how, dtype):
    p = torch.nn.Parameter(torch.randn(9, 5, dtype=dtype))
    start = p.detach().clone()
    optimizer = PRM([p], lr=1e-3, mask="none", weight_decay=0.0, shrinkage=8.0, shrink_to="start", **COUNTS, **how)
    noise(optimizer, [p], 60)
    assert optimizer.state[p]["start"].dtype == dtype
    assert torch.equal(optimizer.state[p]["start"], start)
    assert (p == start).float().mean() > 0.8


@pytest.mark.parametrize("how", HOW)
def test_scaling_gradients_by_a_power_of_two_leaves_the_pull_alone(how):
    ends = []
    for factor in (1.0, 2.0**-20):
        p = torch.nn.Parameter(torch.full((4, 6), 0.1))
        optimizer = PRM([p], lr=1e-2, eps=0.0, mask_eps=0.0, shrinkage=1.3, **COUNTS, **how)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            p.grad = factor * torch.randn(4, 6, generator=generator)
            optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("how", HOW)
def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(how):
    def made():
        p = torch.nn.Parameter(torch.linspace(-1, 1, 20).reshape(4, 5))
        return p, PRM([p], lr=1e-2, shrinkage=2.0, shrink_to="start", **COUNTS, **how)

    p, optimizer = made()
    noise(optimizer, [p], 10)
    file = io.BytesIO()
    torch.save({"p": p.detach(), "state": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    q, other = made()
    with torch.no_grad():
        q.copy_(saved["p"])
    other.load_state_dict(saved["state"])
    for one, its in ((p, optimizer), (q, other)):
        noise(its, [one], 10, seed=1)
    assert torch.equal(p, q)


def test_a_checkpoint_without_first_weights_takes_the_present_ones_and_says_so():
    p = torch.nn.Parameter(torch.ones(3, 2))
    adam = torch.optim.AdamW([p], lr=1e-3)
    noise(adam, [p], 2)
    optimizer = PRM([p], lr=1e-3, shrinkage=1.0, shrink_to="start", **COUNTS)
    with pytest.warns(UserWarning, match="does not hold the weights that training started from"):
        optimizer.load_state_dict(adam.state_dict())
    assert torch.equal(optimizer.state[p]["start"], p)


def test_given_variances_allow_batches_of_the_whole_data_set():
    p = torch.nn.Parameter(torch.full((2, 3), 1e-4))
    optimizer = PRM([p], lr=1e-3, shrinkage=2.0, variance="given", batch_size=8, n_dataset=8)
    for _ in range(3):
        p.grad = torch.full((2, 3), 0.1)
        optimizer.set_variances({p: torch.ones(2, 3)})
        optimizer.step()
    assert (p == 0).all()


def test_a_linear_model_ends_where_the_lasso_with_these_loadings_ends():
    rng = np.random.default_rng(0)
    n, d, b, z = 200, 12, 20, 2.0
    x = rng.normal(size=(n, d))
    y = x @ np.r_[2.0, -1.0, 0.5, np.zeros(d - 3)] + rng.normal(size=n)
    inputs, targets = torch.tensor(x), torch.tensor(y)[:, None]
    w = torch.nn.Parameter(torch.zeros(1, d, dtype=torch.float64))
    optimizer = PRM([w], lr=5e-2, mask="none", weight_decay=0.0, betas=(0.9, 0.9999), rho=0.999, shrinkage=z,
                    batch_size=b, n_dataset=n)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    epochs = 600
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 5e-2 * 0.985**epoch
        for rows in torch.randperm(n, generator=generator).split(b):
            optimizer.zero_grad()
            (0.5 * (inputs[rows] @ w.T - targets[rows]).square().mean()).backward()
            optimizer.step()
    s = (optimizer.state[w]["exp_avg_var"] / (1 - 0.999 ** (epochs * n / b))).numpy()[0]
    loadings = z * np.sqrt(b / (n - b) * s)
    # Columns divided by their loadings turn different penalties into one.
    lasso = Lasso(alpha=1.0, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x / loadings, y)
    expected = lasso.coef_ / loadings
    assert 0 < (expected == 0).sum() < d
    np.testing.assert_allclose(w.detach().numpy()[0], expected, atol=1e-2)
    assert math.isclose(float((w == 0).sum()), float((expected == 0).sum()))
