"""The optimizers of `masked.py` as arms of a comparison, found by their import path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from popriskmin import Masked


class SGD(torch.optim.SGD):
    """SGD with a momentum of 0.9."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=0.9)


class MaskedSGD(Masked):
    """The mask around it."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, **mask: Any) -> None:
        super().__init__(SGD(params, lr, weight_decay), **mask)


class Muon(torch.optim.Optimizer):
    """Muon of torch for matrices and AdamW for the other parameters, as one optimizer."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        kinds: dict[bool, list[Tensor]] = {True: [], False: []}
        for param in params:
            kinds[param.ndim == 2].append(param)
        super().__init__(
            [{"params": some, "muon": muon} for muon, some in kinds.items() if some],
            {"lr": lr, "weight_decay": weight_decay},
        )
        # Groups are shared, and so what a schedule writes to them.
        self.parts = [
            torch.optim.Muon([group], adjust_lr_fn="match_rms_adamw") if group["muon"] else torch.optim.AdamW([group])
            for group in self.param_groups
        ]

    def step(self, closure: Any = None) -> Any:
        """Take a step of both."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


class MaskedMuon(Masked):
    """The mask around it."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, **mask: Any) -> None:
        super().__init__(Muon(params, lr, weight_decay), **mask)
