"""Optimizers that have stepped on simulated gradients, for tests of the diagnosis."""

import torch
from torch import nn

from popriskmin import PRM, diagnose


def run(tensors, steps=200, seed=0, groups=None, **options):
    """Step tensors whose gradients have a given mean and standard deviation: `{name: (mean, deviation[, shape])}`."""
    generator = torch.Generator().manual_seed(seed)
    params = {name: nn.Parameter(torch.zeros(spec[2] if len(spec) > 2 else (64, 64))) for name, spec in tensors.items()}
    built = [{"params": [(n, params[n]) for n in names], **own} for names, own in groups] if groups else params.items()
    optimizer = PRM(built, **{"lr": 1e-3, **options})
    for _ in range(steps):
        for name, (mean, deviation, *_) in tensors.items():
            p = params[name]
            p.grad = mean + deviation * torch.randn(p.shape, generator=generator)
        optimizer.step()
    return optimizer


def causes(optimizer, **options):
    return {row.name: row.cause for row in diagnose(optimizer, **options).rows}
