"""What `PRM.load_state_dict` does to a checkpoint before it takes it over.

The base class casts all state to the parameter's dtype and takes every option from the checkpoint. PRM keeps its
state in float32 for half-precision parameters, and keeps its own choice of implementation. So the checkpoint is
prepared beforehand, completely, so that a checkpoint which does not fit changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from popriskmin.mask import Hyperparameters, MaskFunction, Options, corrections, found_mask, mask_name
from popriskmin.optimizer.coded_state import CODED, encoded, has_codes, kept, new_codes, saved_codes, uncoded
from popriskmin.optimizer.groups import Group
from popriskmin.optimizer.mask_state import MASKED_STATE
from popriskmin.optimizer.options import FOLLOWED, plain, with_numbers
from popriskmin.step.shards import share_of

if TYPE_CHECKING:
    from torch.optim.optimizer import StateDict

# Raised when a checkpoint's state can no longer be read by older versions.
STATE_FORMAT = 1

# How the step is computed and stored, as against what: these stay as the optimizer was built.
IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable", "state_dtype", "stochastic_rounding")


# What the state of a parameter may hold of the optimizer's; torch says what becomes of a user's own entries.
OWN = {"step", "exp_avg", "exp_avg_sq", "exp_avg_var", "max_exp_avg_sq", "start", "codes"}


class Uncast:
    """A value that is ready to use: the base class casts tensors and makes generators of a user's lists and texts."""

    def __init__(self, value: object) -> None:
        self.value = value


def dtype_of_state(name: str, param: Tensor, state_dtype: torch.dtype | str | None) -> torch.dtype:
    """Return the dtype of a state tensor: `state_dtype`, or by default the parameter's, float32 at least.

    Bfloat16 is for `v`, `s` and the maximum of `v` alone: the mean `m`, and complex parameters, keep float32. The
    first weights, `start`, are as the parameter is.
    """
    if name == "start":
        return param.dtype
    if state_dtype is None or isinstance(state_dtype, str):
        double = param.dtype in (torch.float64, torch.complex128)
        state_dtype = torch.float64 if double else torch.float32
    elif state_dtype == torch.bfloat16 and (name == "exp_avg" or param.is_complex()):
        state_dtype = torch.float32
    if param.is_complex():
        return torch.complex128 if state_dtype == torch.float64 else torch.complex64
    return state_dtype


def new_step(param: Tensor, group: Options, value: float = 0.0) -> Tensor:
    """Return a step counter: on the host, where reading it costs nothing, or beside a capturable parameter."""
    device = param.device if group["capturable"] else "cpu"
    # Filled on the device: a tensor made of a Python number is copied there, and waited for.
    return torch.full((), value, dtype=dtype_of_step(group, device), device=device)


def dtype_of_step(group: Options, device: torch.device | str) -> torch.dtype:
    """Return the dtype of a step counter: float64 where it seeds a rounding, for float32 stands still at 2**24."""
    if rounds_at_random(group) and torch.device(device).type != "mps":  # which has no float64
        return torch.float64
    # As torch's optimizers do, which count in float32 where a kernel counts: that is here unless one is ruled out.
    kernel = group["fused"] is not False and group["foreach"] is None and not group["differentiable"]
    double = torch.get_default_dtype() == torch.float64 and not kernel
    return torch.float64 if double else torch.float32


def rounds_at_random(group: Options) -> bool:
    """Return whether something of the group is rounded by bits that the step count seeds."""
    return group["stochastic_rounding"] or group["state_dtype"] == torch.bfloat16


