"""The variance from microbatches: its formula, that it is unbiased, and that drift is no part of it."""

import math

import pytest
import torch
from hypothesis import given as sampled
from hypothesis import strategies as st
from simulated import Rows, given, mean_loss, still
from torch import nn
from torch.utils.checkpoint import checkpoint

from popriskmin import PRM
from popriskmin.variance import Microbatches


def of_increments(increments):
    """Return the estimate by its definition, in float64."""
    a = torch.stack(increments).double()
    return len(a) / (len(a) - 1) * (a - a.mean(0)).square().sum(0)


@sampled(
    passes=st.integers(2, 6),
    divided=st.booleans(),
    mean=st.sampled_from([0.0, 1.0, 300.0]),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_formula(passes, divided, mean, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(passes, 1, 20, generator=generator, dtype=dtype) + mean
    model = Rows(20, dtype)
    optimizer = still(model.parameters())
    Microbatches(optimizer)
    scale = 1 / passes if divided else 1.0
    for x in rows:
        (mean_loss(model, x) * scale).backward()
    optimizer.step()
    assert given(optimizer).dtype == dtype
    expected = of_increments([x[0] * scale for x in rows])
    # What rounds the gradient itself counts, in units of its last place.
    slack = 8 * (torch.finfo(dtype).eps * (mean + 3) * scale * passes) ** 2
    torch.testing.assert_close(
        given(optimizer).double(), expected, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=slack
    )


@pytest.mark.parametrize("passes", [2, 4, 16])
@pytest.mark.parametrize("divided", [True, False])
def test_it_is_unbiased(passes, divided):
    """100,000 estimates of a known variance: their mean is within five standard errors, which is 2.3% at most."""
    torch.manual_seed(0)
    width, batch, deviation = 100_000, 2, 3.0
    model = Rows(width)
    optimizer = still(model.parameters())
    Microbatches(optimizer)
    for x in 7 + deviation * torch.randn(passes, batch, width):
        (mean_loss(model, x) / (passes if divided else 1)).backward()
    optimizer.step()
    truth = deviation**2 / batch * (1 / passes if divided else passes)
    error = given(optimizer).double().mean().item() / truth - 1
    assert abs(error) < 5 * math.sqrt(2 / (passes - 1) / width)


def test_drift_is_no_noise():
    """The true gradient moves by half its deviation a step: the streaming variance is 26 times too large here.

    The mean lags a steady drift by 1 / (1 - beta1) steps, 10 of them, and the square of that is taken for noise.
    """
    torch.manual_seed(0)
    width, passes, steps, deviation, drift = 2000, 4, 150, 1.0, 0.5
    results = {}
    for variance in ("streaming", "given"):
        model = Rows(width)
        optimizer = still(model.parameters(), rho=0.95, variance=variance)
        if variance == "given":
            Microbatches(optimizer)
        for step in range(steps):
            for x in drift * step + math.sqrt(passes) * deviation * torch.randn(passes, 1, width):
                (mean_loss(model, x) / passes).backward()
            optimizer.step()
            optimizer.zero_grad()
        results[variance] = given(optimizer).mean().item() / (1 - 0.95**steps) / deviation**2
    assert abs(results["given"] - 1) < 0.02
    assert results["streaming"] == pytest.approx(1 + 1 / 19 + (drift * 10) ** 2, rel=0.05)


def test_backward_passes_of_unequal_sizes():
    """Weighted by their sizes, they count the differences of the weights as noise: by how much is documented."""
    torch.manual_seed(0)
    width, sizes, mean = 50_000, [1, 2, 3, 6], 2.0
    total = sum(sizes)
    model = Rows(width)
    optimizer = still(model.parameters())
    Microbatches(optimizer)
    for size in sizes:
        (model(mean + torch.randn(size, width)).sum() / total).backward()
    optimizer.step()
    of_sizes = torch.tensor(sizes, dtype=torch.float64)
    c = of_sizes.std(correction=0) / of_sizes.mean()
    expected = 1 / total + c**2 / (len(sizes) - 1) * mean**2
    assert given(optimizer).double().mean().item() == pytest.approx(expected.item(), rel=0.02)


def test_backward_passes_of_unequal_sizes_that_weigh_the_same_are_unbiased():
    torch.manual_seed(0)
    width, sizes = 50_000, [1, 2, 3, 6]
    model = Rows(width)
    optimizer = still(model.parameters())
    Microbatches(optimizer)
    for size in sizes:
        (mean_loss(model, 2 + torch.randn(size, width)) / len(sizes)).backward()
    optimizer.step()
    truth = sum(1 / size for size in sizes) / len(sizes) ** 2
    assert given(optimizer).double().mean().item() == pytest.approx(truth, rel=0.03)


def test_little_noise_beside_a_large_mean():
    """The sum of squares less the square of the sum would leave nothing of this noise in float32."""
    torch.manual_seed(0)
    model = Rows(20_000)
    optimizer = still(model.parameters())
    Microbatches(optimizer)
    for x in 1e4 + torch.randn(4, 1, 20_000):
        mean_loss(model, x).backward()
    optimizer.step()
    assert given(optimizer).mean().item() == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    rows = (3 + torch.randn(4, 1, 3000)).to(dtype)
    model = Rows(3000, dtype)
    optimizer = still(model.parameters())
    Microbatches(optimizer)
    for x in rows:
        mean_loss(model, x).backward()
    optimizer.step()
    assert given(optimizer).dtype == torch.float32
    expected = of_increments([x[0] for x in rows])
    rounding = (torch.finfo(dtype).eps * 12) ** 2
    assert (given(optimizer) - expected).abs().max() < 0.02 * expected.max() + 10 * rounding


def test_complex_parameters_have_variances_of_both_parts():
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(30, dtype=torch.complex64))
    optimizer = still([w])
    Microbatches(optimizer)
    rows = torch.randn(3, 30, dtype=torch.complex64)
    increments = []
    for x in rows:
        increments.append(torch.autograd.grad((w * x).sum().real, w)[0])
        (w * x).sum().real.backward()
    optimizer.step()
    expected = of_increments([torch.view_as_real(a.resolve_conj()) for a in increments])
    torch.testing.assert_close(torch.view_as_real(given(optimizer)), expected.float())


def test_a_parameter_that_some_passes_do_not_reach():
    torch.manual_seed(0)
    rows = torch.randn(5, 40)
    w, rare, once = (nn.Parameter(torch.zeros(40)) for _ in range(3))
    optimizer = still([w, rare, once])
    Microbatches(optimizer)
    for k, x in enumerate(rows):
        used = w + (rare if k in (1, 3) else 0) + (once if k == 2 else 0)
        (used * x).sum().backward()
    for p in (w, rare, once):
        p.grad.mul_(0.5)
    optimizer.step()
    zero = torch.zeros(40)
    of_rare = of_increments([x if k in (1, 3) else zero for k, x in enumerate(rows)])
    of_once = of_increments([x if k == 2 else zero for k, x in enumerate(rows)])
    expected = torch.cat([of_increments(list(rows)), of_rare, of_once]) / 4
    torch.testing.assert_close(given(optimizer), expected.float())


def test_memory_formats_and_the_fused_step():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 8, 8)
    seen = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        model = nn.Conv2d(3, 5, 3).to(memory_format=memory_format)
        optimizer = PRM(model.parameters(), lr=0.1, variance="given")
        Microbatches(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            for part in x:
                model(part.to(memory_format=memory_format)).square().mean().backward()
            optimizer.step()
        seen.append(torch.cat([model.weight.detach().flatten(), model.bias.detach()]))
    torch.testing.assert_close(*seen)


def test_tied_weights_count_once():
    torch.manual_seed(0)
    layer = nn.Linear(6, 6, bias=False)
    optimizer = still(layer.parameters())
    Microbatches(optimizer)
    increments = []
    for x in torch.randn(3, 4, 6):
        loss = layer(layer(x).tanh()).square().mean()
        increments += torch.autograd.grad(loss, layer.weight, retain_graph=True)
        loss.backward()
    optimizer.step()
    torch.testing.assert_close(given(optimizer), of_increments(increments).float().flatten())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_segments(reentrant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    results = []
    rows = torch.randn(3, 4, 6, requires_grad=True)
    for segmented in (True, False):
        optimizer = still(model.parameters())
        source = Microbatches(optimizer)
        for x in rows:
            for layer in model:
                x = checkpoint(layer, x, use_reentrant=reentrant) if segmented else layer(x)
            x.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        source.remove()
        results.append(given(optimizer))
    torch.testing.assert_close(*results)


def test_a_weight_shared_by_reentrant_segments_is_refused():
    shared, head = nn.Linear(6, 6), nn.Linear(6, 1)
    optimizer = still([*shared.parameters(), *head.parameters()])
    Microbatches(optimizer)
    for x in torch.randn(2, 4, 6, requires_grad=True):
        for _ in range(2):
            x = checkpoint(shared, x, use_reentrant=True)
        head(x).mean().backward()
    with pytest.raises(
        RuntimeError, match="added 4 times to one parameter and 2 times to parameter 2.*use_reentrant=False"
    ):
        optimizer.step()


def test_one_backward_pass_is_not_enough():
    model = Rows(10)
    optimizer = still(model.parameters())
    Microbatches(optimizer)
    mean_loss(model, torch.randn(4, 10)).backward()
    with pytest.raises(RuntimeError, match="at least 2 backward passes before each step, got 1: accumulate"):
        optimizer.step()
    mean_loss(model, torch.randn(4, 10)).backward()  # one more, and it goes
    optimizer.step()


def test_it_holds_one_buffer_from_the_second_pass_until_the_step():
    model = Rows(1000)
    optimizer = still(model.parameters())
    source = Microbatches(optimizer)

    def held():
        return sum(r.variance.numel() for r in source._records.values() if r.variance is not None)

    counts = []
    for _ in range(2):
        for x in torch.randn(3, 4, 1000):
            counts.append(held())
            mean_loss(model, x).backward()
        counts.append(held())
        optimizer.step()
        optimizer.zero_grad()
    assert counts == [0, 0, 1000, 1000] * 2
    assert held() == 0


def test_a_run_with_a_real_model_equals_variances_computed_by_hand():
    """The same training twice: once with the source, once with every gradient stored and `set_variances` called."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 3, 16, 8), torch.randn(5, 3, 16, 1)
    weights = []
    for by_hand in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        params = list(model.parameters())
        optimizer = PRM(params, lr=0.05, variance="given")
        if not by_hand:
            Microbatches(optimizer)
        for batch in zip(x, y):
            gradients = []
            for a, b in zip(*batch):
                loss = (model(a) - b).square().mean() / 3
                gradients.append(torch.autograd.grad(loss, params, retain_graph=True))
                loss.backward()
            if by_hand:
                optimizer.set_variances(
                    {p: of_increments(a).float() for p, a in zip(params, map(list, zip(*gradients)))}
                )
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(*weights)
