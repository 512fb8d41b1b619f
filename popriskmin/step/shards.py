"""Tensors sharded over ranks (DTensor): this rank's parts, and sums over all ranks in few messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that is sharded; the tensor itself where it is not."""
    part: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return part


def whole(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor, or of a sum over one, for which every rank must call; others as they are."""
    total: Tensor = getattr(tensor, "full_tensor", lambda: tensor)()
    return total


def spread_as(part: Tensor, tensor: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return this rank's part of a tensor as one that lies over the ranks as another does.

    Parameters
    ----------
    part
        Returned as it is where the other is not sharded.
    tensor
        The other.
    shape
        Of the whole, contiguous; None is that of the other.
    """
    if not is_sharded(tensor):
        return part
    sharded: Any = tensor
    shape, stride = (tensor.shape, tensor.stride()) if shape is None else (torch.Size(shape), _strides_of(shape))
    spread: Tensor = type(sharded).from_local(
        part, sharded.device_mesh, sharded.placements, run_check=False, shape=shape, stride=stride
    )
    return spread


def _strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def share_of(whole: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor that every rank has all of as one that lies over the ranks as another does, without messages."""
    if not is_sharded(tensor) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    sharded: Any = tensor
    everywhere = [Replicate()] * sharded.device_mesh.ndim
    replicated: Any = DTensor.from_local(whole.to(tensor.device), sharded.device_mesh, everywhere, run_check=False)
    share: Tensor = replicated.redistribute(placements=sharded.placements)
    return share


def is_sharded(tensor: Tensor) -> bool:
    """Return whether the tensor is one of which each rank holds a part."""
    return hasattr(tensor, "to_local")


def of_one_rank(tensors: Iterable[Tensor]) -> bool:
    """Return whether these are a rank's part of what FSDP1 has flattened, which does not say what the other ranks have.

    With `use_orig_params` or without; DTensors, as FSDP2's, can be asked.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    return any(getattr(tensor, "_fsdp_flattened", False) for tensor in tensors)


def over_ranks(
    numbers: Sequence[Tensor], tensors: Sequence[Tensor], how: Literal["sum", "max"] = "sum"
) -> list[Tensor]:
    """Reduce numbers of this rank's parts of tensors over all ranks, in one message for each mesh.

    Parameters
    ----------
    numbers
        For each tensor a small one of its part's sums or maxima, all of one shape and type.
    tensors
        Those that the parts are of. What is said of one that is not sharded is returned as it is; dimensions of a mesh
        over which a tensor is replicated do not count. Every rank must call with the same tensors.
    how
        "sum", or "max", which need not keep NaN.
    """
    reduced = list(numbers)
    alike: dict[tuple[DeviceMesh, tuple[bool, ...]], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if is_sharded(tensor):
            sharded: Any = tensor
            parted = tuple(not placement.is_replicate() for placement in sharded.placements)
            alike.setdefault((sharded.device_mesh, parted), []).append(i)
    for (mesh, parted), places in alike.items():
        stacked = _reduced(torch.stack([numbers[i] for i in places]), mesh, parted, how)
        for i, number in zip(places, stacked.unbind()):
            reduced[i] = number
    return reduced


def _reduced(values: Tensor, mesh: DeviceMesh, parted: tuple[bool, ...], how: str) -> Tensor:
    # Imported when needed: not every build of torch has it, and it is public since torch 2.5.
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial(how) if over else Replicate() for over in parted]
    total: Tensor = DTensor.from_local(values, mesh, placements, run_check=False).full_tensor()
    return total
