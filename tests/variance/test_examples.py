"""The variance from single examples' gradients, beside gradients taken one after another by autograd."""

import math

import pytest
import torch
from hypothesis import given as sampled
from hypothesis import strategies as st
from simulated import Rows, given, mean_loss, still
from torch import nn
from torch.nn import functional as F

from popriskmin import PRM
from popriskmin.variance import Examples


def squared(model, x, y):
    return (model(x) - y).square().mean()


def network():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 2))


def by_autograd(model, loss, *batch):
    """Return the gradient of each example: a row each, the parameters one after another, in float64."""
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(batch[0])):
        gradients = torch.autograd.grad(loss(model, *[t[i : i + 1] for t in batch]), params)
        rows.append(torch.cat([g.flatten() for g in gradients]).double())
    return torch.stack(rows)


def variance_of_mean(rows):
    return (rows.square().mean(0) - rows.mean(0).square()) / (len(rows) - 1)


@sampled(examples=st.integers(2, 12), chunk_size=st.integers(1, 14), seed=st.integers(0, 10**6))
def test_gradient_variance_and_loss(examples, chunk_size, seed):
    torch.manual_seed(seed)
    model = network()
    x, y = torch.randn(examples, 5), torch.randn(examples, 2)
    optimizer = still(model.parameters())
    loss = Examples(optimizer, model, squared, chunk_size).backward(x, y)
    optimizer.step()
    expected = squared(model, x, y)
    assert loss.shape == ()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)
    for p, g in zip(model.parameters(), torch.autograd.grad(expected, list(model.parameters()))):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-5)
    rows = by_autograd(model, squared, x, y)
    torch.testing.assert_close(given(optimizer).double(), variance_of_mean(rows), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [5, 64])
def test_it_is_unbiased(chunk_size):
    """50,000 estimates of a known variance: their mean is within five standard errors."""
    torch.manual_seed(0)
    width, examples, deviation = 50_000, 16, 3.0
    model = Rows(width)
    optimizer = still(model.parameters())
    Examples(optimizer, model, mean_loss, chunk_size).backward(7 + deviation * torch.randn(examples, width))
    optimizer.step()
    error = given(optimizer).double().mean().item() / (deviation**2 / examples) - 1
    assert abs(error) < 5 * math.sqrt(2 / (examples - 1) / width)


def test_drift_is_no_noise():
    torch.manual_seed(0)
    width, steps, drift = 2000, 100, 0.5
    model = Rows(width)
    optimizer = still(model.parameters(), rho=0.95)
    source = Examples(optimizer, model, mean_loss)
    for step in range(steps):
        source.backward(drift * step + 4 * torch.randn(16, width))  # the mean has variance 1
        optimizer.step()
        optimizer.zero_grad()
    assert given(optimizer).mean().item() / (1 - 0.95**steps) == pytest.approx(1, abs=0.02)


