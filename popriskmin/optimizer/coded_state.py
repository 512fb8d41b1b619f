"""State in 8-bit blocks (`popriskmin.step.codes`) as the rest of the library reads and stores it: `m`, `v` and `s`.

The state of such a parameter holds `codes` in the place of `exp_avg`, `exp_avg_sq` and
`exp_avg_var`. Whoever wants one of these asks `readable`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from popriskmin.mask import Options
from popriskmin.step.codes import BLOCK, BYTES, Moments, blocks_of, decode, encode
from popriskmin.step.shards import is_sharded

CODED = ("exp_avg", "exp_avg_sq", "exp_avg_var")

# Tensors of fewer scalars keep float32: little is saved, and biases and norms are among them.
LEAST_CODED = 4096

# Scalars that are coded at a time: temporaries are a dozen times as large.
PART = 1 << 20


def has_codes(param: Tensor, group: Options) -> bool:
    """Return whether the state of a parameter is in 8-bit blocks.

    Raises
    ------
    RuntimeError
        If it should be and the parameter is sharded over ranks, which would cut blocks.
    """
    if group["state_dtype"] != "8bit" or param.numel() < LEAST_CODED or param.is_complex():
        return False
    if is_sharded(param):
        raise RuntimeError(
            "state_dtype='8bit' does not take parameters that are sharded over ranks (FSDP2); pass "
            "state_dtype=torch.bfloat16"
        )
    return True


def new_codes(param: Tensor) -> Tensor:
    """Return the blocks of a parameter that has taken no step."""
    return torch.zeros(blocks_of(param.numel()), BYTES, dtype=torch.uint8, device=param.device)


@torch.no_grad()
def decoded(codes: Tensor, param: Tensor, name: str) -> Tensor:
    """Return `m`, `v` or `s`, by its name in the state, in float32 and of the parameter's shape."""
    value = torch.empty(param.numel(), dtype=torch.float32, device=codes.device)
    for start in range(0, param.numel(), PART):
        moments = decode(codes[start // BLOCK : (start + PART) // BLOCK])
        target = value[start : start + PART]
        target.copy_(moments[CODED.index(name)].view(-1)[: target.numel()])
    return value.view(param.shape)


@torch.no_grad()
def encoded(state: Mapping[str, Tensor], param: Tensor) -> Tensor:
    """Return the blocks of a state with `exp_avg`, `exp_avg_sq` and `exp_avg_var`, rounded to nearest."""
    codes = new_codes(param)
    codes.view(torch.int32)[:, -1] = int(state["step"])
    flat = [state[name].to(codes.device).reshape(-1) for name in CODED]
    for start in range(0, flat[0].numel(), PART):
        rows = codes[start // BLOCK : (start + PART) // BLOCK]
        padded = torch.zeros(3, rows.shape[0] * BLOCK, device=codes.device)
        for target, values in zip(padded, flat):
            target[: values[start : start + PART].numel()] = values[start : start + PART]
        encode(Moments(*padded.view(3, -1, BLOCK).unbind()), rows, start, stochastic=False)
    return codes


def check_codes(key: int, codes: object, param: Tensor) -> None:
    """Raise ValueError for blocks of a checkpoint that are not those of so many scalars."""
    expected = (blocks_of(param.numel()), BYTES)
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8 or tuple(codes.shape) != expected:
        found = f"{codes.dtype} of shape {tuple(codes.shape)}" if isinstance(codes, Tensor) else repr(codes)
        raise ValueError(
            f"the checkpoint's codes of parameter {key} are {found}; the parameter, of shape "
            f"{tuple(param.shape)}, has torch.uint8 of shape {expected}"
        )


def uncoded(key: int, saved: Mapping[str, Any], param: Tensor) -> Mapping[str, Any]:
    """Return the saved state of a parameter with `m`, `v` and `s` in float32, as every other state has them."""
    if "codes" not in saved:
        return saved
    check_codes(key, saved["codes"], param)
    others = {name: value for name, value in saved.items() if name != "codes"}
    return {**{name: decoded(saved["codes"], param, name) for name in CODED}, **others}


def readable(state: Mapping[str, Tensor], param: Tensor) -> Mapping[str, Tensor]:
    """Return the state of a parameter such that `m`, `v` and `s` can be read from it, decoded when they are."""
    return DecodedState(state, param) if "codes" in state else state


class DecodedState(Mapping[str, Tensor]):
    """The state of a parameter with `exp_avg`, `exp_avg_sq` and `exp_avg_var`, decoded anew whenever one is read."""

    def __init__(self, state: Mapping[str, Tensor], param: Tensor) -> None:
        self._state = state
        self._param = param

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor of the state."""
        return decoded(self._state["codes"], self._param, name) if name in CODED else self._state[name]

    def __iter__(self) -> Iterator[str]:
        """Return the names, those of the three first."""
        return iter((*CODED, *(name for name in self._state if name != "codes")))

    def __len__(self) -> int:
        """Return how many names there are."""
        return len(self._state) - 1 + len(CODED)
