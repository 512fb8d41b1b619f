"""The checks of `PRM`'s arguments: each bad one is named, with its value and what would be right."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import cast

import torch
from torch import Tensor

from popriskmin.mask import (
    BOUNDARIES,
    MASKS,
    ORIGINS,
    REDUCTIONS,
    VARIANCES,
    Hyperparameters,
    Options,
    PRMGroup,
    boundary_coefficient,
    check_function,
    ever_pulls,
    found_mask,
    is_of_mean,
    mask_name,
    mean_coefficient,
)
from popriskmin.optimizer.groups import Group, parameter_names
from popriskmin.step.functional import choose_implementation
from popriskmin.step.shards import is_sharded


def check_spelling(group: Mapping[str, object], options: Mapping[str, object]) -> None:
    """Raise ValueError for a key of a parameter group that is nearly, but not quite, the name of an option."""
    for key in set(group) - set(options):
        similar = difflib.get_close_matches(str(key), options, n=1, cutoff=0.85)
        if similar:
            raise ValueError(f"unknown option {key} in a parameter group: did you mean {similar[0]}?")


def warn_of_sam(group: Mapping[str, object]) -> None:
    """Warn of a `rho` that is the radius of a SAM wrapper, known by its `adaptive` beside it."""
    if "adaptive" in group and "rho" in group:
        _warn_of_sam(float(cast("float", group["rho"])))


@functools.cache
def _warn_of_sam(rho: float) -> None:
    warnings.warn(
        f"a parameter group has rho={rho:g} and 'adaptive', as SAM writes them: PRM takes rho, SAM's radius, for the "
        "decay rate of its variance. Give SAM groups of its own, or rename its key",
        UserWarning,
        stacklevel=7,
    )


def warn_of_no_pull(options: Mapping[str, object]) -> None:
    """Warn of a shrinkage that does nothing, because the mask is 0 at so small a mean gradient."""
    known = cast("Options", options)
    if known["shrinkage"] and not ever_pulls(Hyperparameters.of_group(known)):
        _warn_of_no_pull(known["shrinkage"], mask_name(known["mask"]), known["boundary"])


@functools.cache
def _warn_of_no_pull(shrinkage: float, mask: str, boundary: str) -> None:
    warnings.warn(
        f"shrinkage={shrinkage:g} never pulls: with boundary={boundary!r} the mask {mask!r} is 0 at so many standard "
        "errors of the mean gradient. mask='none' pulls at every shrinkage, and so does 'snr' without debias; others "
        "need a larger one, or boundary='empirical'",
        UserWarning,
        stacklevel=6,
    )


def check_keep(keep: Iterable[str], options: Mapping[str, object]) -> tuple[str, ...]:
    """Return the names of options that a checkpoint leaves alone; raise for any other name."""
    if isinstance(keep, str):
        raise TypeError(f"keep must hold names of options, got the one name {keep!r}: write keep=({keep!r},)")
    names = tuple(keep)
    for name in names:
        if name not in options:
            similar = difflib.get_close_matches(str(name), options, n=1)
            raise ValueError(
                f"keep has {name!r}, which is no option{f': did you mean {similar[0]}?' if similar else ''}"
            )
    return names


def plain(value: object) -> object:
    """Turn numpy's numbers into Python's, so that checkpoints load with `weights_only=True`; leave others alone."""
    if type(value) is list:
        return [plain(item) for item in value]
    if type(value) is tuple:
        return tuple(plain(item) for item in value)
    is_numpy = type(value).__module__ == "numpy" and getattr(value, "ndim", 0) == 0
    return value.item() if is_numpy and hasattr(value, "item") else value


# What torch's AdamW takes tensors for, beside lr, and through which gradients are asked for.
FOLLOWED = ("betas", "eps", "weight_decay")


def with_numbers(options: Mapping[str, object], differentiable: object) -> dict[str, object]:
    """Return the options with tensors of one element turned into numbers, but for lr, and a mask's path into the mask.

    Read once, so that no step waits for a device. With `differentiable` those of `FOLLOWED` stay tensors, for gradients
    to reach them.

    Raises
    ------
    ValueError
        For a tensor with more elements or none, and a path where there is no mask.
    """

    def number(name: str, value: object) -> object:
        if isinstance(value, (tuple, list)):
            return type(value)(number(name, item) for item in value)
        if not isinstance(value, Tensor):
            return value
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
        return value.reshape(()) if differentiable and name in FOLLOWED else value.item()

    numbers = {name: value if name == "lr" else number(name, value) for name, value in options.items()}
    return {name: found_mask(value) if name == "mask" else value for name, value in numbers.items()}


def _number(value: object) -> float | None:
    """Return a number, or the one that a tensor of one element holds; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return float(value) if isinstance(value, Real) else None


