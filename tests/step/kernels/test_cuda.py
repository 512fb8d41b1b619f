"""The Triton step in Triton's interpreter on the CPU.

The interpreter must be chosen before Triton is imported, and it changes Triton for the whole process; so the tests
marked `interpreted` are run by `test_in_the_interpreter`, in a process of their own.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference
from step.kernels.triton_problems import (
    INTERPRETED,
    SHAPES,
    TYPES,
    Problem,
    assert_agree,
    bf16,
    both,
    boundary_step,
    f16,
    f32,
    f64,
    gradients,
    hyperparameters,
    interpreted,
    needs_triton,
    single,
    to_start,
)
from strategies import made_up_variances, options, problems

from popriskmin.mask import MASKS
from popriskmin.step.coded import coded_prm
from popriskmin.step.codes import shape_of_codes
from popriskmin.step.kernels import cpu, cuda
from popriskmin.step.kernels.eligible import fits_as_usual
from popriskmin.step.lists import Lists, compute_dtype

HERE = Path(__file__)


@pytest.fixture(autouse=INTERPRETED)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(cuda, "BLOCK", 64)
    monkeypatch.setattr(cuda, "CHUNK", 2)


@interpreted
@settings(max_examples=12)  # each takes half a second in the interpreter
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
@settings(max_examples=8)
@given(drawn=options(), problem=problems, tensor_steps=st.booleans())
def test_agrees_with_the_float64_reference(drawn, problem, tensor_steps):
    shapes = [(70,), (3, 5)]
    grads = gradients({**problem, "steps": min(problem["steps"], 3)}, shapes)
    given = f64 if drawn["variance"] == "given" else None
    ours = Problem(shapes, (f64,) * 4, drawn["amsgrad"], given=given, to_start=to_start(drawn))
    rng = np.random.default_rng(1)
    expected = Reference([rng.normal(size=shape) for shape in shapes], **drawn)
    if ours.starts:
        expected.start = [guarded.tensor.numpy() for guarded in ours.starts]
    for g in grads:
        cuda.step(ours.lists(g), ours.steps, hyperparameters(drawn), tensor_steps=tensor_steps)
        expected.step(g, made_up_variances(g))
    for i, column in enumerate((expected.w, expected.m, expected.v, expected.s)):
        for a, b in zip(ours.results()[i], column):
            np.testing.assert_allclose(a.numpy(), b, rtol=0, atol=1e-10 * (1 + np.abs(b).max()))


@interpreted
@pytest.mark.parametrize(
    ("types", "tensor_steps"),
    [(types, i % 2 == 0) for i, types in enumerate([*(t for t in TYPES if t[3] == bf16), (f64, f64, f64, bf16)])],
)
def test_bfloat16_state_is_the_same_to_the_last_bit(types, tensor_steps):
    """`v` and `s` are sums of two products: where `m` is the same, nothing but the random bits could differ."""
    shapes = [(70,), (16, 2)]
    grads = gradients({"seed": 3, "scale": 1.0, "steps": 2}, shapes)
    for drawn in ({"betas": (0.9, 0.999), "amsgrad": True}, {"betas": (0.0, 0.5), "rho": 0.5}):
        ours, theirs = both(drawn, grads, types, shapes, tensor_steps=tensor_steps, transposed=True)
        for mine, other in zip(ours[2:], theirs[2:]):
            assert all(torch.equal(a, b) for a, b in zip(mine, other))
        # They were rounded, and not all to nearest.
        exact, _ = both(drawn, grads, (*types[:3], f64), shapes, tensor_steps=tensor_steps, transposed=True)
        up = torch.cat([(a.double() > b.to(bf16).double()).flatten() for a, b in zip(ours[2], exact[2])])
        assert 0 < up.double().mean() < 1


@interpreted
@pytest.mark.parametrize("dtype", [f16, bf16])
@pytest.mark.parametrize(("tensor_steps", "counter"), [(False, f32), (True, f32), (False, f64), (True, f64)])
def test_parameters_are_rounded_at_random_to_the_last_bit(dtype, tensor_steps, counter):
    """Over numbers of every size, subnormal ones too, before and behind 2**24: without a step only the bits differ."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(70, generator=generator) * 2.0 ** torch.randint(-26, 3, (70,), generator=generator)).numpy()
    start = [2**24 if counter == f64 else 7]
    drawn = {"lr": 0.5, "weight_decay": 2.0**-8, "stochastic_rounding": True, "mask": "none"}
    made = [Problem([(70,)], (dtype, f32, f32, f32), False, start=start) for _ in range(2)]
    for problem in made:
        problem.columns[0][0].tensor.copy_(torch.as_tensor(values))
        problem.steps = [step.to(counter) for step in problem.steps]
    # Weights decay, and that rounds them.
    results = []
    for _ in range(3):
        cuda.step(made[0].lists([np.zeros(70)]), made[0].steps, hyperparameters(drawn), tensor_steps=tensor_steps)
        single(made[1], [np.zeros(70)], drawn, tensor_steps)
        ours, theirs = (problem.results()[0][0] for problem in made)
        assert torch.equal(ours, theirs)
        results.append(ours)
    assert made[0].steps[0].item() == made[1].steps[0].item() == start[0] + 3
    nearest = torch.as_tensor(values).to(dtype)
    assert not torch.equal(results[0], (nearest.float() * (1 - 2.0**-9)).to(dtype))


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
@pytest.mark.parametrize(
    ("mask", "reduction"),
    [*((mask, "per_param") for mask in MASKS), ("snr", "per_tensor"), ("hard", "per_tensor")],
)
def test_nan_and_infinity_pass_as_in_the_single_tensor_form(mask, reduction):
    good = np.linspace(-1, 1, 8)
    for debias, beta1, bad_first, tensor_steps in [
        (False, 0.9, False, True), (True, 0.9, True, False), (True, 0.9, False, True), (False, 0.4, True, False),
    ]:  # fmt: skip
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
    cuda.step(made.lists(grads), made.steps, hyperparameters({"debias": True}), tensor_steps=tensor_steps)
    assert torch.equal(made.results()[3][0], torch.zeros(3))


