"""What differs from one version of torch to another."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

P = ParamSpec("P")
R = TypeVar("R")

_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


def split_names(group: dict[str, Any]) -> dict[str, Any]:
    """Take the names off named parameters where torch, before 2.6, does not do it itself."""
    if _VERSION >= (2, 6) or isinstance(group["params"], (Tensor, set)):
        return group
    params = list(group["params"])
    if not any(isinstance(param, tuple) for param in params):
        return {**group, "params": params}
    if not all(isinstance(param, tuple) for param in params):
        raise ValueError("all optimizer params should be with/without names. Some param names are missing")
    return {**group, "params": [param for _, param in params], "param_names": [name for name, _ in params]}


def bump_versions(tensors: list[Tensor]) -> None:
    """Tell autograd that these were written to, so that a graph that saved one of them refuses to go on."""
    if _VERSION >= (2, 6):
        torch.autograd.graph.increment_version(tensors)  # which leaves out inference tensors: they have no version
    else:
        for tensor in tensors:
            if not tensor.is_inference():
                tensor.detach().as_strided((0,), (1,)).zero_()  # writing to an empty part of it counts


def run_uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function such that torch.compile, where it meets a call of it, calls it as it stands."""
    dynamo = importlib.import_module("torch._dynamo")  # about a second, which the first step would take anyway
    disabled: Callable[P, R] = dynamo.disable(function)
    return disabled


def check_graph_capture(optimizer: Optimizer) -> None:
    """Warn as torch does where a captured graph would go wrong."""
    for name in (
        "_accelerator_graph_capture_health_check",
        "_cuda_graph_capture_health_check",
    ):
        if hasattr(optimizer, name):
            getattr(optimizer, name)()
            return
