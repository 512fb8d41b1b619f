"""Steps on random gradients, and checkpoints: what tests of many rooms do to an optimizer."""

import io

import torch


def noisy_steps(optimizer, times=1):
    """Step with gradients of noise alone."""
    for _ in range(times):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn_like(p)
        optimizer.step()


def through_a_file(state, **load):
    """Save and load as a checkpoint on disk would, with nothing but tensors and plain values allowed."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **load)
