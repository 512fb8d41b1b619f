"""The Triton step: in Triton's interpreter on the CPU, compiled for devices that are not here, and on real ones.

The interpreter must be chosen before Triton is imported, and it changes Triton for the whole process; so the tests
marked `interpreted` are run by `test_in_the_interpreter`, in a process of their own.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference
from strategies import made_up_variances, options, problems

from popriskmin.mask import Hyperparameters, boundary_coefficient
from popriskmin.step.functional import prm
from popriskmin.step.kernels import cuda
from popriskmin.step.lists import Lists

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = find_spec("triton") is not None and int(version("triton").split(".")[0]) >= 3
HERE = Path(__file__)

needs_triton = pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton, not interpreting")
interpreted = pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="run by test_in_the_interpreter")
hardware = pytest.mark.skipif(
    INTERPRETED or not HAS_TRITON or not torch.cuda.is_available(), reason="needs Triton and a CUDA device"
)

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Types of p, g, m, and v with s.
TYPES = [
    (f32, f32, f32, f32),
    (f64, f64, f64, f64),
    (bf16, bf16, f32, f32),
    (f16, f16, f32, f32),
    (f32, f32, f32, bf16),
    (bf16, bf16, f32, bf16),
    (f32, bf16, f32, f32),
    (f16, f32, f64, f64),
    (f64, f32, f32, f32),
    (f32, f64, f32, f64),
]
# With blocks of 64: one element, one that fills its blocks and ones that do not, and two dimensions in either order.
SHAPES = [(), (3, 5), (128,), (33, 2), (65,), (1,)]
DEFAULTS = {
    "lr": 0.01,
    "betas": (0.9, 0.999),
    "rho": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "softness": 1.0,
    "mask": "snr",
    "reduction": "per_param",
    "warmup_steps": 0,
    "amsgrad": False,
    "bias_correction": True,
    "decoupled_weight_decay": True,
    "mask_eps": None,
    "debias": False,
    "mask_decay": False,
    "maximize": False,
    "min_q": 0.0,
    "variance": "streaming",
}
NEEDED_BY_PRM = set(DEFAULTS) - {"betas", "variance"}


@pytest.fixture(autouse=INTERPRETED)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(cuda, "BLOCK", 64)
    monkeypatch.setattr(cuda, "CHUNK", 2)


def arguments(drawn):
    """Return the options as `prm` takes them."""
    drawn = {**DEFAULTS, **drawn}
    a = boundary_coefficient(drawn.get("boundary", "batch"), drawn.get("batch_size"), drawn.get("n_dataset"))
    beta1, beta2 = drawn["betas"]
    return {**{name: drawn[name] for name in NEEDED_BY_PRM}, "beta1": beta1, "beta2": beta2, "coefficient": a}


def hyperparameters(drawn):
    return Hyperparameters.of(**arguments(drawn), variance={**DEFAULTS, **drawn}["variance"])


class Guarded:
    """A tensor with elements around its memory that nothing may touch, perhaps off any alignment."""

    def __init__(self, values, dtype, offset, device="cpu"):
        values = torch.as_tensor(values).to(dtype)
        self.dtype, self.offset, self.n = dtype, offset, values.numel()
        self.memory = torch.full((self.n + 2 * offset,), 7.0, dtype=dtype, device=device)
        self.tensor = self.memory[offset : offset + self.n].view(values.shape)
        self.tensor.copy_(values)

    def is_intact(self):
        rest = torch.cat([self.memory[: self.offset], self.memory[self.offset + self.n :]])
        return bool((rest == 7.0).all())


class Problem:
    """Parameters and state, in guarded memory, and the steps they have taken."""

    def __init__(self, shapes, types, amsgrad, offset=16, transposed=False, device="cpu", steps_on=None, start=None,
                 given=None):  # fmt: skip
        """`given` is the type of the variances, None where they come from the gradients."""
        self.given = given
        rng = np.random.default_rng(1)
        p, g, m, v = types
        self.transposed, self.offset, self.device, self.grad_type = transposed, offset, device, g
        values = [rng.normal(size=shape) for shape in shapes]
        self.columns = [
            [Guarded(self._in_memory(value), dtype, offset, device) for value in values] for dtype in (p, m, v, v, v)
        ]
        for column in self.columns[1:]:
            for guarded in column:
                guarded.tensor.zero_()
        if not amsgrad:
            self.columns.pop()
        self.amsgrad = amsgrad
        start = start or [0.0] * len(shapes)
        self.steps = [torch.tensor(t, dtype=f32, device=steps_on or "cpu") for t in start]

    def _in_memory(self, value):
        return value.T.copy() if self.transposed and value.ndim == 2 else value

    def _seen(self, tensor):
        return tensor.T if self.transposed and tensor.dim() == 2 else tensor

    def lists(self, grads):
        self.grads = [Guarded(self._in_memory(g), self.grad_type, self.offset, self.device) for g in grads]
        values = made_up_variances(grads) if self.given else []
        self.variances = [Guarded(self._in_memory(z), self.given, self.offset, self.device) for z in values]
        variances = [self._seen(z.tensor) for z in self.variances]
        p, *state = [[self._seen(guarded.tensor) for guarded in column] for column in self.columns]
        maxima = state.pop() if self.amsgrad else []
        return Lists(p, [self._seen(g.tensor) for g in self.grads], *state, maxima, variances)

    def check_memory(self, grads):
        for column in [*self.columns, self.grads, self.variances]:
            assert all(guarded.is_intact() for guarded in column)
        for guarded, g in zip(self.grads, grads):
            expected = torch.as_tensor(self._in_memory(g)).to(self.grad_type)
            torch.testing.assert_close(guarded.tensor.cpu(), expected, rtol=0, atol=0, equal_nan=True)

    def results(self):
        return [[self._seen(guarded.tensor).cpu() for guarded in column] for column in self.columns]


def gradients(problem, shapes):
    rng = np.random.default_rng(problem["seed"])
    means = [rng.normal(size=shape) for shape in shapes]
    return [
        [np.asarray(problem["scale"] * (u + rng.normal(size=u.shape))) for u in means] for _ in range(problem["steps"])
    ]


def single(made, grads, drawn, capturable):
    """Take a step of a problem with the single-tensor form."""
    *lists, variances = made.lists(grads)
    prm(*lists, made.steps, foreach=False, capturable=capturable, grad_vars=variances or None, **arguments(drawn))


def both(drawn, all_grads, types, shapes=SHAPES, tensor_steps=False, tensor_lr=None, device="cpu", start=None,
         given=f32, **how):  # fmt: skip
    """Take the steps with the kernel and with the single-tensor form; return the results of both."""
    amsgrad = {**DEFAULTS, **drawn}["amsgrad"]
    how |= {"device": device, "steps_on": device if tensor_steps else "cpu", "start": start}
    how["given"] = given if {**DEFAULTS, **drawn}["variance"] == "given" else None
    made = [Problem(shapes, types, amsgrad, **how) for _ in range(2)]
    if tensor_lr is not None:
        lr = torch.tensor({**DEFAULTS, **drawn}["lr"], dtype=tensor_lr, device=how["steps_on"])
        drawn = {**drawn, "lr": lr}
    ours, theirs = made
    for grads in all_grads:
        cuda.step(ours.lists(grads), ours.steps, hyperparameters(drawn), tensor_steps)
        single(theirs, grads, drawn, tensor_steps)
        ours.check_memory(grads)
    assert [t.item() for t in ours.steps] == [t.item() for t in theirs.steps]
    return ours.results(), theirs.results()


NAMES = ["p", "m", "v", "s", "max"]
# Units of the type's resolution, of the largest number: the state is a chain of few operations.
UNITS = {f64: 64, f32: 16, f16: 1.1, bf16: 1.1}


def assert_agree(ours, theirs, types, drawn, steps, moved=None):
    """Compare all tensors; those of 16 bits may have been rounded to the neighbour."""
    wide = f64 if f64 in types[:1] + types[2:3] else f32
    lr = float({**DEFAULTS, **drawn}["lr"])
    # Differences of gradients lose digits, of `s` above all, and pass that on to the step.
    share = max({f64: 1e-10, f32: 1e-4, bf16: 2e-2}[t] for t in (wide, *types[2:]))
    largest_gradient = max(float(a.abs().max()) for a in theirs[1]) / (1 - {**DEFAULTS, **drawn}["betas"][0])
    hard = {**DEFAULTS, **drawn}["mask"] == "hard"
    for name, mine, other in zip(NAMES, ours, theirs):
        for a, b in zip(mine, other):
            assert a.dtype == b.dtype
            unit = max(torch.finfo(a.dtype).eps * UNITS[a.dtype], torch.finfo(wide).eps * UNITS[wide])
            size = float(b.abs().max())
            atol = unit * (largest_gradient**2 if name == "s" else size)
            if name == "p":
                # A step is about lr, as exact as the state is stored; without bias correction it can be much more.
                atol += share * steps * lr * (moved or 1)
            off = (a.double() - b.double()).abs() > atol + unit * b.double().abs()
            if hard and name == "p":
                # A number on the boundary may fall to either side, a whole tensor of numbers in a pooled mask.
                assert off.double().mean() <= 0.1 or {**DEFAULTS, **drawn}["reduction"] == "per_tensor" or wide == f32
            else:
                assert not off.any(), (name, a[off], b[off])


@interpreted
@settings(max_examples=45)
@given(
    drawn=options(),
    problem=problems,
    types=st.sampled_from(TYPES),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
    how=st.fixed_dictionaries(
        {
            "offset": st.sampled_from([16, 3]),
            "transposed": st.booleans(),
            "tensor_steps": st.booleans(),
            "tensor_lr": st.sampled_from([None, f64]),
            "given": st.sampled_from([f32, f64, bf16]),
        }
    ),
)
def test_agrees_with_the_single_tensor_form(drawn, problem, types, shapes, how):
    problem = {**problem, "steps": min(problem["steps"], 3)}
    grads = gradients(problem, shapes)
    ours, theirs = both(drawn, grads, types, shapes, **how)
    assert_agree(ours, theirs, types, drawn, len(grads))


@interpreted
@settings(max_examples=30)
@given(drawn=options(), problem=problems, tensor_steps=st.booleans())
def test_agrees_with_the_float64_reference(drawn, problem, tensor_steps):
    shapes = [(70,), (3, 5)]
    grads = gradients({**problem, "steps": min(problem["steps"], 3)}, shapes)
    ours = Problem(shapes, (f64,) * 4, drawn["amsgrad"], given=f64 if drawn["variance"] == "given" else None)
    rng = np.random.default_rng(1)
    expected = Reference([rng.normal(size=shape) for shape in shapes], **drawn)
    for g in grads:
        cuda.step(ours.lists(g), ours.steps, hyperparameters(drawn), tensor_steps)
        expected.step(g, made_up_variances(g))
    for i, column in enumerate((expected.w, expected.m, expected.v, expected.s)):
        for a, b in zip(ours.results()[i], column):
            np.testing.assert_allclose(a.numpy(), b, rtol=0, atol=1e-10 * (1 + np.abs(b).max()))


@interpreted
@pytest.mark.parametrize("tensor_steps", [False, True])
@pytest.mark.parametrize("types", [t for t in TYPES if t[3] == bf16] + [(f64, f64, f64, bf16)])
def test_bfloat16_state_is_the_same_to_the_last_bit(types, tensor_steps):
    """`v` and `s` are sums of two products: where `m` is the same, nothing but the random bits could differ."""
    shapes = [(70, 2), (130,)]
    grads = gradients({"seed": 3, "scale": 1.0, "steps": 4}, shapes)
    for drawn in ({"betas": (0.9, 0.999), "amsgrad": True}, {"betas": (0.0, 0.5), "rho": 0.5}):
        ours, theirs = both(drawn, grads, types, shapes, tensor_steps=tensor_steps, transposed=True)
        for mine, other in zip(ours[2:], theirs[2:]):
            assert all(torch.equal(a, b) for a, b in zip(mine, other))
        # They were rounded, and not all to nearest.
        exact, _ = both(drawn, grads, (*types[:3], f64), shapes, tensor_steps=tensor_steps, transposed=True)
        up = torch.cat([(a.double() > b.to(bf16).double()).flatten() for a, b in zip(ours[2], exact[2])])
        assert 0 < up.double().mean() < 1


@interpreted
@pytest.mark.parametrize("dtype", [f16, bf16, f32])
def test_writes_round_like_torch(dtype):
    """Over all exponents, halfway cases, subnormal numbers, overflow: `w - lr * m / 1`, with `m` = 0 except in m."""
    patterns = torch.arange(-(2**31), 2**31, 2**24 - 4097, dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(-(2**15), 2**15, 2**9 - 1) * 2**16 + 2**15).to(torch.int32)
    values = torch.cat([patterns, ties, ties + 1, ties - 1]).view(torch.float32)
    values = values[values.isfinite()].double().numpy()
    drawn = {"betas": (0.0, 0.9), "mask": "none", "weight_decay": 0.0, "bias_correction": False}
    ours, _ = both(drawn, [[values]], (f64, f64, f64, f64), [values.shape])
    # beta1 = 0: m is the gradient. What is stored in a narrower type must be what torch makes of it.
    narrow, theirs = both({**drawn, "lr": 0.0}, [[values]], (dtype, f64, f32, f32), [values.shape])
    assert torch.equal(ours[1][0], torch.as_tensor(values))
    assert torch.equal(narrow[0][0].float(), theirs[0][0].float())
    half = Problem([values.shape], (dtype, f64, f64, f64), False)
    half.columns[0][0].tensor.zero_()
    # With eps = 1 and v = 0 (beta2 is 1 but for the last bit) the step is the gradient itself.
    hyper = hyperparameters({**drawn, "lr": -1.0, "eps": 1.0})._replace(beta2=1.0)
    cuda.step(half.lists([values]), half.steps, hyper)
    torch.testing.assert_close(half.results()[0][0], torch.as_tensor(values).to(dtype), rtol=0, atol=0)


BAD = np.array([1.0, np.nan, np.inf, -np.inf, 3e38, -1e30, 0.0, 1e-30])


@interpreted
@pytest.mark.parametrize("mask", ["snr", "soft", "hard", "threshold", "none"])
@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
@pytest.mark.parametrize("tensor_steps", [False, True])
def test_nan_and_infinity_pass_as_in_the_single_tensor_form(mask, reduction, tensor_steps):
    good = np.linspace(-1, 1, 8)
    for debias, beta1, bad_first in [(False, 0.9, False), (True, 0.9, True), (True, 0.9, False), (False, 0.4, True)]:
        drawn = {"mask": mask, "reduction": reduction, "debias": debias, "betas": (beta1, 0.999), "warmup_steps": 1,
                 "amsgrad": debias}  # fmt: skip
        grads = [BAD, good, good] if bad_first else [good, BAD, good]
        ours, theirs = both(drawn, [[g] for g in grads], (f32,) * 4, [(8,)], tensor_steps=tensor_steps)
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine[0], other[0], rtol=1e-4, atol=1e-7, equal_nan=True)


@interpreted
@pytest.mark.parametrize("tensor_steps", [False, True])
def test_a_gradient_whose_square_overflows_leaves_the_noise_a_number_at_the_first_step_of_debias(tensor_steps):
    made = Problem([(3,)], (f32,) * 4, False)
    grads = [np.array([1e38, -3e38, 1.0])]
    cuda.step(made.lists(grads), made.steps, hyperparameters({"debias": True}), tensor_steps)
    assert torch.equal(made.results()[3][0], torch.zeros(3))


def boundary_step(mask, device="cpu", reduction="per_param", n=1000):
    """Take a step whose signal and noise are the same numbers; return the parameters before and after."""
    # rho = beta1 = 0 without bias correction: s = (g - 0)**2 and m = g.
    drawn = {"mask": mask, "betas": (0.0, 0.9), "rho": 0.0, "bias_correction": False, "weight_decay": 0.0,
             "reduction": reduction}  # fmt: skip
    made = Problem([(n,)], (f32,) * 4, False, device=device)
    before = made.results()[0][0].clone()
    grads = [np.random.default_rng(0).normal(size=n)]
    cuda.step(made.lists(grads), made.steps, hyperparameters(drawn))
    return before, made.results()[0][0]


@interpreted
@pytest.mark.parametrize("mask", ["soft", "hard"])
@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
def test_masks_are_shut_on_the_boundary(mask, reduction):
    before, after = boundary_step(mask, reduction=reduction, n=100)
    assert torch.equal(before, after)


def launches(lists, steps, hyper, tensor_steps=False):
    return [len(x.rows) // 11 for x in cuda._launches(lists, steps, hyper, tensor_steps)]


@interpreted
def test_tensors_of_other_types_and_steps_share_a_call_and_few_launches():
    shapes = [(70,), (3, 5), (65,), ()]
    start = [0.0, 4.0, 0.0, 4.0]
    grads = gradients({"seed": 0, "scale": 1.0, "steps": 2}, shapes)
    drawn = {"debias": True, "warmup_steps": 2, "amsgrad": True}
    for reduction in ("per_param", "per_tensor"):
        for tensor_steps in (False, True):
            types, how = (f32,) * 4, {"tensor_steps": tensor_steps, "start": start}
            ours, theirs = both({**drawn, "reduction": reduction}, grads, types, shapes, **how)
            assert_agree(ours, theirs, types, drawn, 2)
    made, hyper = Problem(shapes, (f32,) * 4, False, start=start), hyperparameters({})
    assert launches(made.lists(grads[0]), made.steps, hyper) == [2, 2]
    assert launches(made.lists(grads[0]), made.steps, hyper, tensor_steps=True) == [4]
    one, other = Problem(shapes, (f32,) * 4, False), Problem(shapes, (f16, f16, f32, f32), False)
    joined = Lists(*[a + b for a, b in zip(one.lists(grads[0]), other.lists(grads[0]))])
    assert launches(joined, one.steps + other.steps, hyper) == [4, 4]
    cuda.step(joined, one.steps + other.steps, hyper)
    for made in (one, other):
        made.check_memory(grads[0])
        alone = Problem(shapes, (made.grad_type, made.grad_type, f32, f32), False)
        cuda.step(alone.lists(grads[0]), alone.steps, hyper)
        assert all(torch.equal(a, b) for x, y in zip(made.results(), alone.results()) for a, b in zip(x, y))


@interpreted
def test_many_tensors():
    shapes = [(i % 7 + 1,) for i in range(80)]
    grads = gradients({"seed": 0, "scale": 1.0, "steps": 1}, shapes)
    ours, theirs = both({}, grads, (f32,) * 4, shapes)
    assert_agree(ours, theirs, (f32,) * 4, {}, 1)


@interpreted
def test_autograd_notices_the_step():
    w = torch.ones(3, requires_grad=True)
    loss = (w * w).sum()
    state = [torch.zeros(3) for _ in range(3)]
    with torch.no_grad():
        cuda.step(Lists([w], [torch.ones(3)], *[[x] for x in state], [], []), [torch.tensor(0.0)], hyperparameters({}))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@interpreted
def test_a_default_device_does_not_matter():
    made, grads = Problem([(70,)], (f32,) * 4, False), [np.ones(70)]
    lists, hyper = made.lists(grads), hyperparameters({"reduction": "per_tensor"})
    torch.set_default_device("meta")
    try:
        cuda.step(lists, made.steps, hyper)
    finally:
        torch.set_default_device(None)
    made.check_memory(grads)
    assert made.steps[0] == 1


@interpreted
def test_it_is_usable_in_the_interpreter_and_does_nothing_to_empty_lists():
    assert cuda.unusable() is None
    cuda.step(Lists(*[[] for _ in Lists._fields]), [], hyperparameters({}))


# In this process, whatever it has.


def run_python(code, **env):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTEST"))}
    return subprocess.run([sys.executable, *code], env={**kept, **env}, capture_output=True, text=True, check=False)


@needs_triton
def test_in_the_interpreter():
    arguments = ["-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir"]
    finished = run_python([*arguments, str(HERE.parents[2]), str(HERE)], TRITON_INTERPRET="1")
    assert finished.returncode == 0, finished.stdout[-10000:] + finished.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", finished.stdout)


@pytest.mark.skipif(INTERPRETED, reason="the process has Triton")
def test_triton_is_imported_only_when_asked_for():
    code = "import sys, popriskmin, popriskmin.step.kernels.cuda; assert 'triton' not in sys.modules"
    finished = run_python(["-c", code])
    assert finished.returncode == 0, finished.stderr


@pytest.mark.skipif(INTERPRETED, reason="the process has Triton")
def test_without_triton_it_says_so():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import popriskmin.step.kernels.cuda_step\n"
        "from popriskmin.step.kernels.cuda import unusable\nprint(unusable())"
    )
    finished = run_python(["-c", code])
    assert finished.stdout.startswith("Triton cannot be imported (ModuleNotFoundError"), finished.stderr


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so():
    finished = run_python(["-c", "from popriskmin.step.kernels.cuda import unusable; print(unusable())"])
    assert finished.stdout.strip() in ("there is no CUDA device", "this torch is built for ROCm, on which the kernel "
                                       "has not been tried"), finished.stderr  # fmt: skip


class Streams:
    """Stand in for what the tables ask of CUDA; the meta device for one of its devices."""

    def __init__(self, monkeypatch):
        self.capturing, self.current, self.allocated = False, 1, []
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self)
        monkeypatch.setattr(cuda, "_pinned", self.pinned)
        for name, empty in (("_tables", {}), ("_reserve", {}), ("_read_by_graphs", [])):
            monkeypatch.setattr(cuda, name, empty)

    @property
    def cuda_stream(self):
        return self.current

    def pinned(self, size):
        assert not self.capturing
        self.allocated.append(torch.full((size,), -1))
        return self.allocated[-1]

    def table(self, n, keep=True):
        rows, _ = cuda._rows([[torch.empty(n, device="meta")]] * 7, None)
        return cuda._table(rows, torch.device("meta"), keep)


def test_a_table_lists_tensors_and_blocks():
    tensors = [torch.zeros(n) for n in (1, cuda.BLOCK, cuda.BLOCK + 1)]
    misaligned = torch.zeros(9)[1:]
    columns = [[*tensors, x] for x in (misaligned, *[torch.zeros(8)] * 6)]
    rows, blocks = cuda._rows(columns, [torch.tensor(0.0)] * 4)
    table = cuda._with_owners(rows).tolist()
    assert blocks == 5
    assert table[44:] == [0, 1, 2, 2, 3]
    assert [table[11 * i : 11 * i + 3] for i in range(4)] == [
        [1, 0, 1], [cuda.BLOCK, 1, 1], [cuda.BLOCK + 1, 2, 1], [8, 4, 0],
    ]  # fmt: skip
    assert table[36] == misaligned.data_ptr()
    assert all(table[11 * i + 10] for i in range(4))


def test_tables_are_kept_while_they_are_used(monkeypatch):
    monkeypatch.setattr(cuda, "_MOST_TABLES", 2)
    streams = Streams(monkeypatch)
    one, two = streams.table(1), streams.table(2)
    assert streams.table(1) is one
    streams.table(3)
    assert streams.table(1) is one
    assert streams.table(2) is not two
    streams.current = 2
    assert streams.table(1) is not one


def test_a_graph_gets_a_table_that_nobody_else_uses(monkeypatch):
    streams = Streams(monkeypatch)
    eager = streams.table(1)
    streams.capturing = True
    captured = streams.table(1)
    assert captured is not eager
    assert len(cuda._tables) == 1
    # The host's memory was allocated before, and holds what the graph will read.
    (source,) = cuda._read_by_graphs
    assert any(source is memory for memory in streams.allocated)
    assert source[0] == 1
    streams.capturing = False
    assert streams.table(1) is eager


def compiled(kernel, types, **flags):
    """Return the assembly that Triton makes of a kernel for an A100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from popriskmin.step.kernels import cuda_step

    wide = f64 if f64 in (types[0], types[2]) else f32
    flags = {"PHASE": "all", "MASK": "snr", "DECOUPLED": True, "BIAS": True, "COLUMNS": 11, "BLOCK": 1024} | flags
    off = ["AMSGRAD", "COUPLED", "MAXIMIZE", "DEBIAS", "GIVEN", "MASK_DECAY", "FROM_END", "TENSOR_STEPS", "TENSOR_LR"]
    constants = {**dict.fromkeys(off, False), "CHUNK": 4096, "C": cuda_step.TYPES[wide], **flags}
    constants |= {name: cuda_step.TYPES[t] for name, t in zip("PGMVSXZ", [*types, types[3], types[3], types[1]])}
    function = getattr(cuda_step, kernel)
    kinds = {"table": "*i64", "lr_at": "*fp64", "partials": "*fp64" if wide == f64 else "*fp32", "tensors": "i32",
             "blocks": "i32"}  # fmt: skip
    number = "i64" if wide == f64 else "i32"
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, number) for name in names}
    places = {(names.index(name),): value for name, value in constants.items() if name in names}
    source = ASTSource(fn=function, signature=signature, constexprs=places, attrs={})
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "types", "flags"),
    [
        ("update", TYPES[0], {}),
        ("update", TYPES[1], {"MASK": "soft", "AMSGRAD": True, "COUPLED": True, "DECOUPLED": False}),
        ("update", TYPES[3], {"MASK": "hard", "MAXIMIZE": True}),
        ("update", TYPES[4], {"FROM_END": True, "MASK": "none"}),
        ("update", TYPES[5], {"DEBIAS": True, "TENSOR_STEPS": True, "TENSOR_LR": True, "MASK_DECAY": True}),
        ("update", TYPES[0], {"PHASE": "advance"}),
        ("update", TYPES[3], {"GIVEN": True, "DEBIAS": True, "TENSOR_STEPS": True}),
        ("update", TYPES[0], {"PHASE": "move", "AMSGRAD": True}),
        ("pool", TYPES[0], {"DEBIAS": True, "TENSOR_STEPS": True}),
        ("pool", TYPES[1], {}),
    ],
)
def test_it_compiles_for_devices_without_fusing_products_and_sums(kernel, types, flags, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    try:
        assembly = compiled(kernel, types, **flags)
    except (ImportError, TypeError) as error:
        pytest.skip(f"this version of Triton is asked otherwise: {error}")
    assert not re.search(r"\bfma\.", assembly)
    assert not re.search(r"\b(div|sqrt)\.(approx|full)", assembly)
    # These return the other number where one is NaN.
    assert not re.search(r"\b(min|max)\.f(32|64)", assembly)
    if kernel == "update":
        # Sixteen bytes at a time.
        assert re.search(r"ld\.global\S*\.v[24]\.b(32|64)", assembly)
        assert re.search(r"st\.global\S*\.v[24]\.b(32|64)", assembly)


# On real devices.

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
    how = {"device": "cuda", "tensor_steps": tensor_steps, "tensor_lr": f32 if tensor_steps else None}
    ours, theirs = both(drawn, grads, types, LARGE, **how, offset=16 if types[0] == f32 else 3)
    assert_agree(ours, theirs, types, drawn, 3, moved=10)


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
                       steps_on="cuda" if tensor_steps else "cpu", given=given_in(drawn))  # fmt: skip
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
    how = {"device": "cuda", "steps_on": "cuda", "given": given_in(drawn)}
    ours, theirs = (Problem(shapes, (f32,) * 4, amsgrad, **how) for _ in range(2))
    hyper = hyperparameters({**drawn, "lr": lr})

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cuda.step(ours.lists(grads[0]), ours.steps, hyper)
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
        cuda._tables.clear()
        _ = [torch.full((4096,), -1, device="cuda") for _ in range(50)]
    lr.fill_(0.01)
    for i, g in enumerate(grads):
        if i:
            lr.mul_(0.5)
        single(theirs, g, {**drawn, "lr": lr}, capturable=True)
    assert_agree(ours.results(), theirs.results(), (f32,) * 4, {**drawn, "lr": 0.01}, 6, moved=10)


