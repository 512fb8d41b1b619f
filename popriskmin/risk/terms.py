"""What one optimizer step is expected to take off the population risk, read from the optimizer's state.

The derivation stands in docs/risk.md. In short: a step moves a scalar by `-rate * q(m) * m`, so to first order the risk
falls by `u * rate * q(m) * m`, where `u` is the gradient of the population risk. Of the mean `m` only `u` is known to
be right; its noise has variance `k * z`, with `z` the variance of the minibatch gradient. Stein's lemma takes out what
that noise contributes to the product, mask included: `E[u * q(m) * m] = E[q(m) * m**2 - k * z * (q(m) * m)']`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from popriskmin.mask import Hyperparameters, corrections, evaluate, signal_and_noise, variance_of_mean
from popriskmin.optimizer.prm import PRM
from popriskmin.step.lists import PLAIN, as_real, compute_dtype, sum_dtype, whole

# Tensors of one group are joined up to so many scalars: on small ones an operation's start costs more than its work.
JOINED = 1 << 16

# Larger ones are read in blocks of so many scalars.
BLOCK = 1 << 21

# Adam's step is PRM's without a mask; with `rho` 0 and a variance that is given, nothing is divided out of it.
_ADAM: dict[str, Any] = {
    "rho": 0.0,
    "mask_eps": 0.0,
    "softness": 1.0,
    "coefficient": 1.0,
    "mask": "none",
    "reduction": "per_param",
    "warmup_steps": 0,
    "bias_correction": True,
    "debias": False,
    "mask_decay": False,
    "min_q": 0.0,
    "variance": "given",
}


class Moments(NamedTuple):
    """What is read of parameters that have taken `t` steps: real tensors of one shape, in float32 or wider."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_var: Tensor
    t: Any


def hyperparameters(optimizer: Optimizer, group: Mapping[str, Any]) -> Hyperparameters:
    """Return the numbers of a group of PRM, or of Adam or AdamW as those of a PRM without mask.

    Raises
    ------
    ValueError
        For Adam without a mean, `betas[0]` of 0.
    """
    if isinstance(optimizer, PRM):
        return Hyperparameters.of_group(group)
    beta1, beta2 = group["betas"]
    if beta1 == 0:
        raise ValueError("RiskMonitor needs betas[0] > 0, a mean that tells the gradient from its noise, got 0")
    return Hyperparameters.of(
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
        # Adam and AdamW say it in the group since torch 2.7.
        decoupled_weight_decay=group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)),
        **_ADAM,
    )


def moments(
    params: list[Tensor], optimizer: Optimizer, hyper: Hyperparameters, variances: Mapping[Tensor, Tensor]
) -> Iterator[Moments]:
    """Yield what is to be read of these parameters of one group, small ones joined.

    Those are left out that did not move in this step, or have not taken two. Large tensors come in blocks, so that
    temporaries stay small. `variances` holds that of each parameter's gradient for Adam and AdamW; PRM has its own.
    """
    waiting: dict[Any, list[Moments]] = {}
    for param in params:
        entry = read(param, optimizer, hyper, variances.get(param))
        if entry is None:
            continue
        # Where steps are counted on the device they are not compared, which would need them on the host.
        alone = hyper.reduction == "per_tensor" or entry.param.numel() >= JOINED or isinstance(entry.t, Tensor)
        if alone or type(param) not in PLAIN:
            yield from _blocks(entry) if hyper.reduction == "per_param" and type(param) in PLAIN else [entry]
            continue
        key = (entry.t, entry.param.dtype, entry.param.device)
        waiting.setdefault(key, []).append(entry)
        if sum(other.param.numel() for other in waiting[key]) >= JOINED:
            yield _join(waiting.pop(key))
    for entries in waiting.values():
        yield _join(entries)


def read(param: Tensor, optimizer: Optimizer, hyper: Hyperparameters, variance: Tensor | None = None) -> Moments | None:
    """Return what is to be read of one parameter, or None where it has not moved now, or has not taken two steps yet.

    The first step has no mean before it, from which the gradient could deviate.
    """
    state = optimizer.state.get(param)
    if not state or param.numel() == 0 or param.grad is None:
        return None
    step = state["step"]
    t = step if isinstance(step, Tensor) and step.device.type != "cpu" else int(step)
    variance = state["exp_avg_var"] if isinstance(optimizer, PRM) else variance
    if variance is None or (isinstance(t, int) and t < 2):
        return None
    second = state["max_exp_avg_sq" if hyper.amsgrad else "exp_avg_sq"]
    held = [as_real(tensor.detach()) for tensor in (param, state["exp_avg"], second, variance)]
    dtype = compute_dtype(*held)
    w, m, v, s = (tensor.to(dtype) for tensor in held)
    return Moments(w, m, v, s, t.to(dtype) if isinstance(t, Tensor) else t)


