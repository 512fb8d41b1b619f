"""The fused step on CUDA devices, in Triton: one launch for a whole parameter group.

The kernel reads p, g, m, v and s once and writes p, m, v and s once: 9 numbers a parameter, where AdamW moves 7. That
is 36 bytes in float32, and 28 with `v` and `s` in bfloat16, AdamW's own traffic. `amsgrad` adds 2 numbers, variances
that are given 1, and shrinkage to the first weights 1; to zero, none.
`reduction="per_tensor"` needs the means over a tensor before its parameters can move: a launch that brings the moments
to this step and leaves two sums for each block (7 numbers), a small one that makes `q` of the sums, and one that moves
the parameters (4 numbers), 44 bytes in float32. The sums are added in a fixed order, so a step is deterministic.

Tensors of equal types and step counts go into one launch; it finds them through a table of addresses on the device.
Nothing is read back to the host. Triton is imported only when it is asked for, by `unusable` or `step`.
"""

from __future__ import annotations

import functools
import math
import shutil
from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from os import environ
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from popriskmin.mask import Corrections, Hyperparameters, corrections, floor, largest, loading, mask_name
from popriskmin.step.compat import bump_versions
from popriskmin.step.kernels import cpu
from popriskmin.step.kernels.cuda_table import COLUMNS, Places, Tables, tables_of
from popriskmin.step.kernels.eligible import KernelMemory, State, origins, packed
from popriskmin.step.lists import Lists, count_up
from popriskmin.step.rounding import rounds_parameter

# Elements of one program: eight for each of its 128 threads, so that many loads are under way at once.
BLOCK = 1024
# Of 32 threads each.
WARPS = 4
# Sums that one program of the second launch adds at a time.
CHUNK = 4096


def _step_module() -> ModuleType:
    return import_module("popriskmin.step.kernels.cuda_step")