@hardware
def test_another_stream_gets_a_table_of_its_own():
    grads = gradients({"seed": 1, "scale": 1.0, "steps": 1}, LARGE)[0]
    made = Problem(LARGE, (f32,) * 4, False, device="cuda")
    lists = made.lists(grads)
    cuda._tables.clear()
    cuda.step(lists, made.steps, hyperparameters({}))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        cuda.step(lists, made.steps, hyperparameters({}))
    torch.cuda.synchronize()
    assert len(cuda._tables) == 2


@hardware
def test_a_tensor_of_more_than_two_to_the_31_elements():
    n = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 20 * n:
        pytest.skip("needs 43 GB of free device memory")
    w, g = torch.ones(n, dtype=bf16, device="cuda"), torch.ones(n, dtype=bf16, device="cuda")
    m = torch.zeros(n, dtype=f32, device="cuda")
    v, s = torch.zeros(n, dtype=bf16, device="cuda"), torch.zeros(n, dtype=bf16, device="cuda")
    hyper = hyperparameters({"mask": "none", "lr": 0.5, "weight_decay": 0.0})
    cuda.step(Lists([w], [g], [m], [v], [s], [], []), [torch.tensor(0.0)], hyper)
    assert bool(((w - 0.5).abs_() < 0.05).all())
