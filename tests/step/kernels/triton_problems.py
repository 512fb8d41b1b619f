"""Problems for the Triton step, in guarded memory, and their comparison with the single-tensor form."""

import os
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from strategies import made_up_variances

from popriskmin.mask import Hyperparameters, boundary_coefficient, mean_coefficient
from popriskmin.step.functional import prm
from popriskmin.step.kernels import cuda
from popriskmin.step.kernels.eligible import fits_as_usual
from popriskmin.step.lists import Lists

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = find_spec("triton") is not None and int(version("triton").split(".")[0]) >= 3

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
    "shrinkage": 0.0,
    "shrink_to": "zero",
    "stochastic_rounding": False,
}
NEEDED_BY_PRM = set(DEFAULTS) - {"betas", "variance", "shrink_to"}


def arguments(drawn):
    """Return the options as `prm` takes them."""
    drawn = {**DEFAULTS, **drawn}
    a = boundary_coefficient(drawn.get("boundary", "batch"), drawn.get("batch_size"), drawn.get("n_dataset"))
    c = mean_coefficient(drawn["batch_size"], drawn["n_dataset"], drawn["variance"]) if drawn["shrinkage"] else 0.0
    beta1, beta2 = drawn["betas"]
    numbers = {"beta1": beta1, "beta2": beta2, "coefficient": a, "mean_coefficient": c}
    return {**{name: drawn[name] for name in NEEDED_BY_PRM}, **numbers}


def hyperparameters(drawn):
    choices = {name: {**DEFAULTS, **drawn}[name] for name in ("variance", "shrink_to")}
    return Hyperparameters.of(**arguments(drawn), **choices)


def to_start(drawn):
    """Return whether weights are pulled to the first ones."""
    return bool(drawn.get("shrinkage")) and drawn.get("shrink_to") == "start"


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
                 given=None, to_start=False):  # fmt: skip
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
        # A start near the weights, so that some come to lie there.
        starts = [value + 0.01 * rng.normal(size=value.shape) for value in values] if to_start else []
        self.starts = [Guarded(self._in_memory(value), p, offset, device) for value in starts]
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
        starts = [self._seen(guarded.tensor) for guarded in self.starts]
        return Lists(p, [self._seen(g.tensor) for g in self.grads], *state, maxima, variances, starts)

    def check_memory(self, grads):
        for column in [*self.columns, self.grads, self.variances, self.starts]:
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
    *lists, variances, starts = made.lists(grads)
    given = {"grad_vars": variances or None, "starts": starts or None}
    prm(*lists, made.steps, foreach=False, capturable=capturable, **given, **arguments(drawn))


def both(drawn, all_grads, types, shapes=SHAPES, tensor_steps=False, tensor_lr=None, device="cpu", start=None,
         given=f32, **how):  # fmt: skip
    """Take the steps with the kernel and with the single-tensor form; return the results of both."""
    amsgrad = {**DEFAULTS, **drawn}["amsgrad"]
    how |= {"device": device, "steps_on": device if tensor_steps else "cpu", "start": start}
    how["given"] = given if {**DEFAULTS, **drawn}["variance"] == "given" else None
    how["to_start"] = to_start(drawn)
    made = [Problem(shapes, types, amsgrad, **how) for _ in range(2)]
    if tensor_lr is not None:
        lr = torch.tensor({**DEFAULTS, **drawn}["lr"], dtype=tensor_lr, device=how["steps_on"])
        drawn = {**drawn, "lr": lr}
    ours, theirs = made
    for i, grads in enumerate(all_grads):
        lists = ours.lists(grads)
        # In turns with what is known beforehand of tensors that lie as usual, and without.
        state = fits_as_usual(lists, ours.steps, None) if i % 2 == 0 else None
        cuda.step(lists, ours.steps, hyperparameters(drawn), state, tensor_steps=tensor_steps)
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
    hyper = hyperparameters(drawn)
    pulled = hyper.shrinkage * hyper.mean_coefficient**0.5
    coupled = 0.0 if {**DEFAULTS, **drawn}["decoupled_weight_decay"] else {**DEFAULTS, **drawn}["weight_decay"]
    for name, mine, other in zip(NAMES, ours, theirs):
        for a, b, w in zip(mine, other, theirs[0]):
            assert a.dtype == b.dtype
            unit = max(torch.finfo(a.dtype).eps * UNITS[a.dtype], torch.finfo(wide).eps * UNITS[wide])
            size = float(b.abs().max())
            atol = unit * (largest_gradient**2 if name == "s" else size)
            if coupled and name != "p":
                # A parameter that was rounded to the neighbour passes that on to the next gradient.
                off_by = coupled * torch.finfo(w.dtype).eps * UNITS[w.dtype] * float(w.abs().max())
                atol += off_by * (1 if name == "m" else 2 * largest_gradient)
            if name == "p":
                # A step is about lr, as exact as the state is stored; without bias correction it can be much more.
                atol += share * steps * lr * ((moved or 1) + pulled)
            off = (a.double() - b.double()).abs() > atol + unit * b.double().abs()
            if hard and name == "p":
                # A number on the boundary may fall to either side, a whole tensor of numbers in a pooled mask.
                assert off.double().mean() <= 0.1 or {**DEFAULTS, **drawn}["reduction"] == "per_tensor" or wide == f32
            else:
                assert not off.any(), (name, a[off], b[off])


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
