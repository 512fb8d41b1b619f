"""The kernel in C on 8-bit state: its codes are those of the foreach step, by any instruction set and thread count."""

import pytest
import torch
from conftest import SANITIZED
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import made_up_variances, options

from popriskmin import PRM
from popriskmin.step import coded
from popriskmin.step.codes import BYTES, decode
from popriskmin.step.kernels import cpu
from popriskmin.step.kernels.cpu import LEVELS

pytestmark = pytest.mark.skipif(cpu.unusable() is not None, reason=str(cpu.unusable()))

GUARD = 64
SHAPES = [(70, 64), (33, 131), (5,), (4097,)]  # two end within a block


def guarded(values):
    """Return a tensor within a larger one, whose other elements must stay as they are."""
    whole = torch.full((values.numel() + 2 * GUARD,), 77, dtype=values.dtype)
    inner = whole[GUARD:-GUARD].view(values.shape)
    inner.copy_(values)
    return inner, whole


def run(how, dtype, seed=0, steps=4, shapes=SHAPES, special=False, **kwargs):
    """Step with gradients over many octaves, guards around everything; return the optimizer."""
    generator = torch.Generator().manual_seed(seed)
    held = [guarded(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    params = [torch.nn.Parameter(inner) for inner, _ in held]
    fences = [whole for _, whole in held]
    optimizer = PRM(params, state_dtype="8bit", **how, **kwargs)
    for number in range(steps):
        for i, p in enumerate(params):
            spread = torch.exp2(3 * torch.randn(p.shape, generator=generator))
            p.grad = ((torch.randn(p.shape, generator=generator) + i) * spread).to(dtype)
            p.grad.view(-1)[::3] = 0
            if special:
                p.grad.view(-1)[number::131] = (torch.nan, torch.inf, -torch.inf, 1e30)[number % 4]
        if kwargs.get("variance") == "given":
            values = made_up_variances([p.grad.double() for p in params])
            optimizer.set_variances({p: torch.tensor(z) for p, z in zip(params, values)})
        optimizer.step()
        if number == 0:
            for p in params:
                for name, value in optimizer.state[p].items():
                    optimizer.state[p][name], whole = guarded(value)
                    fences.append(whole)
    for whole in fences:
        assert (whole[:GUARD] == 77).all()
        assert (whole[-GUARD:] == 77).all()
    return params, optimizer


def codes_of(params, optimizer):
    return torch.cat([optimizer.state[p]["codes"][0] for p in params if "codes" in optimizer.state[p]])


@settings(max_examples=12 if SANITIZED else 40)
@given(
    options=options(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
    level=st.integers(0, 2),
    special=st.booleans(),
)
def test_agrees_with_foreach_and_touches_nothing_else(options, dtype, seed, level, special):
    best = cpu.level
    cpu.level = lambda: min(level, best())
    special = special and dtype != torch.float16 and options["reduction"] == "per_param"
    try:
        ours, by_kernel = run({"fused": True}, dtype, seed, special=special, **options)
    finally:
        cpu.level = best
    theirs, by_foreach = run({"foreach": True}, dtype, seed, special=special, **options)
    one, two = codes_of(ours, by_kernel), codes_of(theirs, by_foreach)
    # A unit in the last place of a moment decides a rounding, or a block's range, once in thousands; where weight decay
    # enters the gradient, the parameters do too.
    apart = (one != two).double().mean()
    hard = options["mask"] == "hard"
    coupled = not options["decoupled_weight_decay"] and options["weight_decay"] > 0
    assert apart < (0.2 if coupled and (hard or options["betas"][1] == 0 or dtype.itemsize == 2) else 2e-3)
    assert torch.equal(one[:, -4:], two[:, -4:])
    narrow = dtype in (torch.bfloat16, torch.float16)
    rtol = 2e-2 if narrow else 2e-5
    for a, b in zip(ours, theirs):
        close = torch.isclose(a, b, rtol=rtol, equal_nan=True, atol=(rtol if narrow else 10 * rtol) * options["lr"])
        pooled = options["reduction"] == "per_tensor"
        loose = 0.97 if hard or coupled or options["betas"][1] == 0 else 0.998
        assert close.double().mean() > loose or (hard and pooled)


@pytest.mark.parametrize("extra", [{}, {"reduction": "per_tensor"}, {"amsgrad": True, "debias": True, "mask": "soft"},
                                   {"maximize": True, "decoupled_weight_decay": False}, {"variance": "given"},
                                   {"shrinkage": 1.0, "batch_size": 8, "n_dataset": 1000}])  # fmt: skip
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(extra, monkeypatch):
    shapes = [(5,), (400, 1000), (130_001,)]  # divided among threads
    found = []
    best = cpu.level()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for number in range(best + 1):
                monkeypatch.setattr(cpu, "level", lambda number=number: number)
                params, optimizer = run({"fused": True}, torch.float32, steps=3, shapes=shapes, **extra)
                found.append([*params, codes_of(params, optimizer)])
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
def test_every_code_is_read_and_every_range_is_written_as_in_python(level, monkeypatch):
    """Blocks of any bytes under headers of any shift, infinities and NaN among them, step as by foreach."""
    if level > cpu.level():
        pytest.skip(f"this processor has no {LEVELS[level]}")
    monkeypatch.setattr(cpu, "level", lambda: level)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (512, BYTES), generator=generator, dtype=torch.uint8)
    head = blocks[:, 384:].view(torch.int32)
    for column in (1, 2):
        shift = torch.randint(7, 21, (512,), generator=generator)
        base = (torch.randint(1, 200, (512,), generator=generator) << 23 >> shift).int()
        head[:, column] = base << 5 | shift
    wide = torch.randint(0, 2, (512,), generator=generator)
    head[:, 0] = (torch.randint(118, 128, (512,), generator=generator) << 5 | 18 + wide).int()
    found = []
    for how in ({"fused": True}, {"foreach": True}):
        p = torch.nn.Parameter(torch.zeros(512, 128))
        p.grad = torch.zeros_like(p)
        optimizer = PRM([p], state_dtype="8bit", betas=(0.5, 0.5), rho=0.5, **how)
        optimizer.step()
        optimizer.state[p]["codes"].copy_(blocks)
        optimizer.step()
        found.append((optimizer.state[p]["codes"][0], p.detach()))
    (ours, moved), (theirs, expected) = found
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(moved, expected, equal_nan=True)
    assert not decode(ours).square.isfinite().all()  # the specials were among them


def test_it_is_taken_by_default_and_what_is_not_contiguous_is_left(monkeypatch):
    stepped = []
    monkeypatch.setattr(coded._Tensor, "step", lambda one: stepped.append(one.held.params[0]))
    params = [torch.nn.Parameter(torch.ones(80, 60)), torch.nn.Parameter(torch.ones(60, 80).t())]
    optimizer = PRM(params, state_dtype="8bit")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(stepped) == 1
    assert stepped[0] is params[1]
    assert (params[0] < 1).all()


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        (
            lambda state: {"codes": state["codes"][:, :3]},
            r"its codes, of shape \(1, 3, 400\), are no contiguous blocks",
        ),
        (lambda state: {"max_exp_avg_sq": state["max_exp_avg_sq"].double()}, "max_exp_avg_sq has type torch.float64"),
    ],
)
def test_what_does_not_fit_is_named(spoilt, reason):
    p = torch.nn.Parameter(torch.ones(80, 60))
    optimizer = PRM([p], state_dtype="8bit", amsgrad=True, fused=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p].update(spoilt(optimizer.state[p]))
    with pytest.raises(RuntimeError, match=f"tensor 0 .*{reason}"):
        optimizer.step()
