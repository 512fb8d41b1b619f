"""What a user would add to AdamW by hand for inputs that say nothing, as an arm of a comparison."""

from __future__ import annotations

from typing import Any

import torch


class Penalized(torch.optim.AdamW):
    """AdamW on the loss and the absolute values of all weights, biases left out, times a strength."""

    def __init__(self, params: Any, strength: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.strength = strength

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Add the penalty's gradients, and step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.dim() > 1:
                    p.grad.add_(p.sign(), alpha=self.strength)
        super().step()
