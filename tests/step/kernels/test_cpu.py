"""The kernel in C: that it is here, and does what the loop does, on any instruction set and number of threads."""

import math
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import HOW, SANITIZED, TORCH
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import made_up_variances, options

from popriskmin import PRM
from popriskmin.step.kernels import cpu
from popriskmin.step.kernels.cpu import LEVELS
from popriskmin.step.kernels.eligible import packed

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GUARD = 64


def test_the_kernel_was_built():
    """Without this the whole suite would pass on foreach."""
    if not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")) and not os.environ.get("CI"):
        pytest.skip("there is no C compiler here, and so no kernel: PRM works on foreach")
    assert cpu.unusable() is None
    assert {"fused": True} in HOW


def guarded(values):
    """Return a tensor within a larger one, whose other elements must stay as they are."""
    whole = torch.full((values.numel() + 2 * GUARD,), 77.0, dtype=values.dtype)
    inner = whole[GUARD:-GUARD].view(values.shape)
    inner.copy_(values)
    return inner, whole


SIZES = [1, 7, 1023, 1025, 3000]


def problem(seed, dtype, grad_dtype, sizes=SIZES):
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    steps = [[(0.3 + torch.randn(n, generator=generator)).to(grad_dtype) for n in sizes] for _ in range(3)]
    return start, steps


def run(start, steps, grad_dtype, state_dtype=None, variance_dtype=torch.float32, **kwargs):
    """Take the steps with guards around everything; return weights and state."""
    held = [guarded(x) for x in start]
    params = [torch.nn.Parameter(inner) for inner, _ in held]
    optimizer = PRM(params, state_dtype=state_dtype, **kwargs)
    fences = [whole for _, whole in held]
    for number, grads in enumerate(steps):
        kept = [guarded(g) for g in grads]
        for p, (g, _) in zip(params, kept):
            if g.dtype == p.dtype:
                p.grad = g
            else:
                p.grad = g.to(p.dtype)
        if kwargs.get("variance") == "given":
            values = made_up_variances([g.double() for g in grads])
            given = [guarded(torch.tensor(z, dtype=variance_dtype)) for z in values]
            optimizer.set_variances({p: inner for p, (inner, _) in zip(params, given)})
            fences += [whole for _, whole in given]
        optimizer.step()
        if number == 0:
            for p in params:
                for name, value in optimizer.state[p].items():
                    inner, whole = guarded(value)
                    optimizer.state[p][name] = inner
                    fences.append(whole)
        for (g, whole), original in zip(kept, grads):
            assert torch.equal(g, original)
            fences.append(whole)
    for whole in fences:
        assert (whole[:GUARD] == 77).all()
        assert (whole[-GUARD:] == 77).all()
    return [p.detach() for p in params], [optimizer.state[p] for p in params]


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def level(request, monkeypatch):
    if request.param > cpu.level():
        pytest.skip(f"this processor has no {LEVELS[request.param]}")
    monkeypatch.setattr(cpu, "level", lambda: request.param)


needs_kernel = pytest.mark.skipif(cpu.unusable() is not None, reason=str(cpu.unusable()))


