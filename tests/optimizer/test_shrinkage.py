"""Shrinkage as an option of the optimizer: exact zeros, untouched weights, checkpoints, and the Lasso."""

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import HOW
from sklearn.linear_model import Lasso
from steps import through_a_file

from popriskmin import PRM
from popriskmin.optimizer.options import _warn_of_no_pull

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
    saved = through_a_file({"p": p.detach(), "state": optimizer.state_dict()})
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


# Over this many steps the mean of the data set's batches is its gradient, and `m^` is nearly the mean gradient.
SLOW = {"betas": (0.99, 0.999), "rho": 0.999, "weight_decay": 0.0, "boundary": "empirical"}
MASKS = ["none", "snr", "soft", "hard", "threshold"]


@pytest.mark.parametrize("mask", MASKS)
def test_a_network_ends_where_mean_gradients_are_within_the_loadings_or_equal_to_them(mask):
    """The conditions of Karush, Kuhn and Tucker, whatever the mask: it scales step and pull alike at `x`."""
    n, b, z, lr = 160, 20, 2.0, 5e-2
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.randn(n, 8, generator=generator, dtype=torch.float64)
    y = torch.tanh(x[:, :1] - x[:, 1:2]) + 0.5 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    optimizer = PRM(net.parameters(), lr=lr, mask=mask, shrinkage=z, batch_size=b, n_dataset=n, **SLOW)

    def backward(rows):
        optimizer.zero_grad()
        (net(x[rows]) - y[rows]).square().mean().backward()

    for epoch in range(100):
        optimizer.param_groups[0]["lr"] = lr * 0.95**epoch
        for rows in torch.randperm(n, generator=generator).split(b):
            backward(rows)
            optimizer.step()
    backward(slice(None))
    for p in (net[0].weight, net[2].weight):
        state = optimizer.state[p]
        s = state["exp_avg_var"] / (1 - 0.999 ** state["step"].item())
        share = p.grad.abs() / (z * (b / (n - b) * s).sqrt())
        zero = p == 0
        assert 0 < zero.double().mean() < 1
        assert share[zero].max() < 1.05
        torch.testing.assert_close(share[~zero], torch.ones_like(share[~zero]), rtol=0, atol=0.15)
        assert (p.grad[~zero].sign() == -p[~zero].sign()).all()


