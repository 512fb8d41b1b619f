"""State in 8-bit blocks (`popriskmin.step.codes`) as the rest of the library reads and stores it: `m`, `v` and `s`.

The state of such a parameter holds `codes` in the place of `exp_avg`, `exp_avg_sq` and
`exp_avg_var`. Whoever wants one of these asks `readable`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from popriskmin.mask import Options
from popriskmin.step.codes import BLOCK, Moments, Part, are_codes_of, decode, encode, parts_of, shape_of_codes
from popriskmin.step.shards import is_sharded, local_part, share_of, spread_as

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
        If it should be and the parameter is sharded over ranks in a way that cuts blocks.
    """
    if group["state_dtype"] != "8bit" or param.numel() < LEAST_CODED or param.is_complex():
        return False
    if not is_sharded(param):
        return True
    # Rows of fewer scalars would be padding for the most part: biases and norms, and some adapters.
    length = param.numel() // param.shape[0]
    return length >= BLOCK and not _cuts_blocks(param, length)


def _cuts_blocks(param: Tensor, length: int) -> bool:
    """Return False for a parameter whose ranks hold whole rows, or of a matrix whole blocks of each."""
    sharded: Any = param
    columns = 1
    for parts, placement in zip(sharded.device_mesh.shape, sharded.placements):
        dim = getattr(placement, "dim", None)
        columns *= parts if dim == 1 else 1
        if dim not in ((0, 1) if param.dim() == 2 else (0,)) and not placement.is_replicate():
            columns = length
    if columns == 1 or length % (columns * BLOCK) == 0:
        return False
    raise RuntimeError(
        "state_dtype='8bit' takes parameters of which each rank holds whole rows, or of matrices columns in "
        f"multiples of {BLOCK}; one of shape {tuple(param.shape)} lies over {tuple(sharded.device_mesh.shape)} ranks "
        f"as {sharded.placements}: pass state_dtype=torch.bfloat16 for it, in a parameter group of its own"
    )


def new_codes(param: Tensor) -> Tensor:
    """Return the blocks of a parameter that has taken no step."""
    own, in_rows = local_part(param), is_sharded(param)
    codes = torch.zeros(shape_of_codes(own.shape, in_rows), dtype=torch.uint8, device=param.device)
    return spread_as(codes, param, shape_of_codes(param.shape, in_rows))


def _parts(codes: Tensor, scalars: int) -> tuple[tuple[int, int], Iterator[Part]]:
    """Return the rows and their length in which a rank's blocks are, and the parts to code at a time."""
    rows, length = len(codes), scalars // max(len(codes), 1)
    return (rows, length), parts_of(rows, length, PART)


@torch.no_grad()
def decoded(codes: Tensor, param: Tensor, name: str) -> Tensor:
    """Return `m`, `v` or `s`, by its name in the state, in float32 and of the parameter's shape."""
    blocks = local_part(codes)
    shape = (local_part(param) if is_sharded(codes) else param).shape
    value = torch.empty(shape, dtype=torch.float32, device=blocks.device)
    seen, parts = _parts(blocks, value.numel())
    for part in parts:
        moments = decode(part.blocks(blocks))
        part.of(value.view(seen)).copy_(part.without_padding(moments[CODED.index(name)]))
    return spread_as(value, codes, param.shape)


@torch.no_grad()
def encoded(state: Mapping[str, Tensor], param: Tensor) -> Tensor:
    """Return the blocks of a state with `exp_avg`, `exp_avg_sq` and `exp_avg_var`, rounded to nearest."""
    codes = new_codes(param)
    blocks = local_part(codes)
    blocks.view(torch.int32)[..., -1] = int(state["step"])
    seen, parts = _parts(blocks, local_part(param).numel())
    flat = [local_part(state[name]).to(blocks.device, torch.float32).reshape(seen) for name in CODED]
    for part in parts:
        padding = (0, -(part.columns.stop - part.columns.start) % BLOCK)
        moments = Moments(*(pad(part.of(x), padding).view(-1, BLOCK) for x in flat))
        encode(moments, part.blocks(blocks), part.padded, stochastic=False)
    return codes


def saved_codes(key: int, saved: Mapping[str, Any], param: Tensor, group: Options) -> Tensor | None:
    """Return the blocks of a parameter in a checkpoint; None where it has none, ValueError for those of another."""
    # With `full_state_dict=True` torch adds what this optimizer has and the checkpoint lacks, so of both kinds the one
    # that is not this optimizer's is the checkpoint's.
    if "codes" not in saved or (has_codes(param, group) and not saved.keys().isdisjoint(CODED)):
        return None
    codes = saved["codes"]
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8 or not are_codes_of(codes, param):
        found = f"{codes.dtype} of shape {tuple(codes.shape)}" if isinstance(codes, Tensor) else repr(codes)
        raise ValueError(
            f"the checkpoint's codes of parameter {key} are {found}; the parameter, of shape {tuple(param.shape)}, has "
            f"torch.uint8 of shape {shape_of_codes(param.shape, is_sharded(param))}"
        )
    if is_sharded(codes) and not is_sharded(param):
        raise ValueError(
            f"the checkpoint's codes of parameter {key} are sharded over ranks, and the parameter is not: gather them, "
            "as get_optimizer_state_dict does with StateDictOptions(full_state_dict=True)"
        )
    return codes


def kept(codes: Tensor, param: Tensor) -> Tensor | None:
    """Return the blocks of a checkpoint as this parameter has them, to the bit; None where they are cut otherwise."""
    shape = shape_of_codes(param.shape, is_sharded(param))
    if tuple(codes.shape) != shape:
        if is_sharded(codes) or math.prod(param.shape[1:]) % BLOCK:
            return None
        codes = codes.view(shape)
    return share_of(codes, param).to(param.device)


def uncoded(saved: Mapping[str, Any], codes: Tensor | None, param: Tensor) -> dict[str, Any]:
    """Return the saved state of a parameter with `m`, `v` and `s` in float32, as every other state has them."""
    others = {name: value for name, value in saved.items() if name != "codes"}
    return others if codes is None else {**others, **{name: decoded(codes, param, name) for name in CODED}}


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