@needs_kernel
@settings(max_examples=20 if SANITIZED else 100)
@given(
    options=options(),
    dtype=st.sampled_from(TYPES),
    state_dtype=st.sampled_from([None, torch.float32, torch.float64, torch.bfloat16]),
    variance_dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 1000),
    threads=st.sampled_from([1, 3]),
    level=st.integers(0, 2),
)
def test_agrees_with_the_loop_and_touches_nothing_else(
    options, dtype, state_dtype, variance_dtype, seed, threads, level
):
    start, steps = problem(seed, dtype, dtype)
    options["variance_dtype"] = variance_dtype
    best = cpu.level
    cpu.level = lambda: min(level, best())
    torch.set_num_threads(threads)
    try:
        ours, state = run(start, steps, dtype, state_dtype, fused=True, **options)
    finally:
        cpu.level = best
        torch.set_num_threads(1)
    theirs, expected = run(start, steps, dtype, state_dtype, foreach=False, **options)
    narrow = dtype in (torch.bfloat16, torch.float16)
    rtol = {torch.float64: 1e-10, torch.float32: 2e-5}.get(dtype, 2e-2)
    if state_dtype == torch.bfloat16 or (dtype == torch.float64 and state_dtype == torch.float32):
        rtol = max(rtol, 1e-2)  # one step of the narrow type more or less in the state
    for a, b in zip(ours, theirs):
        close = torch.isclose(a, b, rtol=rtol, equal_nan=True, atol=(rtol if narrow else 10 * rtol) * options["lr"])
        # A scalar on the boundary of the hard mask, or of a type's rounding, may fall to either side.
        hard = options["mask"] == "hard"
        pooled = options["reduction"] == "per_tensor"
        # With beta2 = 0 a step divides by one gradient, which may be tiny: then both are off float64's by as much.
        loose = 0.98 if hard or state_dtype == torch.bfloat16 else 0.995 if options["betas"][1] == 0 else 0.9999
        assert close.double().mean() > loose or (hard and pooled)
    for a, b in zip(state, expected):
        assert a["step"] == b["step"] == len(steps)
        for name in ("exp_avg", "exp_avg_sq", "exp_avg_var"):
            assert a[name].dtype == b[name].dtype
            torch.testing.assert_close(a[name], b[name], rtol=max(rtol, 1e-5), atol=1e-6, equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("extra", [{}, {"reduction": "per_tensor"}, {"amsgrad": True, "debias": True, "mask": "soft"},
                                   {"state_dtype": torch.bfloat16}, {"maximize": True, "decoupled_weight_decay": False},
                                   {"reduction": "per_tensor", "mask_decay": True}, {"variance": "given"},
                                   {"variance": "given", "state_dtype": torch.bfloat16, "debias": True, "min_q": 0.1},
                                   {"variance": "given", "reduction": "per_tensor", "mask": "soft", "debias": True},
                                   {"variance": "given", "variance_dtype": torch.float64}])  # fmt: skip
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(extra, monkeypatch):
    # Large enough for three threads, and for a pooled tensor that is divided among them.
    sizes = [5, 400_000, 1025, 130_001]
    start, steps = problem(1, torch.float32, torch.float32, sizes)
    results = []
    best = cpu.level()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for number in range(best + 1):
            monkeypatch.setattr(cpu, "level", lambda number=number: number)
            results.append(run(start, steps, torch.float32, fused=True, **extra)[0])
    torch.set_num_threads(1)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("level")
def test_every_number_of_the_half_types_passes_unharmed(dtype):
    """With nothing to do to them, all 65,536 bit patterns come out as they went in; NaN stays NaN."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    p = torch.nn.Parameter(every.clone())
    p.grad = torch.zeros_like(p)
    PRM([p], lr=0.0, weight_decay=0.0, fused=True).step()
    numbers = ~every.isnan()
    assert torch.equal(p.detach()[numbers], every[numbers])
    assert p.detach()[~numbers].isnan().all()
    # Gradients of every value, too: the first mean is a tenth of them.
    q = torch.nn.Parameter(torch.zeros_like(every))
    q.grad = every
    optimizer = PRM([q], fused=True)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[q]["exp_avg"], every.float() * 0.1, equal_nan=True, rtol=1e-5, atol=0)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("level")
def test_rounds_to_the_nearest_as_torch_does(dtype):
    # All float32 values of a stretch of bit patterns around every rounding boundary, overflow and subnormals included.
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator).to(torch.int32)
    values = bits.view(torch.float32)
    values = torch.cat([values[values.abs() < 1e38], torch.tensor([65504.0, 65519.9, 65520.0, 6e-8, 2.9e-8, 0.0])])
    # A step of size 1 from zero, along a mean that is -1 times the value: the parameter becomes the value, rounded.
    p = torch.nn.Parameter(torch.zeros(values.shape, dtype=dtype))
    p.grad = torch.zeros_like(p)
    optimizer = PRM([p], lr=1.0, betas=(0.5, 0.0), eps=1.0, weight_decay=0.0, mask="none", bias_correction=False,
                    fused=True)  # fmt: skip
    optimizer.step()
    optimizer.state[p]["exp_avg"].copy_(-2 * values)
    optimizer.step()
    expected = (-(-2 * values * 0.5)).to(dtype)
    assert torch.equal(p.detach(), expected)


@needs_kernel
def test_memory_of_a_step_is_small():
    """Below 1 MiB for 400 tensors of 40,000 scalars; the kernel's own tables are some bytes for each tensor."""
    code = """
import resource, torch
from popriskmin import PRM
params = [torch.nn.Parameter(torch.zeros(40_000)) for _ in range(400)]
for p in params:
    p.grad = torch.ones_like(p)
optimizer = PRM(params, fused=True, reduction="per_tensor")
for _ in range(3):
    optimizer.step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(5):
    optimizer.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1024  # kilobytes


@needs_kernel
def test_autograd_notices_the_change():
    w = torch.nn.Parameter(torch.ones(3))
    loss = (w * w).sum()
    w.grad = torch.ones(3)
    version = w._version
    PRM([w], fused=True).step()
    assert w._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_kernel
def test_other_threads_go_on_during_a_step():
    """The interpreter's lock is released: another thread counts while a long step is taken."""
    p = torch.nn.Parameter(torch.zeros(20_000_000))
    p.grad = torch.ones_like(p)
    optimizer = PRM([p], fused=True)
    optimizer.step()
    counted, done = 0, threading.Event()

    def count():
        nonlocal counted
        while not done.is_set():
            counted += 1
            time.sleep(0)

    other = threading.Thread(target=count)
    other.start()
    try:
        started = counted
        for _ in range(5):
            optimizer.step()
        assert counted > started + 5
    finally:
        done.set()
        other.join()


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_works_after_a_fork_and_in_a_worker_of_a_data_loader():
    code = """
import os, torch
from popriskmin import PRM
# Torch's own threads do not survive a fork; only the kernel shall have some.
torch.set_num_threads(1)
torch.get_num_threads = lambda: 2

def train():
    p = torch.nn.Parameter(torch.zeros(400_000))
    p.grad = torch.ones_like(p)
    optimizer = PRM([p], fused=True)
    for _ in range(2):
        optimizer.step()
    return p.detach()

here = train()

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return train()[:5]

loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork")
for batch in loader:
    assert torch.equal(batch[0], here[:5])
pid = os.fork()
if pid == 0:
    os._exit(0 if torch.equal(train(), here) else 1)
assert os.waitpid(pid, 0)[1] == 0
assert torch.equal(train(), here)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counters_on_the_host_are_counted_at_once(dtype):
    steps = [torch.tensor(4.0, dtype=dtype) for _ in range(5)]
    addresses = packed([step.data_ptr() for step in steps], len(steps))
    assert cpu.count_up(addresses, dtype) == 5.0
    assert {step.item() for step in steps} == {5.0}
    steps[3] += 1
    assert math.isnan(cpu.count_up(addresses, dtype))
    assert [step.item() for step in steps] == [6, 6, 6, 7, 6]
    assert math.isnan(cpu.count_up(b"", dtype))


@needs_kernel
def test_a_library_that_is_missing_or_broken_is_said_to_be(tmp_path, monkeypatch):
    (tmp_path / "broken.so").write_bytes(b"not a library")
    for name, said in (("none.so", f"no kernel for the CPU in {tmp_path}"), ("broken.so", "cannot be loaded")):
        monkeypatch.setenv("POPRISKMIN_CPU_KERNEL", str(tmp_path / name))
        cpu._load.cache_clear()
        try:
            assert said in cpu.unusable()
            p = torch.nn.Parameter(torch.ones(2))
            p.grad = torch.ones(2)
            with pytest.warns(UserWarning, match=f"without its fused step.*{said}"):
                PRM([p]).step()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                PRM([p]).step()
            assert (p < 1).all()
            with pytest.raises(RuntimeError, match=said):
                PRM([p], fused=True)
        finally:
            cpu._load.cache_clear()


@needs_kernel
@pytest.mark.parametrize("options", [{}, {"reduction": "per_tensor", "mask": "soft"}, {"variance": "given"}])
def test_asking_memory_ahead_changes_no_bits(options):
    start, steps = problem(3, torch.float32, torch.float32, sizes=[1, 127, 129, 3000, 100_000])
    results = []
    try:
        for whether in (True, False):
            assert cpu.ask_ahead(whether) is whether
            results.append(run(start, steps, torch.float32, fused=True, **options)[0])
    finally:
        cpu.ask_ahead()
    assert all(torch.equal(a, b) for a, b in zip(*results))


@needs_kernel
def test_memory_is_asked_ahead_on_intel_alone():
    """Zen 4 chokes on it; what was not tried does without."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip("the system does not name its processor here")
    assert cpu.ask_ahead() is ("GenuineIntel" in info.read_text())


@needs_kernel
@pytest.mark.skipif(TORCH < (2, 3), reason="GradScaler for the CPU is new in torch 2.3")
def test_grad_scaler_unscales_before_a_fused_step():
    weights = []
    for scale in (None, 1024.0):
        w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = PRM([w], lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for factor in (1.0, float("inf"), 3.0):
            if factor == float("inf") and not scale:
                continue  # the step that the scaler skips
            optimizer.zero_grad()
            scaler.scale((w * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(w.detach())
    torch.testing.assert_close(*weights)