def test_batches_drawn_without_replacement():
    """`z` is the variance over new examples; over batches from the same examples it is `z * (1 - b / n)`."""
    torch.manual_seed(0)
    n, b, width = 20, 8, 300
    data = torch.randn(n, width)
    model = Rows(width)
    optimizer = still(model.parameters())
    source = Examples(optimizer, model, mean_loss)
    variances, gradients = [], []
    for _ in range(400):
        source.backward(data[torch.randperm(n)[:b]])
        gradients.append(torch.cat([p.grad for p in model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()
        variances.append(given(optimizer))
    over_batches = torch.stack(gradients).var(0).mean()
    z = torch.stack(variances).mean()
    assert (over_batches / z).item() == pytest.approx(1 - b / n, rel=0.03)
    assert z.item() == pytest.approx((data.var(0) / b).mean().item(), rel=0.02)


def test_training_equals_variances_computed_by_hand():
    torch.manual_seed(0)
    x, y = torch.randn(5, 12, 5), torch.randn(5, 12, 2)
    weights = []
    for by_hand in (True, False):
        torch.manual_seed(1)
        model = network()
        params = list(model.parameters())
        optimizer = PRM(params, lr=0.05, variance="given")
        source = None if by_hand else Examples(optimizer, model, squared)
        for batch in zip(x, y):
            optimizer.zero_grad()
            if source is None:
                variance = variance_of_mean(by_autograd(model, squared, *batch)).float()
                parts = variance.split([p.numel() for p in params])
                squared(model, *batch).backward()
                optimizer.set_variances({p: part.view_as(p) for p, part in zip(params, parts)})
            else:
                source.backward(*batch)
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_two_batches_add_up_as_two_backward_passes_do():
    torch.manual_seed(0)
    model = network()
    optimizer = still(model.parameters())
    source = Examples(optimizer, model, squared)
    batches = [(torch.randn(6, 5), torch.randn(6, 2)), (torch.randn(9, 5), torch.randn(9, 2))]
    for _ in range(2):
        for batch in batches:
            source.backward(*batch)
        optimizer.step()
        total = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.zero_grad()
    rows = [by_autograd(model, squared, *batch) for batch in batches]
    torch.testing.assert_close(total.double(), sum(r.mean(0) for r in rows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given(optimizer).double(), sum(map(variance_of_mean, rows)), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_a_term_without_examples_adds_no_variance(first):
    torch.manual_seed(0)
    model = network()
    optimizer = still(model.parameters())
    source = Examples(optimizer, model, squared)
    x, y = torch.randn(6, 5), torch.randn(6, 2)

    def penalty():
        (100 * sum(p.square().sum() for p in model.parameters())).backward()

    if first:
        penalty()
    source.backward(x, y)
    if not first:
        penalty()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    optimizer.step()
    rows = by_autograd(model, squared, x, y)
    plain = rows.mean(0) + 200 * torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    factor = gradient.norm() / plain.norm()
    torch.testing.assert_close(given(optimizer).double(), factor**2 * variance_of_mean(rows), rtol=1e-3, atol=1e-12)


def test_a_gradient_without_examples_is_refused():
    model = network()
    optimizer = still(model.named_parameters())
    source = Examples(optimizer, model, squared)
    squared(model, torch.randn(4, 5), torch.randn(4, 2)).backward()
    with pytest.raises(
        RuntimeError, match="parameter 0.weight has a gradient without examples: call Examples.backward"
    ):
        optimizer.step()
    optimizer.zero_grad()
    source.backward(torch.randn(4, 5), torch.randn(4, 2))
    optimizer.step()
    with pytest.raises(RuntimeError, match="not cleared after the last step"):
        source.backward(torch.randn(4, 5), torch.randn(4, 2))


def test_groups_without_a_given_variance_get_their_gradient():
    torch.manual_seed(0)
    model = network()
    model[2].bias.requires_grad_(False)
    optimizer = still([{"params": model[3].parameters()}, {"params": model[0].parameters(), "variance": "streaming"}])
    x, y = torch.randn(6, 5), torch.randn(6, 2)
    Examples(optimizer, model, squared).backward(x, y)
    assert model[2].bias.grad is None
    trained = [p for p in model.parameters() if p.requires_grad]
    for p, g in zip(trained, torch.autograd.grad(squared(model, x, y), trained)):
        torch.testing.assert_close(p.grad, g)
    optimizer.step()
    rows = by_autograd(model[3], squared, model[:3](x).detach(), y)
    torch.testing.assert_close(given(optimizer)[: rows.shape[1]].double(), variance_of_mean(rows), rtol=1e-3, atol=1e-6)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.embed(tokens).mean(1).tanh())


def test_batches_in_containers_tied_weights_and_whole_numbers():
    torch.manual_seed(0)
    model = Tied()
    optimizer = still(model.parameters())

    def loss(model, batch, other):
        return F.cross_entropy(model(batch["tokens"]), batch["target"]) + other[0].mean() * model.embed.weight.sum()

    batch = {"tokens": torch.randint(11, (6, 4)), "target": torch.randint(11, (6,))}
    other = (torch.randn(6),)
    Examples(optimizer, model, loss, chunk_size=4).backward(batch, other)
    optimizer.step()
    rows = by_autograd(
        model,
        lambda model, tokens, target, o: loss(model, {"tokens": tokens, "target": target}, (o,)),
        batch["tokens"],
        batch["target"],
        other[0],
    )
    torch.testing.assert_close(given(optimizer).double(), variance_of_mean(rows), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_other_types(dtype):
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(40, dtype=dtype))
    model = nn.ParameterList([w])
    x = torch.randn(7, 40, dtype=dtype)

    def loss(model, x):
        return torch.view_as_real(x * model[0]).sum() if dtype.is_complex else (x * model[0]).float().sum()

    optimizer = still([w])
    Examples(optimizer, model, loss, chunk_size=3).backward(x)
    optimizer.step()
    assert w.grad.dtype == dtype
    gradients = torch.stack([torch.autograd.grad(loss(model, row[None]), w)[0] for row in x])
    z = given(optimizer)
    if dtype.is_complex:
        gradients, z = torch.view_as_real(gradients.resolve_conj()), torch.view_as_real(z)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.double(), variance_of_mean(gradients.double()), rtol=1e-3, atol=1e-6)


def test_dropout_is_drawn_for_each_example():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(400, 1, bias=False))
    optimizer = still(model.parameters())
    Examples(optimizer, model, lambda model, x: model(x).mean()).backward(torch.ones(64, 400))
    optimizer.step()
    # Each gradient is 0 or 2 with equal chance: variance 1, over 64 examples.
    assert given(optimizer).mean().item() == pytest.approx(1 / 64, rel=0.05)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False).eval()])
