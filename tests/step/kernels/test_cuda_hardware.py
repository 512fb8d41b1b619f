"""The Triton step on a real device; skipped where there is none."""

import pytest
import torch
from step.kernels.triton_problems import (
    DEFAULTS,
    TYPES,
    Problem,
    assert_agree,
    bf16,
    both,
    boundary_step,
    f32,
    f64,
    gradients,
    hardware,
    hyperparameters,
    single,
    to_start,
)
from strategies import made_up_variances

from popriskmin import PRM
from popriskmin.step.kernels import cuda
from popriskmin.step.kernels.eligible import fits_as_usual
from popriskmin.step.lists import Lists

GRID = [
    {},
    {"mask": "soft", "amsgrad": True, "warmup_steps": 1},
    {"mask": "hard", "warmup_steps": 1, "boundary": "empirical", "batch_size": 10, "n_dataset": 100},
    {"mask": "none", "decoupled_weight_decay": False, "maximize": True},
    {"reduction": "per_tensor", "mask_decay": True},
    {"reduction": "per_tensor", "mask": "soft", "debias": True, "amsgrad": True},
    {"debias": True, "softness": 3.0, "betas": (0.4, 0.9)},
    {"bias_correction": False, "mask_eps": 1e-8},
    {"variance": "given", "debias": True, "min_q": 0.1},
    {"variance": "given", "reduction": "per_tensor", "mask": "soft"},
    {"shrinkage": 2.5, "batch_size": 8, "n_dataset": 40},
    {"shrinkage": 2.5, "batch_size": 8, "n_dataset": 40, "shrink_to": "start", "mask": "threshold", "amsgrad": True},
    {"shrinkage": 2.5, "batch_size": 8, "n_dataset": 40, "shrink_to": "start", "reduction": "per_tensor"},
]


def given_in(drawn):
    """Return the type of the variances where they are given."""
    return f32 if drawn.get("variance") == "given" else None


LARGE = [(1000, 333), (4096,), (), (7,), (64, 3, 3, 3), (1_000_003,)]


@pytest.fixture
def sync_is_an_error():
    def check():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield check
    torch.cuda.set_sync_debug_mode("default")


@hardware
@pytest.mark.parametrize("drawn", GRID)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("tensor_steps", [False, True])
def test_on_a_device(drawn, types, tensor_steps):
    assert cuda.unusable() is None
    grads = gradients({"seed": 1, "scale": 1.0, "steps": 3}, LARGE)
    wide = f64 if f64 in (types[0], types[2]) else f32
    how = {"device": "cuda", "tensor_steps": tensor_steps, "tensor_lr": wide if tensor_steps else None}
    ours, theirs = both(drawn, grads, types, LARGE, **how, offset=16 if types[0] == f32 else 3)
    assert_agree(ours, theirs, types, drawn, 3, moved=10)


@hardware
@pytest.mark.parametrize("drawn", [{}, {"reduction": "per_tensor"}, {"amsgrad": True}, {"stochastic_rounding": True}])
@pytest.mark.parametrize("dtype", [f32, f64, bf16])
def test_8_bit_state_is_foreachs(drawn, dtype):
    found = []
    for how in ({"fused": True}, {"foreach": True}):
        generator = torch.Generator("cuda").manual_seed(0)
        shapes = [(1000, 333), (64, 3, 3, 8), (1_000_003,)]
        params = [torch.nn.Parameter(torch.randn(s, generator=generator, device="cuda").to(dtype)) for s in shapes]
        optimizer = PRM(params, state_dtype="8bit", **how, **drawn)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, device="cuda").to(dtype)
            optimizer.step()
        found.append((params, [optimizer.state[p]["codes"] for p in params]))
    (ours, codes), (theirs, others) = found
    for one, two in zip(codes, others):
        assert (one != two).double().mean() < 5e-3
        assert torch.equal(one[..., -4:], two[..., -4:])
    for one, two in zip(ours, theirs):
        close = torch.isclose(one, two, rtol=1e-2 if dtype == bf16 else 1e-4, atol=1e-5)
        assert close.double().mean() > 0.99


@hardware
@pytest.mark.parametrize("mask", ["soft", "hard"])
def test_masks_are_shut_on_the_boundary_of_a_device(mask):
    before, after = boundary_step(mask, device="cuda", n=100_000)
    assert torch.equal(before, after)


