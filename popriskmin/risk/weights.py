"""A model's weights, kept aside while training goes on: each rank its parts, a checkpoint the whole of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from popriskmin.step.shards import is_sharded, whole

Weights = Mapping[str, Any]


def copied(weights: Weights | None) -> dict[str, Any] | None:
    """Return a copy of a model's state that further training does not reach; of sharded tensors this rank's parts."""
    if weights is None:
        return None
    return {name: x.detach().clone() if isinstance(x, Tensor) else copy.deepcopy(x) for name, x in weights.items()}


def gathered(weights: Weights | None) -> dict[str, Any] | None:
    """Return the weights with every sharded tensor whole and on the CPU. Every rank must call where there is one."""
    if weights is None:
        return None
    return {name: whole(x).cpu() if isinstance(x, Tensor) and is_sharded(x) else x for name, x in weights.items()}


def spread(weights: Weights | None, model: nn.Module | None) -> dict[str, Any] | None:
    """Return a copy of whole weights as the model holds its own: spread over the ranks where those are sharded.

    Nothing is sent: each rank takes its parts of what it was given.
    """
    kept = copied(weights)
    if kept is None or model is None:
        return kept
    for name, own in model.state_dict().items():
        if name in kept and isinstance(own, Tensor) and is_sharded(own) and not is_sharded(kept[name]):
            kept[name] = _parted(kept[name], own)
    return kept


def _parted(tensor: Tensor, like: Any) -> Tensor:
    # Imported when needed: not every build of torch has it, and it is public since torch 2.5.
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
