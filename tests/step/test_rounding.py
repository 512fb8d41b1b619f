"""Stochastic rounding: unbiased, deterministic, alike for every layout; of bfloat16 state, and of parameters."""

import copy

import pytest
import torch
from conftest import HOW, IMPLEMENTATIONS
from hypothesis import given
from hypothesis import strategies as st

from popriskmin import PRM
from popriskmin.step.functional import prm
from popriskmin.step.rounding import hash32, parameter_bits, random_bits, round_stochastically


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


NARROW = [torch.bfloat16, torch.float16]


@given(st.floats(-(2.0**15), 2.0**15, width=32), st.integers(0, 2**16 - 1))
def test_float16_rounds_to_a_neighbour_and_its_own_numbers_stay(x, bits):
    x, bits = torch.tensor([x], dtype=torch.float32), torch.tensor([bits])
    rounded = round_stochastically(x, bits, torch.float16)
    near = torch.nextafter(rounded, torch.tensor([float("inf")], dtype=torch.float16))
    before = torch.nextafter(rounded, torch.tensor([-float("inf")], dtype=torch.float16))
    assert before.float() < x < near.float()
    assert torch.equal(round_stochastically(rounded.float(), bits, torch.float16), rounded)


def test_the_mean_over_all_bits_is_exact_in_float16():
    x = torch.tensor([0.3, -1.7, 12345.678, 2.0**-14, 7.3e-5, -6.2e-6, 3e-8])  # the last three are subnormal
    every = torch.arange(2**16)
    for value in x:
        rounded = round_stochastically(value.expand(2**16), every, torch.float16).double()
        assert rounded.mean().item() == pytest.approx(value.item(), rel=1e-6, abs=2.0**-39)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e30])
    rounded = round_stochastically(special, torch.full((5,), 0xFFFF), torch.float16)
    assert rounded[0].isnan()
    assert rounded[1:].tolist() == [float("inf"), -float("inf"), 0.0, float("inf")]
    assert rounded[3].signbit()


def test_parameters_have_bits_of_their_own():
    of_state = random_bits(torch.empty(200_000), 7)
    param = torch.ones(200_000, dtype=torch.bfloat16)
    of_params = parameter_bits(param, 7).double()
    for other in ((of_state >> 16).double(), (of_state & 0xFFFF).double()):
        assert abs(torch.corrcoef(torch.stack([of_params, other]))[0, 1]) < 0.01
    assert torch.equal(parameter_bits(param[100:150], 7, place=100), parameter_bits(param, 7)[100:150])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", NARROW)