def check_options(options: Mapping[str, object]) -> None:
    """Raise ValueError for the first option of a group that is out of range, naming it and showing its value."""
    _check_lr(options["lr"])
    _check_numbers(options)
    known = cast("Options", options)  # which the checks make sure of
    if known["shrinkage"] and known["batch_size"] == known["n_dataset"]:
        mean_coefficient(known["batch_size"], known["n_dataset"], known["variance"])
    check_counts(options)
    _check_switches(options)
    _check_words(options)
    _check_combinations(known)
    choose_implementation([], known["foreach"], known["fused"], known["differentiable"])
    mask = known["mask"]
    if callable(mask):
        if known["fused"]:
            raise RuntimeError(
                f"fused=True, but the kernels do not know the mask {mask_name(mask)}: pass fused=None, and "
                "it steps by foreach"
            )
        check_function(mask, Hyperparameters.of_group(known))


def _check_numbers(options: Mapping[str, object]) -> None:
    betas = options["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
    for name, value in (("betas[0]", betas[0]), ("betas[1]", betas[1]), ("rho", options["rho"])):
        number = _number(value)
        if number is None or not 0 <= number < 1:
            raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
    for name in ("eps", "mask_eps", "softness", "weight_decay", "shrinkage"):
        value = options[name]
        if name == "mask_eps" and value is None:
            continue
        number = _number(value)
        if number is None or not 0 <= number < float("inf"):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    min_q, eps = options["min_q"], _number(options["eps"])
    if not (isinstance(min_q, Real) and 0 <= float(min_q) <= 1):
        raise ValueError(f"min_q must be a number in [0, 1], got {min_q!r}")
    if options["mask_eps"] is None and eps is not None and eps * eps == float("inf"):
        raise ValueError(f"eps must be so small that its square is finite, or mask_eps be given, got eps={eps!r}")


def _check_words(options: Mapping[str, object]) -> None:
    known_values = {
        "mask": MASKS,
        "boundary": BOUNDARIES,
        "reduction": REDUCTIONS,
        "variance": VARIANCES,
        "shrink_to": ORIGINS,
    }
    for name, known in known_values.items():
        value = options[name]
        if name == "mask" and callable(value):
            continue
        if not isinstance(options[name], str) or options[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {options[name]!r}")
    if options["state_dtype"] not in (None, torch.bfloat16, torch.float32, torch.float64, "8bit"):
        raise ValueError(
            "state_dtype must be None, '8bit', torch.bfloat16, torch.float32 or torch.float64, "
            f"got {options['state_dtype']!r}"
        )


def _check_combinations(options: Options) -> None:
    """Raise ValueError for options of which each by itself would be right."""
    if options["shrinkage"]:
        mean_coefficient(options["batch_size"], options["n_dataset"], options["variance"])
    if options["boundary"] == "empirical":
        boundary_coefficient("empirical", options["batch_size"], options["n_dataset"])
    if options["debias"] and not options["bias_correction"]:
        raise ValueError("debias=True needs bias_correction=True, got bias_correction=False")
    if is_of_mean(options["mask"]) and not options["bias_correction"]:
        raise ValueError(f"mask={options['mask']!r} needs bias_correction=True, got bias_correction=False")
    if options["mask_decay"] and not options["decoupled_weight_decay"]:
        raise ValueError(
            "mask_decay=True needs decoupled_weight_decay=True, got decoupled_weight_decay=False, "
            "where the mask reaches the decay anyway"
        )
    if options["state_dtype"] == "8bit" and options["differentiable"]:
        raise ValueError("state_dtype='8bit' needs differentiable=False: no gradient passes through its rounding")
    if options["stochastic_rounding"] and options["differentiable"]:
        raise ValueError("stochastic_rounding=True needs differentiable=False: no gradient passes through its rounding")


def _check_lr(lr: object) -> None:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        if lr.is_complex():
            raise ValueError(f"lr must be real, got {lr!r}")
        lr = lr.detach()
    elif not isinstance(lr, Real):
        raise ValueError(f"lr must be a number or a tensor, got {lr!r}")
    if not 0 <= float(lr) < float("inf"):
        raise ValueError(f"lr must be finite and >= 0, got {lr!r}")


def _check_switches(options: Mapping[str, object]) -> None:
    switches = ["amsgrad", "bias_correction", "decoupled_weight_decay", "debias", "mask_decay", "maximize"]
    for name in [*switches, "capturable", "differentiable", "stochastic_rounding"]:
        if not isinstance(options[name], bool):
            raise ValueError(f"{name} must be True or False, got {options[name]!r}")
    for name in ("foreach", "fused"):
        if options[name] is not None and not isinstance(options[name], bool):
            raise ValueError(f"{name} must be None, True or False, got {options[name]!r}")


def check_counts(options: Mapping[str, object]) -> None:
    """Raise ValueError for an impossible number of steps or examples."""
    warmup_steps = options["warmup_steps"]
    if not (isinstance(warmup_steps, Integral) and int(warmup_steps) >= 0):
        raise ValueError(f"warmup_steps must be a whole number >= 0, got {warmup_steps!r}")
    batch_size, n = (_count(name, options[name]) for name in ("batch_size", "n_dataset"))
    # Batches of the whole data set have no variance between them, unless it is given.
    whole = options.get("variance") == "given" and n == batch_size
    if batch_size is not None and n is not None and n <= batch_size and not whole:
        raise ValueError(f"n_dataset must be larger than batch_size, got n_dataset={n} and batch_size={batch_size}")


def _count(name: str, value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return int(value)


def check_variances(variances: object, groups: Sequence[PRMGroup]) -> None:
    """Raise for what is no mapping from parameters of `variance="given"` groups to fitting variances, and name it."""
    if not isinstance(variances, Mapping):
        raise TypeError(f"variances must be a mapping from parameters to tensors, got {type(variances).__name__}")
    group_of = {param: group for group in groups for param in group["params"]}
    for param, variance in variances.items():
        if not isinstance(param, Tensor):
            raise TypeError(f"the keys of variances must be the parameters themselves, got {param!r}")
        if param not in group_of:
            raise ValueError(
                f"variances has a key that is no parameter of this optimizer: a {type(param).__name__} of shape "
                f"{tuple(param.shape)}"
            )
        if group_of[param]["variance"] != "given":
            raise ValueError(
                f"{name_of(param, groups)} is in a group with variance={group_of[param]['variance']!r}, which takes no "
                "variances; build the group with variance='given'"
            )
        if not isinstance(variance, Tensor):
            raise TypeError(f"the variance of {name_of(param, groups)} must be a tensor, got {variance!r}")
        wrong = _mismatch(variance, param)
        if wrong is not None:
            raise ValueError(f"the variance of {name_of(param, groups)} {wrong}")


def _mismatch(variance: Tensor, param: Tensor) -> str | None:
    """Return in words why a variance does not fit its parameter."""
    if variance.layout != torch.strided:
        return f"must be dense, got layout {variance.layout}"
    if variance.shape != param.shape:
        return f"must have the parameter's shape {tuple(param.shape)}, got {tuple(variance.shape)}"
    if variance.device != param.device:
        return f"must be on the parameter's device {param.device}, got {variance.device}"
    if param.is_complex() and not variance.is_complex():
        return f"must be complex, with the variances of the real and imaginary parts, got {variance.dtype}"
    if not param.is_complex() and not variance.is_floating_point():
        return f"must be of a floating type, got {variance.dtype}"
    if is_sharded(param) != is_sharded(variance):
        return f"must be sharded as the parameter is, a {type(param).__name__}, got a {type(variance).__name__}"
    return None


def name_of(param: Tensor, groups: Sequence[Group]) -> str:
    """Return how messages name a parameter: `parameter 0.weight`, or `parameter 3` by its place among all of them."""
    for names, group in zip(parameter_names(groups), groups):
        for name, candidate in zip(names, group["params"]):
            if candidate is param:
                return f"parameter {name}"
    raise KeyError("not a parameter of these groups")
