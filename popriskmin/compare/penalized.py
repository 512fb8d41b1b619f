"""AdamW with an L1 penalty as an arm: what a user would add by hand where few of many inputs matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class L1AdamW(torch.optim.AdamW):
    """AdamW on the loss plus the sum of the absolute weights times a strength.

    The penalty's gradient, `l1 * sign(w)`, is added to that of the loss in `step`, so it passes through Adam's moments
    like a penalty in the loss. Parameters of one dimension, biases and norms, are left out.

    Parameters
    ----------
    params, options
        As for `torch.optim.AdamW`.
    l1
        The strength, in units of the loss for each unit of a weight.

    Raises
    ------
    ValueError
        For a strength that is negative or not finite.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.tensor([[1.0, -1.0]]))
    >>> w.grad = torch.tensor([[0.0, 0.0]])
    >>> L1AdamW([w], lr=0.1, weight_decay=0.0, l1=0.01).step()
    >>> w.detach()
    tensor([[ 0.9000, -0.9000]])

    In a comparison, once for each strength:

        popriskmin compare table --arm "l1=popriskmin.compare.penalized:L1AdamW" l1=0.001
    """

    def __init__(self, params: Any, *, l1: float = 1e-3, **options: Any) -> None:
        if not 0 <= l1 < float("inf"):
            raise ValueError(f"l1 must be a finite number of at least 0, got {l1!r}")
        super().__init__(params, **options)
        self.l1 = l1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; the penalty's gradient stays in `p.grad`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.dim() > 1:
                    p.grad.add_(p.sign(), alpha=self.l1)
        super().step()
        return loss
