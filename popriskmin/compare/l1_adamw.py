"""AdamW with an L1 penalty as an arm, for problems with many inputs of which few matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from popriskmin.compare.task import Params


class L1AdamW(torch.optim.AdamW):
    """AdamW on the loss plus the sum of the absolute weights times a strength.

    The penalty's gradient, `l1 * sign(w)`, is added to that of the loss in `step`. It passes
    through Adam's moments like a penalty in the loss. With `decoupled` the weights are drawn
    towards zero by `lr * l1` after the step instead, and stop there exactly, as weight decay
    is decoupled in AdamW. Parameters of one dimension, biases and norms, are left out.

    Parameters
    ----------
    params, options
        As for `torch.optim.AdamW`.
    l1
        The strength, in units of the loss for each unit of a weight. With `decoupled` it has
        no unit: Adam's step is about `lr` too.
    decoupled
        Draw off after the step. False by default.

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

    >>> w = torch.nn.Parameter(torch.tensor([[1.0, -0.01]]))
    >>> w.grad = torch.zeros(1, 2)
    >>> L1AdamW([w], lr=0.1, weight_decay=0.0, l1=0.3, decoupled=True).step()
    >>> w.detach()
    tensor([[0.9700, -0.0000]])

    In a comparison, once for each strength:

        popriskmin compare table --arm "l1=popriskmin.compare.l1_adamw:L1AdamW" l1=0.001
    """

    def __init__(self, params: Params, *, l1: float = 1e-3, decoupled: bool = False, **options: Any) -> None:
        if not 0 <= l1 < float("inf"):
            raise ValueError(f"l1 must be a finite number of at least 0, got {l1!r}")
        super().__init__(params, **options)
        self.l1, self.decoupled = l1, decoupled
        if decoupled:
            self.register_step_post_hook(_draw_off)

    # Here and not in `step`: torch runs a step's hooks for each class whose step it wraps.
    def _init_group(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *others: object) -> bool:
        """Gather a step's tensors as AdamW does, with the penalty in `grads`, not in `p.grad`."""
        has_complex: bool = super()._init_group(group, params, grads, *others)  # type: ignore[no-untyped-call]
        if self.decoupled:
            return has_complex
        grads[:] = [g.add(p.sign(), alpha=self.l1) if p.dim() > 1 else g for p, g in zip(params, grads)]
        return has_complex


@torch.no_grad()
def _draw_off(optimizer: L1AdamW, *_: object) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.dim() > 1:
                p.copy_(torch.nn.functional.softshrink(p, float(group["lr"]) * optimizer.l1))