def _blocks(entry: Moments) -> Iterator[Moments]:
    w, m, v, s = (torch.split(tensor.flatten(), BLOCK) for tensor in entry[:4])
    for parts in zip(w, m, v, s):
        yield Moments(*parts, entry.t)


def _join(entries: list[Moments]) -> Moments:
    if len(entries) == 1:
        return entries[0]
    w, m, v, s = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in list(zip(*entries))[:4])
    return Moments(w, m, v, s, entries[0].t)


def fall_and_influence(entry: Moments, hyper: Hyperparameters) -> Tensor:
    """Return the expected fall of the risk in the last step, and the batch's influence on its own examples.

    Returns
    -------
    Tensor
        Of shape (2,), in units of the loss, float64 where the device has it. First, the sum over scalars of
        `rate * (q * m^**2 - k * z * slope)`, where `rate = lr / (sqrt(v^) + eps)` and `slope` is the derivative of
        `q * m^` with respect to `m^`, 1 where there is no mask; and what the decay of the weights adds. Second, the
        sum of `rate * z * slope`, with the decay's part in it where that is masked.
    """
    w, m, v, _, t = entry
    c = corrections(t, hyper)
    mean = m / c.bias1
    # Without bias correction the step takes a mean that is too small, and so is its variance.
    shrunk = corrections(t, hyper._replace(bias_correction=True)).bias1 / c.bias1
    k = variance_of_mean(hyper.beta1, t) * shrunk**2
    rate = hyper.lr / ((v / c.bias2).sqrt() + hyper.eps)
    q, dq = mask_and_derivative(entry, hyper)
    z = gradient_variance(entry, hyper)
    influence = rate * (q + mean * dq) * z
    # With coupled decay the mean is that of the loss and its penalty together, and only the loss counts.
    of_loss = mean if hyper.decoupled_weight_decay else mean - hyper.weight_decay * w
    fall = rate * q * mean * of_loss
    if hyper.decoupled_weight_decay and hyper.weight_decay != 0:
        decay = hyper.lr * hyper.weight_decay * w
        fall = fall + decay * mean * (q if hyper.mask_decay else 1.0)
        if hyper.mask_decay:  # the mask that multiplies it depends on the noise too
            influence = influence + decay * dq * z
    fall = fall - k * influence
    return torch.stack([whole(terms.sum(dtype=sum_dtype(m.device))) for terms in (fall, influence)])


def same_pass(beta1: float, pass_steps: float) -> float:
    """Return the sum of the products of the mean's weights on two different batches of one pass over the data.

    Batches of one shuffled pass have no example in common, so the products of their noise have the mean `-a * z` and
    not 0. Two batches `d` steps apart belong to one pass with probability `1 - d / pass_steps`.

    Examples
    --------
    >>> round(same_pass(0.9, 1e9), 4) == round(1 - variance_of_mean(0.9, 1000), 4)
    True
    >>> same_pass(0.9, 1)
    0.0
    """
    weights = 2 * (1 - beta1) / (1 + beta1)
    # Beyond that distance weights are below rounding.
    farthest = math.ceil(pass_steps) if beta1 == 0 else min(math.ceil(pass_steps), math.ceil(40 / -math.log(beta1)) + 1)
    return weights * math.fsum(beta1**d * (1 - d / pass_steps) for d in range(1, farthest))


def gradient_variance(entry: Moments, hyper: Hyperparameters) -> Tensor:
    """Return the minibatch gradient's variance from `s`, of its shape."""
    divisor = corrections(entry.t, hyper._replace(bias_correction=True)).bias_var
    if not (hyper.given or hyper.unbiased):
        # Deviations from a mean have the mean's variance too.
        divisor = divisor * (1 + variance_of_mean(hyper.beta1, entry.t - 1))
    variance: Tensor = entry.exp_avg_var / divisor
    return variance


def mask_and_derivative(entry: Moments, hyper: Hyperparameters) -> tuple[Any, Any]:
    """Return `q`, of the shape of `m` or of shape (), and its derivative with respect to `m^`; numbers without a mask.

    The mask depends on the very noise that it judges: where `m` is large by chance, so is `q`. The derivative says by
    how much. A hard mask has none at its step; 0 stands for it.
    """
    if hyper.mask == "none":
        return 1.0, 0.0
    c = corrections(entry.t, hyper)
    with torch.enable_grad():
        m = entry.exp_avg.detach().requires_grad_()
        q = evaluate(*signal_and_noise(m, entry.exp_avg_var, c, hyper), c, hyper)
        if not q.requires_grad:
            return q, 0.0
        (dq,) = torch.autograd.grad(q.sum(), m)
    return q.detach(), dq * c.bias1