def test_two_tensors_of_one_shape_round_apart(how, dtype):
    """Two layers whose errors went together would err together: here all weights are positive and all steps alike."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((1 + torch.rand(40_000, generator=generator)).to(dtype)) for _ in range(2)]
    before = [p.double() for p in params]
    ulp = torch.finfo(dtype).eps
    optimizer = PRM(params, lr=0.4 * ulp, weight_decay=0.0, mask="none", stochastic_rounding=True, **how)
    for p in params:
        p.grad = -torch.ones_like(p)
    optimizer.step()
    moved = [(p.double() - start) / ulp for p, start in zip(params, before)]
    assert moved[0].mean().item() == pytest.approx(0.4, abs=0.02)
    assert torch.corrcoef(torch.stack(moved))[0, 1].abs() < 0.03


EDGE = {torch.float16: (65504.0, 65519.0, 65520.0), torch.bfloat16: (2.0**128 - 2.0**120, 3.3961e38, 3.3962e38)}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", NARROW)
def test_no_weight_becomes_infinite_that_would_not_if_rounded_to_nearest(how, dtype):
    """Between the largest number and infinity there is no mean to keep."""
    largest, below, above = EDGE[dtype]
    assert largest == torch.finfo(dtype).max
    zeros = [torch.zeros(3000) for _ in range(3)]
    for start, end in ((largest, largest), (below, largest), (above, float("inf"))):
        for sign in (1.0, -1.0):
            # With beta1 = 0, v = 0 and eps = 1 the step is the gradient itself.
            w, g = torch.zeros(3000, dtype=dtype), torch.full((3000,), -sign * start)
            state = [x.clone() for x in zeros]
            prm([w], [g], *[[x] for x in state], [], [torch.tensor(0.0)], lr=1.0, beta1=0.0, beta2=1.0, rho=0.9,
                eps=1.0, weight_decay=0.0, mask="none", bias_correction=False, stochastic_rounding=True,
                **how)  # fmt: skip
            assert (w == sign * end).all()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", NARROW)
def test_a_weight_moves_by_the_mean_of_its_steps(how, dtype):
    """Each step is a 50th of half a unit in the last place, and its direction certain."""
    ulp = torch.finfo(dtype).eps
    moved = []
    for stochastic in (False, True):
        p = torch.nn.Parameter(torch.full((4000,), 1.25, dtype=dtype))
        optimizer = PRM([p], lr=0.01 * ulp, weight_decay=0.0, mask="none", stochastic_rounding=stochastic, **how)
        for _ in range(50):
            p.grad = -torch.ones_like(p)
            optimizer.step()
        moved.append((p.double() - 1.25).mean().item())
    # The standard error of a mean over 4000 of them is 0.008 units.
    assert moved == [0.0, pytest.approx(0.5 * ulp, abs=0.03 * ulp)]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"state_dtype": "8bit", "fused": None}])
def test_what_does_not_step_is_not_rounded_and_float32_is_not_touched(how, options):
    results = []
    for stochastic in (False, True):
        generator = torch.Generator().manual_seed(0)
        still, narrow, wide = (
            torch.nn.Parameter(torch.randn(80, 60, generator=generator).to(dtype))
            for dtype in (torch.bfloat16, torch.bfloat16, torch.float32)
        )
        # The first is pulled to where it is, the weights that it started from.
        optimizer = PRM(
            [still, narrow, wide], weight_decay=0.0, stochastic_rounding=stochastic, shrinkage=1.0, shrink_to="start",
            batch_size=8, n_dataset=80, **{**how, **options}
        )  # fmt: skip
        start = still.detach().clone()
        for _ in range(5):
            for p in (narrow, wide):
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            still.grad = torch.zeros_like(still)
            optimizer.step()
        assert torch.equal(still, start)
        results.append((narrow.detach(), wide.detach()))
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
@pytest.mark.parametrize("options", [{}, {"debias": True, "state_dtype": torch.bfloat16}, {"capturable": True},
                                     {"state_dtype": torch.float64}])  # fmt: skip
def test_all_round_parameters_alike(dtype, reduction, options):
    results = []
    for how in HOW:
        generator = torch.Generator().manual_seed(0)
        shapes = [(3, 5), (4,), (), (40, 50)]
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
        params.append(torch.nn.Parameter(torch.randn(7, 5, generator=generator).to(dtype).t()))
        optimizer = PRM(params, stochastic_rounding=True, reduction=reduction, **how, **options)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in params]))
    loop, foreach, *fused = results
    assert (loop != foreach).double().mean() < 0.01
    for other in fused:
        assert (loop != other).double().mean() < 0.01
        torch.testing.assert_close(loop, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, "8bit"])
@pytest.mark.parametrize("step", [3, 2**24 - 2])
def test_a_resumed_run_rounds_alike_and_goes_on_drawing(how, state_dtype, step):
    """Before and behind 2**24, where a float32 step count stands still."""
    if state_dtype == "8bit":
        how = {**how, "fused": None}

    def made():
        p = torch.nn.Parameter(torch.linspace(0.5, 1.5, 4096).bfloat16())
        return p, PRM([p], lr=1e-4, state_dtype=state_dtype, stochastic_rounding=True, **how)

    def run(p, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            optimizer.step()

    p, optimizer = made()
    run(p, optimizer, 0)
    optimizer.state[p]["step"].fill_(step)
    run(p, optimizer, 1)
    q, resumed = made()
    with torch.no_grad():
        q.copy_(p)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[p]["step"] == resumed.state[q]["step"] == step + 3
    for pair in ((p, optimizer), (q, resumed)):
        run(*pair, 2)
    assert torch.equal(p, q)


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_what_is_drawn_does_not_stand_still(how):
    """An average with decay 0.999 that only rounding moves: the same bits for ever would hold some scalars fast."""
    p = torch.nn.Parameter(torch.zeros(2000, dtype=torch.bfloat16))
    optimizer = PRM([p], lr=1e-3, weight_decay=0.0, state_dtype=torch.bfloat16, stochastic_rounding=True, **how)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["step"].fill_(2.0**24)
    optimizer.state[p]["exp_avg_sq"].fill_(0.5)
    for _ in range(400):
        optimizer.step()
    expected = 1 - 0.5 * 0.999**400
    assert optimizer.state[p]["exp_avg_sq"].double().mean().item() == pytest.approx(expected, rel=1e-2)
    assert optimizer.state[p]["step"].item() == 2**24 + 400


def test_a_count_in_float32_is_widened_where_something_is_rounded():
    p = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = PRM([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["step"].dtype == torch.float32
    old = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["stochastic_rounding"] = True
    optimizer.step()
    assert (optimizer.state[p]["step"].dtype, optimizer.state[p]["step"].item()) == (torch.float64, 2.0)
    # The checkpoint of a run without goes on with it, where the optimizer was built so.
    fresh = PRM([torch.nn.Parameter(p.detach().clone())], stochastic_rounding=True)
    fresh.load_state_dict(old)
    assert fresh.param_groups[0]["stochastic_rounding"] is True
    assert next(iter(fresh.state.values()))["step"].dtype == torch.float64


def test_a_compiled_step_rounds_alike_and_is_not_compiled_anew():
    if not hasattr(torch, "compiler") or not hasattr(torch.compiler, "is_compiling"):
        pytest.skip("torch before 2.1 has no torch.compiler.is_compiling")
    torch._dynamo.reset()
    results, compiled = [], []

    def counting(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for wrap in (lambda f: f, lambda f: torch.compile(f, backend=counting)):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(40, 30, generator=generator).bfloat16())
        optimizer = PRM([p], state_dtype=torch.bfloat16, stochastic_rounding=True, foreach=True)
        p.grad = torch.zeros_like(p)
        step = wrap(optimizer.step)
        counts = []
        for _ in range(5):
            p.grad.copy_(torch.randn(p.shape, generator=generator))
            step()
            counts.append(len(compiled))
        results.append(p.detach())
    assert (results[0] != results[1]).double().mean() < 0.01
    assert counts[2:] == [counts[2]] * 3
