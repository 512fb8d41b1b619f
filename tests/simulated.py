"""Gradients whose law is known, and what an optimizer is handed for their variances."""

import torch
from torch import nn

from popriskmin import PRM


class Rows(nn.Module):
    """The gradient of `mean_loss(model, x)` is the mean row of `x`, whatever the weights, over two parameters."""

    def __init__(self, width, dtype=torch.float32):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(width - 3, dtype=dtype))
        self.last = nn.Parameter(torch.zeros(3, dtype=dtype))

    def forward(self, x):
        return (x * torch.cat([self.first, self.last])).sum(-1)


def mean_loss(model, x):
    return model(x).mean()


def still(params, **options):
    """Return a PRM that moves nothing, and whose `s` is the variance that it was given last."""
    return PRM(params, **{"lr": 0.0, "weight_decay": 0.0, "rho": 0.0, "variance": "given", **options})


def given(optimizer):
    """Return the variances that the last step took, one after another."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.cat([optimizer.state[p]["exp_avg_var"].flatten() for p in params if p in optimizer.state])


def flat_grad(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.cat([p.grad.flatten() for p in params if p.grad is not None])