def test_batch_normalization_over_the_batch_is_refused(norm):
    model = nn.Sequential(norm, nn.Linear(5, 2))
    source = Examples(still(model.parameters()), model, squared)
    with pytest.raises(ValueError, match="0 is a BatchNorm1d that normalizes over the batch.*evaluation mode"):
        source.backward(torch.randn(4, 5), torch.randn(4, 2))


def test_batch_normalization_in_evaluation_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2))
    model(3 + torch.randn(50, 5))
    model.eval()
    optimizer = still(model.parameters())
    x, y = torch.randn(6, 5), torch.randn(6, 2)
    Examples(optimizer, model, squared).backward(x, y)
    optimizer.step()
    rows = by_autograd(model, squared, x, y)
    torch.testing.assert_close(given(optimizer).double(), variance_of_mean(rows), rtol=1e-3, atol=1e-6)


def test_bad_arguments_are_named():
    model = network()
    optimizer = still(model.named_parameters())
    for chunk_size in (0, -1, 2.5, None):
        with pytest.raises(ValueError, match=f"chunk_size must be a whole number >= 1, got {chunk_size}"):
            Examples(optimizer, model, squared, chunk_size)
    with pytest.raises(ValueError, match="parameter 3.weight of the optimizer is not a parameter of the model"):
        Examples(optimizer, model[:3], squared)
    source = Examples(optimizer, model, squared)
    with pytest.raises(ValueError, match="at least 2 examples to see how their gradients differ, got 1"):
        source.backward(torch.randn(1, 5), torch.randn(1, 2))
    with pytest.raises(ValueError, match=r"the same number of examples, got \[3, 4\]"):
        source.backward(torch.randn(4, 5), torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"examples along dimension 0, got 3.0"):
        source.backward(torch.randn(4, 5), 3.0)
    with pytest.raises(ValueError, match=r"a batch must be tensors.*got \(\)"):
        source.backward()
    source.remove()
    source = Examples(optimizer, model, lambda model, x, y: (model(x) - y).square().mean(0))
    with pytest.raises(ValueError, match=r"must be a tensor of shape \(\), got shape \(2,\)"):
        source.backward(torch.randn(4, 5), torch.randn(4, 2))
    assert all(p.grad is None for p in model.parameters())