@hardware
@pytest.mark.parametrize("drawn", GRID)
@pytest.mark.parametrize("tensor_steps", [False, True])
def test_nothing_waits_for_the_device_and_steps_are_deterministic(drawn, tensor_steps, sync_is_an_error):
    grads = gradients({"seed": 1, "scale": 1.0, "steps": 1}, LARGE)[0]
    results = []
    for _ in range(2):
        made = Problem(LARGE, (f32,) * 4, {**DEFAULTS, **drawn}["amsgrad"], device="cuda",
                       steps_on="cuda" if tensor_steps else "cpu", given=given_in(drawn),
                       to_start=to_start(drawn))  # fmt: skip
        lists = made.lists(grads)
        hyper = hyperparameters({**drawn, "lr": torch.tensor(0.01, device="cuda")})
        cuda.step(lists, made.steps, hyper)
        sync_is_an_error()
        for _ in range(3):
            cuda.step(lists, made.steps, hyper)
        torch.cuda.set_sync_debug_mode("default")
        made.check_memory(grads)
        results.append(made.results())
    assert all(torch.equal(a, b) for x, y in zip(*results) for a, b in zip(x, y))


@hardware
@pytest.mark.parametrize("drawn", GRID)
def test_a_captured_graph_steps_like_the_loop(drawn):
    """Captured with gradients at new addresses, and replayed while other work uses the memory that is free."""
    shapes, amsgrad = LARGE, {**DEFAULTS, **drawn}["amsgrad"]
    grads = gradients({"seed": 1, "scale": 1.0, "steps": 6}, shapes)
    lr = torch.tensor(0.01, device="cuda")
    how = {"device": "cuda", "steps_on": "cuda", "given": given_in(drawn), "to_start": to_start(drawn)}
    ours, theirs = (Problem(shapes, (f32,) * 4, amsgrad, **how) for _ in range(2))
    hyper = hyperparameters({**drawn, "lr": lr})

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        lists = ours.lists(grads[0])
        cuda.step(lists, ours.steps, hyper, fits_as_usual(lists, ours.steps, None))
    torch.cuda.current_stream().wait_stream(stream)
    static = ours.lists(grads[1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.step(static, ours.steps, hyper)
    for g in grads[1:]:
        for target, value in zip(static.grads + static.grad_vars, [*g, *made_up_variances(g)]):
            target.copy_(torch.as_tensor(value))
        lr.mul_(0.5)
        graph.replay()
        _ = [torch.full((4096,), -1, device="cuda") for _ in range(50)]
    lr.fill_(0.01)
    for i, g in enumerate(grads):
        if i:
            lr.mul_(0.5)
        single(theirs, g, {**drawn, "lr": lr}, capturable=True)
    assert_agree(ours.results(), theirs.results(), (f32,) * 4, {**drawn, "lr": 0.01}, 6, moved=10)


@hardware
def test_another_stream_gets_tables_of_its_own():
    grads = gradients({"seed": 1, "scale": 1.0, "steps": 1}, LARGE)[0]
    made = Problem(LARGE, (f32,) * 4, False, device="cuda")
    lists = made.lists(grads)
    state = fits_as_usual(lists, made.steps, None)
    cuda.step(lists, made.steps, hyperparameters({}), state)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        cuda.step(lists, made.steps, hyperparameters({}), state)
    torch.cuda.synchronize()
    assert [len(kept) for kept in state.memory.values()] == [2, 2]


@hardware
def test_a_tensor_of_more_than_two_to_the_31_elements():
    n = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 20 * n:
        pytest.skip("needs 43 GB of free device memory")
    w, g = torch.ones(n, dtype=bf16, device="cuda"), torch.ones(n, dtype=bf16, device="cuda")
    m = torch.zeros(n, dtype=f32, device="cuda")
    v, s = torch.zeros(n, dtype=bf16, device="cuda"), torch.zeros(n, dtype=bf16, device="cuda")
    hyper = hyperparameters({"mask": "none", "lr": 0.5, "weight_decay": 0.0})
    cuda.step(Lists([w], [g], [m], [v], [s], [], [], []), [torch.tensor(0.0)], hyper)
    assert bool(((w - 0.5).abs_() < 0.05).all())