@interpreted
@pytest.mark.parametrize("mask", ["soft", "hard"])
@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
def test_masks_are_shut_on_the_boundary(mask, reduction):
    before, after = boundary_step(mask, reduction=reduction, n=100)
    assert torch.equal(before, after)


SHRINKING = {"lr": 0.1, "shrinkage": 2.5, "batch_size": 8, "n_dataset": 40, "weight_decay": 0.0, "warmup_steps": 1}


@interpreted
@pytest.mark.parametrize(
    ("types", "options", "tensor_steps"),
    [
        (TYPES[0], {}, False),
        (TYPES[5], {"mask": "none"}, True),
        (TYPES[5], {"reduction": "per_tensor"}, False),
        (TYPES[0], {"mask": "soft"}, True),
    ],
)
def test_weights_come_to_lie_exactly_where_the_loop_leaves_them(types, options, tensor_steps):
    shapes = [(33, 2), (65,)]
    grads = gradients({"seed": 2, "scale": 1.0, "steps": 4}, shapes)
    for shrink_to in ("zero", "start"):
        drawn = {**SHRINKING, **options, "shrink_to": shrink_to}
        ours, theirs = both(drawn, grads, types, shapes, tensor_steps=tensor_steps, offset=3, transposed=True)
        assert_agree(ours, theirs, types, drawn, 4)
        starts = Problem(shapes, types, False, to_start=to_start(drawn), transposed=True).lists(grads[0]).starts
        matrix, vector = (w == (starts[i] if starts else 0) for i, w in enumerate(ours[0]))
        assert 0 < matrix.double().mean() < 1
        assert vector.double().mean() < 0.1  # some by chance, in 16 bits
        of_loop = theirs[0][0] == (starts[0] if starts else 0)
        assert (matrix != of_loop).double().mean() <= (0.05 if f32 in types[:1] else 0.1)


@interpreted
@pytest.mark.parametrize("tensor_steps", [False, True])
@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
def test_the_pull_lets_nan_and_infinity_pass_as_the_loop_does(tensor_steps, reduction):
    good = np.linspace(-1, 1, 8).reshape(2, 4)
    grads = [[g] for g in (good, BAD.reshape(2, 4), good)]
    for shrink_to in ("zero", "start"):
        drawn = {**SHRINKING, "shrink_to": shrink_to, "reduction": reduction}
        ours, theirs = both(drawn, grads, (f32,) * 4, [(2, 4)], tensor_steps=tensor_steps)
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine[0], other[0], rtol=1e-4, atol=1e-7, equal_nan=True)


