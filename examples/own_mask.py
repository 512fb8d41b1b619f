"""A mask of one's own and SGD under it, in a comparison.

    cd examples
    popriskmin compare digits --prm mask=own_mask:steep --arm sgd=torch.optim:SGD --arm masked=own_mask:MaskedSGD

`--jobs 2` trains two runs at a time. Each process finds the mask by its import path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from popriskmin import Masked
from popriskmin.mask import Hyperparameters


def steep(signal: Tensor, noise: Tensor, hyper: Hyperparameters) -> Tensor:
    """Return the square of the snr mask, which shuts weak gradients out sooner."""
    snr = signal / (signal + hyper.softness * hyper.coefficient * noise + hyper.mask_eps)
    return snr.square()


class MaskedSGD(Masked):
    """SGD with momentum, under the mask."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, momentum: float = 0.9, **mask: Any) -> None:
        super().__init__(torch.optim.SGD(params, lr=lr, weight_decay=weight_decay, momentum=momentum), **mask)