@functools.lru_cache(maxsize=1)
def unusable() -> str | None:
    """Return in words why this kernel cannot be used here, None if it can.

    Where there is a device, it initializes CUDA and, the first time, compiles and launches a small kernel. In Triton's
    interpreter (`TRITON_INTERPRET=1`) tensors on the CPU are accepted, slowly: it serves tests.
    """
    try:
        triton = import_module("triton")
        if int(triton.__version__.split(".")[0]) < 3:
            return f"Triton {triton.__version__} is too old, version 3.0 is needed"
        interpreted = _is_interpreted()
    except Exception as error:  # a broken installation raises whatever it likes
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    if interpreted:
        return None
    if torch.version.hip is not None:
        return "this torch is built for ROCm, on which the kernel has not been tried"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())) < (7, 0):
        return "Triton needs CUDA devices of compute capability 7.0 or newer"
    if not (environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cl")):
        return "Triton needs a C compiler to launch kernels, and found none"
    return _failure_of_a_trial()


def _failure_of_a_trial() -> str | None:
    """Compile and launch a small kernel, which wants a C compiler with Python's headers; return what goes wrong."""
    try:
        _step_module().trial[(1,)](torch.empty(1, device="cuda"))
    except Exception as error:  # whatever compilers and drivers come up with
        return f"Triton cannot compile or launch a kernel here ({type(error).__name__}: {error})"
    return None


def _is_interpreted() -> bool:
    """Return whether Triton was told to interpret kernels when the module that holds them was imported."""
    return type(_step_module().update).__name__ == "InterpretedFunction"


def step(
    lists: Lists,
    state_steps: list[Tensor],
    hyper: Hyperparameters,
    state: State | None = None,
    tensor_steps: bool = False,
) -> None:
    """Take one step of a parameter group, in place.

    Parameters
    ----------
    lists
        Tensors on one CUDA device, none of them complex; those of one parameter have one shape and the
        same dense strides. Parameters and gradients of floating types up to 64 bits, `m` float32 or float64, the
        others float32, float64 or bfloat16; or `m`, `v` and `s` in one tensor of 8-bit blocks.
    state_steps
        Tensors of shape `()`, float32 or float64, each increased by 1. Where they lie on the device they are read
        there, by the kernel, and so is a learning rate that does; else on the host.
    state
        The addresses of parameters and state, where they are known already: then the tensors of one list are of one
        type, and the step counts all on the host or all on the device. The tables are kept with it.
    tensor_steps
        In Triton's interpreter, where everything lies on the CPU: take the CPU for the device. No effect elsewhere.
    """
    if not lists.params:
        return
    device = lists.params[0].device
    memory = {} if state is None else state.memory
    count = _count_up(state_steps, None if tensor_steps else state)
    # A device that is not the current one must become it: Triton launches on the current one.
    with _on(device):
        for launch in _launches(lists, state_steps, hyper, state, tensor_steps, count):
            launch.run(device, memory)
    bump_versions(lists.params)


def _count_up(state_steps: list[Tensor], state: State | None) -> float | None:
    """Add 1 to the counters. Return their count where all lie on the host and have the same."""
    if state is None or not state_steps[0].is_cpu:
        count_up(state_steps)
        return None
    count = cpu.count_up(state.addresses[-1], state_steps[0].dtype)
    if count is None:
        count_up(state_steps)
        counts = set(map(Tensor.item, state_steps))
        count = counts.pop() if len(counts) == 1 else math.nan
    return None if math.isnan(count) else count


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Types(NamedTuple):
    """The types of one parameter's tensors.

    Where there is no maximum, no given variance or no first weights, that of `v`, `g` or `p`.
    """

    param: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    exp_avg_var: torch.dtype
    max_exp_avg_sq: torch.dtype
    grad_var: torch.dtype
    start: torch.dtype
    step: torch.dtype

    def decoded(self) -> list[torch.dtype]:
        """Return the types with that of what 8-bit blocks hold in the place of theirs."""
        return [torch.float32 if dtype == torch.uint8 else dtype for dtype in self]

    @property
    def wide(self) -> torch.dtype:
        """The type to calculate in, as in the other implementations."""
        return torch.float64 if torch.float64 in (self.param, self.exp_avg) else torch.float32


class _Launch(NamedTuple):
    """Tensors of equal types and step counts, and what their kernels are told."""

    places: Places
    gradients: bytes
    types: _Types
    t: float | None  # None where the kernel reads it
    lr: Tensor | None  # None where it is a number in `hyper`
    hyper: Hyperparameters

    def run(self, device: torch.device, memory: KernelMemory) -> None:
        """Launch the kernels that step these tensors."""
        known = None if self.t is None else corrections(self.t, self.hyper)
        # What is known to be open on the host needs no mask, and no means either.
        mask = "none" if known is not None and known.open is True else mask_name(self.hyper.mask)
        bits = _bits(_numbers(known, self.hyper, self.types.wide), self.types.wide)
        bits["count"] = _low_word(self.t or 0)
        tables = tables_of(self.places, self.gradients, BLOCK, device, self.t is None, memory)
        if tables.blocks == 0:
            return
        if self.hyper.reduction == "per_param" or mask == "none":
            self._update("all", mask, bits, tables, tables.rows)
            return
        partials = torch.empty(2 * tables.blocks, dtype=self.types.wide, device=device)
        self._update("advance", mask, bits, tables, partials)
        self._pool(mask, bits, tables, partials)
        self._update("move", mask, bits, tables, partials)

    def _update(self, phase: str, mask: str, bits: dict[str, int], tables: Tables, partials: Tensor) -> None:
        kernels = _step_module()
        lr = tables.rows if self.lr is None else self.lr
        kernels.update[(tables.blocks,)](
            tables.rows,
            tables.gradients,
            partials,
            lr,
            self.places.tensors,
            **bits,
            **self._options(kernels),
            PHASE=phase,
            MASK=mask,
        )

    def _pool(self, mask: str, bits: dict[str, int], tables: Tables, partials: Tensor) -> None:
        kernels = _step_module()
        options = self._options(kernels)
        given = ("mask_eps", "min_q", "bound", "softness", "coefficient", "k", "log1", "ratio", "open_until")
        kernels.pool[(self.places.tensors,)](
            tables.rows,
            partials,
            tables.blocks,
            **{name: bits[name] for name in given},
            **{name: options[name] for name in ("T", "C", "DEBIAS", "TENSOR_STEPS", "COLUMNS", "BLOCK")},
            MASK=mask,
            CHUNK=CHUNK,
            num_warps=8,
            enable_fp_fusion=False,
        )

    def _options(self, kernels: ModuleType) -> dict[str, int | str]:
        """Return what the kernel is compiled for."""
        hyper = self.hyper
        decays = hyper.weight_decay != 0
        return {
            **{name: kernels.TYPES[dtype] for name, dtype in zip("PGMVSXZWT", self.types.decoded())},
            "C": kernels.TYPES[self.types.wide],
            "AMSGRAD": hyper.amsgrad,
            "COUPLED": decays and not hyper.decoupled_weight_decay,
            "DECOUPLED": decays and hyper.decoupled_weight_decay,
            "MAXIMIZE": hyper.maximize,
            "BIAS": hyper.bias_correction,
            "DEBIAS": hyper.unbiased,
            "GIVEN": hyper.given,
            "MASK_DECAY": hyper.mask_decay,
            "SHRINK": "none" if self.t == 1 or not hyper.shrinkage else hyper.shrink_to,
            "FROM_END": 1 - hyper.beta1 >= 0.5,
            "ROUND": rounds_parameter(hyper.stochastic_rounding, self.types.param),
            "TENSOR_STEPS": self.t is None,
            "TENSOR_LR": self.lr is not None,
            "CODED": self.types.exp_avg == torch.uint8,
            "COLUMNS": COLUMNS,
            "BLOCK": BLOCK,
            "num_warps": WARPS,
            "enable_fp_fusion": False,  # see the module of the kernels
        }


def _launches(
    lists: Lists,
    state_steps: list[Tensor],
    hyper: Hyperparameters,
    state: State | None,
    tensor_steps: bool,
    count: float | None,
) -> Iterator[_Launch]:
    """Group the tensors by types and step counts. `count` is that of all, where it was found to be one."""
    device = lists.params[0].device
    # Whether a number on the CPU is one that the kernel reads.
    read_there = tensor_steps and device.type == "cpu"
    lr = None
    if isinstance(hyper.lr, Tensor):
        lr = hyper.lr.to(device) if read_there or not hyper.lr.is_cpu else None
        hyper = hyper._replace(lr=hyper.lr.item() if lr is None else 0.0)
    to_start = bool(lists.starts)
    # What the kernel does not read is of some type all the same.
    lists = lists._replace(
        max_exp_avg_sqs=lists.max_exp_avg_sqs or lists.exp_avg_sqs,
        grad_vars=lists.grad_vars or lists.grads,
        starts=lists.starts or lists.params,
    )
    if state is not None and (count is not None or read_there or not state_steps[0].is_cpu):
        params, exp_avgs, exp_avg_sqs, exp_avg_vars, maxima, _, steps = state.addresses
        held = [params, exp_avgs, exp_avg_sqs, exp_avg_vars, maxima or exp_avg_sqs, steps]
        places = Places._make([state.sizes, *held, state.origins])
        types = _Types(*(tensors[0].dtype for tensors in (*lists, state_steps) if tensors))
        yield _Launch(places, _gradients(lists, hyper), types, count, lr, hyper)
        return
    groups: dict[Any, list[int]] = {}
    for i, tensors in enumerate(zip(*filter(None, lists), state_steps)):
        t = None if read_there or not state_steps[i].is_cpu else state_steps[i].item()
        groups.setdefault((t, *[tensor.dtype for tensor in tensors]), []).append(i)
    for (t, *dtypes), indices in groups.items():
        some = lists.of(indices)
        sizes = packed(map(Tensor.numel, some.params), len(indices))
        held = [_addresses(tensors) for tensors in (*some.written, [state_steps[i] for i in indices])]
        pulled_to = origins(some if to_start else some._replace(starts=[]))
        places = Places._make([sizes, *held, pulled_to])
        yield _Launch(places, _gradients(some, hyper), _Types(*dtypes), t, lr, hyper)


def _gradients(lists: Lists, hyper: Hyperparameters) -> bytes:
    """Return the addresses of the gradients, and of their variances where they are given."""
    return _addresses(lists.grads) + (_addresses(lists.grad_vars) if hyper.given else b"")


def _addresses(tensors: list[Tensor]) -> bytes:
    return packed(map(Tensor.data_ptr, tensors), len(tensors))


def _numbers(known: Corrections | None, hyper: Hyperparameters, dtype: torch.dtype) -> dict[str, float]:
    """Return the numbers that the kernel is given; calculated in float64, whatever it calculates in.

    Without `known` corrections, those of some step: the kernel does not read them where it reads the step count.
    """
    known = corrections(2.0, hyper) if known is None else known
    factor = loading(hyper.shrinkage, hyper.mean_coefficient)
    return {
        "t": float(known.t),
        "lr": float(hyper.lr),
        "weight_decay": hyper.weight_decay,
        "weight1": 1 - hyper.beta1,
        "beta2": hyper.beta2,
        "weight2": 1 - hyper.beta2,
        "rho": hyper.rho,
        "eps": hyper.eps,
        "mask_eps": floor(hyper.mask_eps, dtype),
        "min_q": hyper.min_q,
        "bound": largest(dtype),
        "softness": hyper.softness * (hyper.coefficient if hyper.mask in ("snr", "threshold") else 1),
        "coefficient": hyper.coefficient,
        "loading": factor,
        "loading_sq": factor * factor,
        "over_bias1": 1 / float(known.bias1),
        "over_root2": float(known.bias2) ** -0.5,
        "over_bias_var": 1 / float(known.bias_var),
        "over_centre": 1 / float(known.centre),
        "blend": float(known.blend),
        "k": float(known.k),
        "log1": _log(hyper.beta1),
        "log2": _log(hyper.beta2),
        "log_rho": _log(hyper.rho),
        "ratio": (1 - hyper.beta1) / (1 + hyper.beta1),
        "weight_rho": 1 - hyper.rho,
        "open_until": max(hyper.warmup_steps, 1 if hyper.unbiased and not hyper.given else 0),
    }


def _low_word(count: float) -> int:
    """Return the low 32 bits of a count, as a signed integer."""
    return (int(count) + 2**31) % 2**32 - 2**31


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _bits(numbers: dict[str, float], dtype: torch.dtype) -> dict[str, int]:
    """Return the numbers as integers that hold their bits in `dtype`, rounded to it, which can be to infinity."""
    real, whole = ("d", "q") if dtype == torch.float64 else ("f", "i")
    return dict(zip(numbers, array(whole, array(real, numbers.values()).tobytes())))