def coded_step(take, dtype, drawn, steps=3):
    """Take steps with 8-bit state and return the parameters, the codes and the maxima."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 128), (200,))]
    codes = [torch.zeros(shape_of_codes(p.shape, False), dtype=torch.uint8) for p in params]
    wide = [compute_dtype(p) for p in params]
    maxima = [torch.zeros_like(p, dtype=w) for p, w in zip(params, wide)] if drawn.get("amsgrad") else []
    starts = [p.clone() for p in params] if to_start(drawn) else []
    counts = [torch.tensor(0.0) for _ in params]
    for number in range(steps):
        noise = [torch.randn(p.shape, generator=generator) for p in params]
        grads = [(x * torch.exp2(3 * torch.randn(x.shape, generator=generator))).to(dtype) for x in noise]
        for g in grads:
            g.view(-1)[::5] = 0
            g.view(-1)[3 + number :: 131] = (torch.nan, torch.inf, 1e30)[number % 3]
        variances = [g.square() for g in grads] if drawn.get("variance") == "given" else []
        take(Lists(params, grads, codes, codes, codes, maxima, variances, starts), counts, hyperparameters(drawn))
    return params, codes, maxima


@interpreted
@pytest.mark.parametrize(
    ("dtype", "drawn", "tensor_steps"),
    [
        (f32, {}, False),
        (f64, {"mask": "soft", "debias": True, "amsgrad": True}, True),
        (bf16, {"variance": "given", "stochastic_rounding": True, "maximize": True}, False),
        (f32, {**SHRINKING, "shrink_to": "start", "mask": "threshold"}, True),
    ],
)
def test_8_bit_state_has_the_codes_of_foreach(dtype, drawn, tensor_steps, monkeypatch):
    monkeypatch.setattr(cuda, "BLOCK", 256)
    ours = coded_step(functools.partial(cuda.step, tensor_steps=tensor_steps), dtype, drawn)
    theirs = coded_step(functools.partial(coded_prm, tensor_steps=tensor_steps), dtype, drawn)
    for one, two in zip(ours[1], theirs[1]):
        # A unit in the last place of a moment may decide a rounding.
        assert (one != two).double().mean() < 2e-3
        assert torch.equal(one[..., -4:], two[..., -4:])
    for one, two in zip(ours[0] + ours[2], theirs[0] + theirs[2]):
        close = torch.isclose(one, two, rtol=1e-2 if dtype == bf16 else 1e-5, atol=1e-5, equal_nan=True)
        assert close.double().mean() > 0.99


@interpreted
@pytest.mark.parametrize("drawn", [{"mask": "soft"}, {**SHRINKING, "amsgrad": True, "warmup_steps": 0}])
def test_pooled_masks_of_8_bit_state(drawn, monkeypatch):
    monkeypatch.setattr(cuda, "BLOCK", 256)
    steps = cuda.step, functools.partial(coded_prm, tensor_steps=False)
    ours, theirs = (coded_step(step, f32, {**drawn, "reduction": "per_tensor"}, 1) for step in steps)
    for mine, other in zip(ours, theirs):
        for one, two in zip(mine, other):
            torch.testing.assert_close(one, two, equal_nan=True)


def launches(lists, steps, hyper, tensor_steps=False):
    return [x.places.tensors for x in cuda._launches(lists, steps, hyper, None, tensor_steps, None)]


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
        cuda.step(
            Lists([w], [torch.ones(3)], *[[x] for x in state], [], [], []), [torch.tensor(0.0)], hyperparameters({})
        )
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


@pytest.mark.parametrize("library", [True, False])
def test_counters_on_the_host_with_and_without_the_cpu_kernel(library, monkeypatch):
    if not library:
        monkeypatch.setattr(cpu, "_load", lambda: "not built")
    made = Problem([(3, 5), (4,)], (f32,) * 4, False, start=[4.0, 4.0])
    lists = made.lists([np.zeros((3, 5)), np.zeros(4)])
    state = fits_as_usual(lists, made.steps, None)
    assert cuda._count_up(made.steps, state) == 5.0
    made.steps[1] += 2
    assert cuda._count_up(made.steps, state) is None
    assert cuda._count_up(made.steps, None) is None
    assert [step.item() for step in made.steps] == [7.0, 9.0]


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
