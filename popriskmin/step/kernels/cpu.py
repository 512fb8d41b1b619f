"""The fused step on the CPU: `cpu.c`, loaded with ctypes, which releases the interpreter's lock for the call.

The library is built when the package is installed. It knows neither Python nor torch and gets plain addresses, so one
build serves every version of both; every tensor is checked before its address is handed over.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from popriskmin.mask import Hyperparameters, mask_name
from popriskmin.step.compat import bump_versions
from popriskmin.step.kernels.eligible import State, origins, packed
from popriskmin.step.lists import Lists

# As in cpu.c.
ABI = 11
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}
MASK_CODES = {"none": 0, "snr": 1, "soft": 2, "hard": 3, "threshold": 4}
LEVELS = ("baseline", "AVX2", "AVX-512")

NAME = "_cpu.dll" if sys.platform == "win32" else "_cpu.so"


class _Options(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in (
            "lr", "beta1", "beta2", "rho", "eps", "mask_eps", "weight_decay", "softness", "coefficient",
            "min_q", "shrinkage", "mean_coefficient",
        )),
        ("warmup_steps", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in (
            "mask", "pooled", "bias_correction", "decoupled_weight_decay", "maximize", "debias",
            "mask_decay", "variance_given", "stochastic_rounding",
        )),
    ]  # fmt: skip


def path() -> Path:
    """Return where the library is: beside this file, or where POPRISKMIN_CPU_KERNEL says (another build of it)."""
    return Path(os.environ.get("POPRISKMIN_CPU_KERNEL") or Path(__file__).with_name(NAME))


@functools.lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | str:
    """Return the library, or why it cannot be used."""
    file = path()
    if not file.exists():
        return (
            f"there is no kernel for the CPU in {file.parent}, the popriskmin that is imported: it was not built when "
            "that was installed, which needs a C compiler (gcc or clang); install one, then reinstall popriskmin. If "
            "another, installed popriskmin is meant, run from another folder than its sources"
        )
    try:
        library = ctypes.CDLL(str(file))
        abi = library.prm_abi()
    except (OSError, AttributeError) as error:
        return f"the kernel for the CPU cannot be loaded: {error}; reinstall popriskmin"
    if abi != ABI:
        return f"the kernel for the CPU is of another version ({abi}, not {ABI}): reinstall popriskmin"
    library.prm_ask_ahead(-1)
    library.prm_use_pool.argtypes = [ctypes.c_void_p]
    if hasattr(os, "register_at_fork"):
        # A forked child has none of its parent's threads.
        library.prm_use_pool(_threads_of_torch())
        os.register_at_fork(after_in_child=lambda: library.prm_use_pool(None))
    library.prm_step.argtypes = [
        ctypes.POINTER(_Options), ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_int] * 8,
    ]  # fmt: skip
    library.prm_count_up.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int]
    library.prm_count_up.restype = ctypes.c_double
    return library


def _threads_of_torch() -> int | None:
    """Return the address of `GOMP_parallel` in the OpenMP runtime that torch brought along, or None.

    GNU's and LLVM's runtimes have it. Threads of our own would compete with torch's, which keep a processor busy for a
    while after each of torch's operations.
    """
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    except OSError:  # not Linux
        return None
    home = str(Path(torch.__file__).parent)
    runtimes = [name for name in sorted(mapped) if "omp" in Path(name).name and name.startswith(home)]
    for name in runtimes:
        try:
            runtime = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def unusable() -> str | None:
    """Return why the kernel cannot be used here, or None if it can."""
    library = _load()
    return library if isinstance(library, str) else None


@functools.lru_cache(maxsize=1)
def level() -> int:
    """Return the instruction set that is used here, a place in `LEVELS`."""
    library = _load()
    return 0 if isinstance(library, str) else int(library.prm_best_level())


def ask_ahead(whether: bool | None = None) -> bool:
    """Set whether memory is asked ahead of the step, None for what suits the processor; return what then holds.

    For benchmarks and tests: results do not depend on it.
    """
    library = _load()
    return not isinstance(library, str) and bool(library.prm_ask_ahead(-1 if whether is None else int(whether)))


def step(lists: Lists, state_steps: list[Tensor], hyper: Hyperparameters, state: State | None = None) -> None:
    """Take one step in place, counters included.

    Parameters
    ----------
    lists
        Tensors that `popriskmin.step.kernels.eligible` found to fit; those of one list are of one dtype.
    state_steps
        Counters on the CPU, all float32 or all float64.
    hyper
        The group's numbers; `lr` on the CPU if it is a tensor.
    state
        The addresses of parameters and state, where they are known already.

    Raises
    ------
    MemoryError
        If the kernel finds no memory for its tables, some bytes for each tensor; nothing has then changed.
    """
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    count = len(lists.params)
    if state is None:
        held = (*lists.written, lists.starts, state_steps)
        addresses = [packed(map(Tensor.data_ptr, tensors), len(tensors)) for tensors in held]
        sizes, pulled_to = packed(map(Tensor.numel, lists.params), count), origins(lists)
    else:
        addresses, sizes, pulled_to = state.addresses, state.sizes, state.origins
    params, exp_avgs, exp_avg_sqs, exp_avg_vars, max_exp_avg_sqs, _, steps = addresses
    grads = packed(map(Tensor.data_ptr, lists.grads), count)
    maxima = max_exp_avg_sqs if hyper.amsgrad else bytes(8 * count)
    given = packed(map(Tensor.data_ptr, lists.grad_vars), count) if hyper.given else bytes(8 * count)
    columns = [params, grads, exp_avgs, exp_avg_sqs, exp_avg_vars, maxima, given, pulled_to, steps, sizes]
    table = b"".join(columns)
    kinds = [TYPES[tensors[0].dtype] for tensors in (lists.params, lists.grads, lists.exp_avgs, lists.exp_avg_vars)]
    kinds.append(TYPES[lists.grad_vars[0].dtype] if hyper.given else 0)
    kinds.append(TYPES[state_steps[0].dtype])
    failed = library.prm_step(_options(hyper), table, count, *kinds, torch.get_num_threads(), level())
    if failed:
        raise MemoryError(f"no memory for the step of {count} tensors; nothing was changed")
    bump_versions(lists.params)


def count_up(addresses: bytes, dtype: torch.dtype) -> float | None:
    """Add 1 to counters on the host, at these addresses, and return their count: NaN where it is not one for all.

    Torch adds to each and reads each by itself, which of 600 took 837 microseconds where this took 4.
    None, and nothing is counted, without this library.
    """
    library = _load()
    if isinstance(library, str):
        return None
    return float(library.prm_count_up(addresses, len(addresses) // 8, TYPES[dtype]))


def _options(hyper: Hyperparameters) -> _Options:
    return _Options(
        lr=float(hyper.lr),
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        rho=hyper.rho,
        eps=hyper.eps,
        mask_eps=hyper.mask_eps,
        weight_decay=hyper.weight_decay,
        softness=hyper.softness,
        coefficient=hyper.coefficient,
        min_q=hyper.min_q,
        shrinkage=hyper.shrinkage,
        mean_coefficient=hyper.mean_coefficient,
        warmup_steps=hyper.warmup_steps,
        mask=MASK_CODES[mask_name(hyper.mask)],
        pooled=hyper.reduction == "per_tensor",
        bias_correction=hyper.bias_correction,
        decoupled_weight_decay=hyper.decoupled_weight_decay,
        maximize=hyper.maximize,
        debias=hyper.unbiased,
        mask_decay=hyper.mask_decay,
        variance_given=hyper.given,
        stochastic_rounding=hyper.stochastic_rounding,
    )