def share_off_zero(mask, z, b, n):
    """Return the share of weights off zero after training on targets that have nothing to do with the inputs."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 4, generator=generator), torch.randn(n, 300, generator=generator)
    w = torch.nn.Parameter(torch.zeros(300, 4))
    optimizer = PRM([w], lr=2e-2, mask=mask, shrinkage=z, batch_size=b, n_dataset=n, **SLOW)
    epochs = 600 * b // n
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 2e-2 * 0.01 ** (epoch / epochs)
        for rows in torch.randperm(n, generator=generator).split(b):
            w.grad = (x[rows] @ w.detach().T - y[rows]).T @ x[rows] / b
            optimizer.step()
    return float((w != 0).double().mean())


@pytest.mark.parametrize(("z", "b", "n"), [(1.5, 10, 100), (1.5, 50, 200), (2.0, 20, 400), (2.5, 8, 64)])
def test_of_weights_that_say_nothing_as_many_leave_zero_as_normal_numbers_exceed_z(z, b, n):
    shares = [share_off_zero(mask, z, b, n) for mask in MASKS]
    expected = math.erfc(z / math.sqrt(2))
    # Twice the standard deviation of so many weights, and what s^ and m^ are still off.
    assert shares == pytest.approx([expected] * len(MASKS), rel=0.1, abs=2 * math.sqrt(expected / 1200))
    assert max(shares) - min(shares) < 0.01


@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"foreach": False, "shrink_to": "start", "reduction": "per_tensor"},
     {"foreach": True, "shrink_to": "start", "mask": "threshold", "capturable": True}],
)  # fmt: skip
def test_the_compiled_step_shrinks_as_the_plain_one(options):
    if not hasattr(torch, "compiler") or not hasattr(torch.compiler, "is_compiling"):
        pytest.skip("torch before 2.1 has no torch.compiler.is_compiling")
    torch._dynamo.reset()
    ends = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(0.1 * torch.randn(shape)) for shape in [(6, 5), (5,)]]
        optimizer = PRM(params, lr=0.1, weight_decay=0.0, shrinkage=5.0, **COUNTS, **options)
        step = wrap(optimizer.step)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape)
            step()
        ends.append((torch.cat([p.detach().flatten() for p in params]), optimizer.shrunk()))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-5, atol=1e-5)
    assert ends[0][1] == ends[1][1]
    assert 0 < ends[0][1]["scalar_fraction"] < 1


@pytest.mark.parametrize("shrink_to", ["zero", "start"])
@pytest.mark.parametrize("options", [{}, {"mask": "none"}, {"reduction": "per_tensor"}, {"shrinkage": 50.0}])
def test_autograd_passes_through_the_pull_and_to_the_first_weights(shrink_to, options):
    def final(lr, start):
        w = start.clone()
        its = {"shrinkage": 2.0, "batch_size": 8, "n_dataset": 40, **options}
        optimizer = PRM([w], lr=lr, differentiable=True, weight_decay=0.1, shrink_to=shrink_to, **its)
        for factor in (1.0, 2.0, 1.5):
            w.grad = factor * (w - 1.0) ** 3
            optimizer.step()
        return w

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[0.3, -0.4, 2.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(final, (lr, start), atol=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_a_complex_bias_is_left_alone_and_a_complex_weight_is_two_reals(how):
    bias, weight = (torch.nn.Parameter(torch.full(shape, 0.01 + 0.01j)) for shape in [(7,), (6, 7)])
    real = torch.nn.Parameter(torch.view_as_real(weight).detach().clone())
    optimizer, other = (PRM(ps, lr=1e-2, shrinkage=6.0, **COUNTS, **how) for ps in ([bias, weight], [real]))
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        for p in (bias, weight):
            p.grad = torch.randn(p.shape, dtype=torch.complex64, generator=generator)
        real.grad = torch.view_as_real(weight.grad).clone()
        optimizer.step()
        other.step()
    assert (torch.view_as_real(bias) != 0).all()
    assert torch.equal(torch.view_as_real(weight), real)
    assert (real == 0).double().mean() > 0.5


def test_first_weights_must_be_kept_from_the_first_step():
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = PRM([("weight", p)], lr=1e-3, shrinkage=1.0, **COUNTS)
    noise(optimizer, [p], 2)
    optimizer.param_groups[0]["shrink_to"] = "start"
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="parameter weight holds no first weights: shrink_to='start' must be set"):
        noise(optimizer, [p], 1)
    assert torch.equal(p, before)


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


@pytest.mark.parametrize(
    ("options", "pulls"),
    [
        ({"mask": "soft"}, False),
        ({"mask": "hard"}, False),
        ({"mask": "threshold", "softness": 4.0, "n_dataset": 2000}, False),
        ({"mask": "threshold", "softness": 4.0}, False),
        ({"mask": "threshold", "softness": 1.0, "shrinkage": 2.0}, True),
        ({"mask": "soft", "shrinkage": 5.0}, True),
        ({"mask": "soft", "boundary": "empirical", "shrinkage": 1.5}, True),
        ({"mask": "soft", "min_q": 0.1}, True),
        ({"mask": "snr"}, True),
        ({"mask": "snr", "debias": True}, False),
        ({"mask": "snr", "debias": True, "n_dataset": 20}, True),
        ({"mask": "none"}, True),
    ],
)
def test_a_pull_that_never_comes_is_warned_of(options, pulls):
    weight = torch.nn.Parameter(torch.ones(6, 7))
    options = {"shrinkage": 1.0, **COUNTS, **options}
    _warn_of_no_pull.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = PRM([weight], lr=1e-2, weight_decay=0.0, **options)
    assert [one.filename for one in said] == [__file__] * (not pulls)
    assert not said or "never pulls" in str(said[0].message)
    # Without gradients every motion after the first step is the pull's.
    noise(optimizer, [weight], 300)
    optimizer.state[weight]["exp_avg"].zero_()
    weight.data.fill_(1.0)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert (weight != 1).any() == pulls