def new_state(param: Tensor, group: Options) -> dict[str, Tensor]:
    """Return the state of a parameter that has taken no step."""
    names = ["exp_avg", "exp_avg_sq", "exp_avg_var", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    state = {"step": new_step(param, group)}
    if has_codes(param, group):
        state["codes"] = new_codes(param)
        names = names[len(CODED) :]
    for name in names:
        dtype = dtype_of_state(name, param, group["state_dtype"])
        state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if group["shrink_to"] == "start":
        # Gradients are to reach the first weights by way of this, too.
        first = param if group["differentiable"] else param.detach()
        state["start"] = first.clone(memory_format=torch.preserve_format)
    return state


def portable(state_dict: StateDict) -> StateDict:
    """Replace what `weights_only=True` does not load.

    That is `state_dtype`, by its name, a mask of one's own, by its path, and numbers of numpy that a schedule wrote.
    """
    for group in state_dict["param_groups"]:
        group.update({name: plain(value) for name, value in group.items()})
        if callable(group["mask"]):
            group["mask"] = mask_name(group["mask"])
        if isinstance(group["state_dtype"], torch.dtype):
            group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")
    return state_dict


def prepare_groups(saved_groups: Sequence[Group], groups: Sequence[Group], keep: Sequence[str] = ()) -> list[Group]:
    """Complete saved parameter groups, of this or of torch's optimizers, with what only the present ones know.

    Of what both know, `keep` names what stays.
    """
    stays = {*IMPLEMENTATION, *keep, *(["initial_lr"] if "lr" in keep else [])}
    prepared = []
    for saved, group in zip(saved_groups, groups):
        written = saved.get("state_format", STATE_FORMAT)
        if written > STATE_FORMAT:
            raise ValueError(
                f"this checkpoint was written by a newer popriskmin (state_format {written}); "
                f"this version reads state_format up to {STATE_FORMAT}: upgrade popriskmin"
            )
        kept = {name: value for name, value in group.items() if name in stays or name not in saved}
        if "lr" in keep and "initial_lr" not in group:  # a scheduler would start from that of the checkpoint
            saved = {name: value for name, value in saved.items() if name != "initial_lr"}
        if "mask" in saved and "mask" not in keep:
            saved = {**saved, "mask": saved_mask(saved["mask"], group["mask"])}
        taken = {name: saved[name] for name in FOLLOWED if name in saved and name not in keep}
        own = {"params": saved["params"], "state_format": STATE_FORMAT}
        prepared.append({**saved, **kept, **with_numbers(taken, differentiable=False), **own})
    # Groups beyond the shorter list are handed on, for the base class to complain about.
    return prepared + list(saved_groups[len(groups) :])


def saved_mask(saved: str | MaskFunction, present: str | MaskFunction) -> str | MaskFunction:
    """Return the mask of a checkpoint, which may be the present one where its path leads nowhere, as in a notebook."""
    if mask_name(saved) == mask_name(present):
        return present
    try:
        found: str | MaskFunction = found_mask(saved)
    except ValueError as error:
        raise ValueError(
            f"{error}. The checkpoint was written with it: make it importable, build the optimizer with it, or keep "
            f"this optimizer's {mask_name(present)} by load_state_dict(..., keep=('mask',))"
        ) from error
    return found


def replaced_lr(saved_groups: Sequence[Group], groups: Sequence[Group]) -> str | None:
    """Say where a checkpoint of another optimizer than PRM brings a learning rate that PRM was not given."""
    for i, (saved, group) in enumerate(zip(saved_groups, groups)):
        if "rho" not in saved and "lr" in saved and float(saved["lr"]) != float(group["lr"]):
            return (
                f"group {i} takes the learning rate of the checkpoint, {float(saved['lr']):g}, and no longer its own, "
                f"{float(group['lr']):g}: load_state_dict(..., keep=('lr',)) keeps it, and keep=() says that this is "
                "wanted"
            )
    return None


def without_start(saved: StateDict, groups: Sequence[Group]) -> str | None:
    """Say where a checkpoint lacks the first weights that its group shrinks to."""
    states = [
        saved["state"].get(key) for group in groups if group.get("shrink_to") == "start" for key in group["params"]
    ]
    if all("start" in state for state in states if state):
        return None
    return (
        "the checkpoint does not hold the weights that training started from: shrink_to='start' takes those that the "
        "parameters have now"
    )


def prepare_state(
    saved_state: Mapping[int, StateDict],
    prepared_groups: Sequence[Group],
    groups: Sequence[Group],
    of_adam: bool,
) -> dict[int, StateDict]:
    """Return the saved state with every tensor in its final dtype and place, and what is missing filled in.

    With `of_adam` a parameter's state without any of the optimizer's entries is a user's own, and is left as it is.
    """
    state = dict(saved_state)
    for saved, group in zip(prepared_groups, groups):
        for key, param in zip(saved["params"], group["params"]):
            known = state.get(key)
            if known:
                is_own = of_adam and OWN.isdisjoint(known)
                made = known if is_own else _prepare_one(key, known, param, cast("Options", saved))
                state[key] = {
                    name: value if isinstance(value, Tensor) and name not in OWN else Uncast(value)
                    for name, value in made.items()
                }
    return state


def _prepare_one(key: int, saved: StateDict, param: Tensor, group: Options) -> StateDict:
    codes = saved_codes(key, saved, param, group)
    saved = uncoded(saved, codes, param)
    missing = {"step", "exp_avg", "exp_avg_sq"} - set(saved)
    if missing:
        raise ValueError(
            f"the state of parameter {key} has no {', '.join(sorted(missing))}, only "
            f"{', '.join(map(str, saved))}: load_state_dict takes the state of PRM, AdamW or Adam"
        )
    state: StateDict = {}
    for name, value in saved.items():
        if name == "step":
            state[name] = new_step(param, group, float(value))
        elif isinstance(value, Tensor) and name in OWN:
            if value.shape != param.shape:
                raise ValueError(
                    f"the checkpoint's {name} of parameter {key} has shape {tuple(value.shape)}, "
                    f"the parameter has shape {tuple(param.shape)}"
                )
            dtype = dtype_of_state(name, param, group["state_dtype"])
            state[name] = share_of(value, param).to(dtype=dtype, device=param.device)
        else:
            state[name] = value
    if group["amsgrad"] and "max_exp_avg_sq" not in state:
        state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
    if "exp_avg_var" not in state:
        dtype = dtype_of_state("exp_avg_var", param, group["state_dtype"])
        state["exp_avg_var"] = implied_variance(state, group).to(dtype)
    if group["shrink_to"] == "start" and "start" not in state:
        state["start"] = param.detach().clone(memory_format=torch.preserve_format)
    if has_codes(param, group):
        same = None if codes is None else kept(codes, param)
        state = {
            "codes": encoded(state, param) if same is None else same,
            **{name: value for name, value in state.items() if name not in CODED},
        }
    return state


@torch.no_grad()
def implied_variance(state: Mapping[str, Tensor], group: Options) -> Tensor:
    """Return the `s` that Adam's own moments imply, `max(v^ - m^**2, 0)` times its bias correction.

    It is where `s` starts when an AdamW checkpoint is taken over: at zero, the mask would be fully open at the
    switch; without the bias correction, shut.
    """
    m, v, t = state["exp_avg"], state["exp_avg_sq"], float(state["step"])
    c = corrections(max(t, 1), Hyperparameters.of_group(group))
    if t < 1 or c.blend == 0:
        return torch.zeros_like(m)
    complex_ = m.is_complex()
    if complex_:
        m, v = torch.view_as_real(m), torch.view_as_real(v)
    s = (v / c.bias2 - (m / c.bias1).square()).clamp(min=0) * c.bias_var
    return torch.view_as_complex(s) if complex_ else s


def ids_match(saved_groups: Sequence[Group], groups: Sequence[Group]) -> bool:
    """Return whether the groups have the same numbers of parameters, which the base class insists on."""
    return [len(g["params"]) for g in saved_groups] == [len(g["params"]) for g in groups]


def prepared_mask(saved: StateDict, number: int, param: Tensor, group: Group) -> dict[str, Uncast]:
    """Return the state of the mask of `Masked` for one parameter, in its final dtype and place."""
    prepared = {}
    for name, key in MASKED_STATE.items():
        value = saved.get(key)
        if not isinstance(value, Tensor) or (name != "step" and value.shape != param.shape):
            shape = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(
                f"the checkpoint's {key} of parameter {number} has shape {shape}, the parameter {tuple(param.shape)}"
            )
        if name == "step":
            device = param.device if group.get("capturable") else torch.device("cpu")
            prepared[key] = Uncast(value.to(device=device, dtype=torch.float32))
        else:
            prepared[key] = Uncast(value.to(device=param.device, dtype=dtype_of_state(name, param, None)))
    return prepared
