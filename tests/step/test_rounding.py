"""Stochastic rounding: unbiased, deterministic, alike for every layout; and state kept in bfloat16."""

import pytest
import torch
from conftest import HOW
from hypothesis import given
from hypothesis import strategies as st

from popriskmin import PRM
from popriskmin.step.rounding import hash32, random_bits, round_stochastically


@given(st.integers(0, 2**32 - 1))
def test_numbers_and_tensors_hash_alike(x):
    assert hash32(torch.tensor([x])).item() == hash32(x)
    assert 0 <= hash32(x) < 2**32


def test_the_bits_are_uniform():
    bits = random_bits(torch.empty(200_000), 7)
    for shift in range(0, 32, 4):
        counts = torch.bincount((bits >> shift) & 15, minlength=16).double()
        # Chi-square with 15 degrees of freedom; 50 is far beyond its 99.99th percentile.
        assert ((counts - counts.mean()).square() / counts.mean()).sum() < 50
    # Neither neighbours, nor steps, nor the two halves go together.
    high, low = (bits >> 16).double(), (bits & 0xFFFF).double()
    later = (random_bits(torch.empty(200_000), 8) >> 16).double()
    for a, b in ((high[1:], high[:-1]), (high, low), (high, later)):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.01


def test_a_place_in_memory_keeps_its_bits():
    base = random_bits(torch.empty(6, 5), 3)
    assert torch.equal(random_bits(torch.empty(5, 6).t(), 3).t().flatten(), base.flatten())
    assert torch.equal(random_bits(torch.empty(6, 5), torch.tensor(3.0)), base)
    assert not torch.equal(random_bits(torch.empty(6, 5), 4), base)


@given(st.floats(2.0**-100, 2.0**100), st.integers(0, 2**16 - 1))
def test_rounds_to_a_neighbour(x, bits):
    x = torch.tensor([x], dtype=torch.float32)
    low = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    high = ((x.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    rounded = round_stochastically(x, torch.tensor([bits])).float()
    assert rounded in ((low,) if low == x else (low, high))


def test_the_mean_over_all_bits_is_exact():
    x = torch.tensor([0.3, 1.7, 12345.678, 1e-30])
    every = torch.arange(2**16)
    for value in x:
        rounded = round_stochastically(value.expand(2**16), every).double()
        assert rounded.mean().item() == pytest.approx(value.item(), rel=1e-7)


def test_nan_and_infinity_stay():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    rounded = round_stochastically(x, torch.full((4,), 0xFFFF))
    assert rounded[0].isnan()
    assert rounded[1:].tolist() == [float("inf"), -float("inf"), 0.0]


@pytest.mark.parametrize("how", HOW)
def test_an_average_in_bfloat16_moves(how):
    """Rounded to nearest, `v` would stand still once a thousandth of the difference is below half a step."""
    p = torch.nn.Parameter(torch.zeros(2000))
    optimizer = PRM([p], state_dtype=torch.bfloat16, **how)
    generator = torch.Generator().manual_seed(0)
    expected = 0.0
    for step in range(1500):
        p.grad = torch.full((2000,), 2.0 if step > 300 else 1.0) * torch.randn(2000, generator=generator).sign()
        expected = 0.999 * expected + 0.001 * p.grad[0].item() ** 2
        optimizer.step()
    state = optimizer.state[p]
    assert state["exp_avg"].dtype == torch.float32
    assert state["exp_avg_sq"].dtype == state["exp_avg_var"].dtype == torch.bfloat16
    assert state["exp_avg_sq"].double().mean().item() == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
@pytest.mark.parametrize("options", [{}, {"debias": True, "amsgrad": True}, {"capturable": True}])
def test_all_round_alike(reduction, options):
    results = []
    for how in HOW:
        generator = torch.Generator().manual_seed(0)
        shapes = [(3, 5), (4,), (), (40, 50)]
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        params.append(torch.nn.Parameter(torch.randn(7, 5, generator=generator).t()))
        optimizer = PRM(params, state_dtype=torch.bfloat16, reduction=reduction, **how, **options)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        results.append([*params, *(s["exp_avg_sq"] for s in optimizer.state.values())])
    for one, *others in zip(*results):
        # Where a rounding of float32 differs, so may the one to bfloat16: by one of its steps, and rarely.
        for other in others:
            differ = (one != other).double().mean().item()
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
            assert one.dtype != torch.bfloat16 or differ < 0.02


def test_checkpoints_keep_bfloat16_and_cross_to_float32(tmp_path):
    p = torch.nn.Parameter(torch.ones(6))
    optimizer = PRM([p], state_dtype=torch.bfloat16)
    for scale in (0.5, -1.0):
        p.grad = torch.linspace(-1, 1, 6) * scale
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    for dtype in (torch.bfloat16, torch.float32):
        fresh = PRM([torch.nn.Parameter(p.detach().clone())], state_dtype=dtype)
        fresh.load_state_dict(saved)
        state = next(iter(fresh.state.values()))
        assert state["exp_avg"].dtype == torch.float32
        assert state["exp_avg_var"].dtype == dtype
        assert torch.equal(state["exp_avg_var"].float(), optimizer.state[p]["exp_avg_var"].float())


def test_complex_parameters_keep_float32():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.cfloat))
    optimizer = PRM([p], state_dtype=torch.bfloat16)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].dtype == torch.cfloat
