"""What differs from one version of torch to another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_NAMES_BUILT_IN = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)


def split_names(group: dict[str, Any]) -> dict[str, Any]:
    """Take the names off named parameters where torch, before 2.6, does not do it itself."""
    if _NAMES_BUILT_IN or isinstance(group["params"], (Tensor, set)):
        return group
    params = list(group["params"])
    if not any(isinstance(param, tuple) for param in params):
        return {**group, "params": params}
    if not all(isinstance(param, tuple) for param in params):
        raise ValueError("all optimizer params should be with/without names. Some param names are missing")
    return {**group, "params": [param for _, param in params], "param_names": [name for name, _ in params]}


def check_graph_capture(optimizer: Optimizer) -> None:
    """Warn as torch does where a captured graph would go wrong."""
    for name in (
        "_accelerator_graph_capture_health_check",
        "_cuda_graph_capture_health_check",
    ):
        if hasattr(optimizer, name):
            getattr(optimizer, name)()
            return
