"""The penalty that the mask's variance is worth: how far a weight is pulled to its origin.

A weight at its origin (zero, or the weight that the optimizer was given first) stays there
while the mean gradient over the data set lies within `shrinkage` of its standard errors of
zero. Elsewhere the weight is pulled by the step that the optimizer would take at exactly so
large a mean gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from popriskmin.mask.corrections import Corrections, corrections
from popriskmin.mask.evaluate import evaluate, finish_signal_and_noise, largest
from popriskmin.mask.hyperparameters import Hyperparameters


def loading(shrinkage: float, mean_coefficient: float) -> float:
    """Return what turns the root of `s^` into the mean gradient that holds a weight, `x`.

    `x = shrinkage * sqrt(mean_coefficient * s^)`: so many standard errors of the gradient's
    mean over the data set, the penalty loading of Belloni, Chen, Chernozhukov and Hansen,
    "Sparse Models and Methods for Optimal Instruments" (Econometrica, 2012).

    Examples
    --------
    >>> loading(2.0, 0.25)
    1.0
    """
    return shrinkage * math.sqrt(mean_coefficient)


def pulling_gradient(exp_avg_var: Tensor, q: Tensor, c: Corrections, hyper: Hyperparameters) -> Tensor:
    """Return `q(x) * x`, the masked gradient whose step is the pull.

    Parameters
    ----------
    exp_avg_var
        `s` of one parameter tensor, real, after this step.
    q
        The mask of this step, which is the pull's own where masks are pooled.
    c, hyper
        The corrections of the step, and the group's numbers.

    Returns
    -------
    Tensor
        Of the shape of `exp_avg_var`, in units of the gradient, not negative.
    """
    noise = (exp_avg_var / c.bias_var).clamp(max=largest(exp_avg_var.dtype))
    factor = loading(hyper.shrinkage, hyper.mean_coefficient)
    if hyper.reduction == "per_param":
        # Of the noise itself, so that on the boundary both sides of a comparison are equal.
        signal = noise * (factor * factor)
        q = evaluate(*finish_signal_and_noise(signal, noise, c, hyper), c, hyper)
    pulling: Tensor = q * (noise.sqrt() * factor)
    return pulling


def ever_pulls(hyper: Hyperparameters) -> bool:
    """Return whether shrinkage pulls at all after many steps.

    A mask that is 0 at a mean gradient of `shrinkage` standard errors holds every such weight
    by itself, and then the pull is 0.
    """
    late = corrections(torch.tensor(1e9, dtype=torch.float64), hyper)
    one = torch.ones((), dtype=torch.float64)
    return bool(pulling_gradient(one, one, late, hyper) > 0)


def shrunk(param: Tensor, pull: Tensor, start: Tensor | None) -> Tensor:
    """Return weights moved by `pull` towards their origin, exactly there where it lies nearer.

    Parameters
    ----------
    param, pull
        Of one shape; the pull is not negative. NaN in either is NaN in the result.
    start
        The origin, of that shape; None is zero.

    Examples
    --------
    >>> shrunk(torch.tensor([3.0, -0.5]), torch.ones(2), None)
    tensor([2., 0.])
    """
    distance = param if start is None else param - start
    origin = torch.zeros_like(param) if start is None else start
    return torch.where(distance.abs() <= pull, origin, param - torch.copysign(pull, distance))
