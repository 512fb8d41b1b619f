"""A gradient's mean and variance from an optimizer's state, and their values for noise.

Pure functions. The running mean `m^` of a gradient without any signal is not 0: its
square has the mean `k(t) * z`, with `z` the gradient's variance. Only the excess over
this is signal.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

from torch import Tensor

from popriskmin.mask import Hyperparameters, variance_of_mean

Number = TypeVar("Number", float, Tensor)


class Weights(NamedTuple):
    """The state's averages in terms of the gradients' squared mean and variance.

    With `u**2` the squared mean and `z` the variance of independent gradients,

    `E[m^**2] = u**2 + k * z` and `E[s^] = leak * u**2 + own * z`.
    """

    k: float
    leak: float
    own: float


def first_step(hyper: Hyperparameters) -> int:
    """Return the first step after which the state tells mean and variance apart."""
    return 1 if hyper.given else 2


def enough_steps(hyper: Hyperparameters) -> int:
    """Return the steps after which the averages can be judged: twice the mean's memory.

    Examples
    --------
    >>> import torch
    >>> from popriskmin import PRM
    >>> enough_steps(Hyperparameters.of_group(PRM([torch.zeros(1, requires_grad=True)]).param_groups[0]))
    20
    """
    return max(10, math.ceil(2 / (1 - hyper.beta1) - 1e-6))


def weights(t: float, hyper: Hyperparameters) -> Weights:
    """Return the weights after `t` steps, for bias-corrected `m^` and `s^`.

    With `debias`, `mask="threshold"` or a variance that is given, `s^` is unbiased:
    `leak = 0`, `own = 1`. Else step `j` adds `(g - m(j-1))**2`, whose mean is `z +
    k(inf) * (1 - b**(j-1)) * z + b**(j-1) * u**2` with `b = beta1**2`: at first `m` is
    0 and the squared mean counts as noise. Averaged with the weights `rho**(t-j)`.

    Raises
    ------
    ValueError
        Before the second step (the first, with a given variance). Mean and variance
        cannot be told apart there.

    Examples
    --------
    >>> import torch
    >>> from popriskmin import PRM
    >>> hyper = Hyperparameters.of_group(PRM([torch.zeros(1, requires_grad=True)]).param_groups[0])
    >>> [round(x, 4) for x in weights(1000, hyper)]
    [0.0526, 0.0, 1.0526]
    >>> [round(x, 4) for x in weights(2, hyper)]
    [0.5014, 0.9045, 1.005]
    """
    if t < first_step(hyper):
        raise ValueError(f"mean and variance can be told apart from step {first_step(hyper)} on, got t={t:g}")
    k = variance_of_mean(hyper.beta1, t)
    if hyper.given or hyper.unbiased:
        return Weights(k, 0.0, 1.0)
    b, rho = hyper.beta1**2, hyper.rho
    # The sum of rho**(t-j) * b**(j-1) over the steps; its closed form divides 0 by 0
    # where the two are equal.
    total = t * b ** (t - 1) if math.isclose(b, rho, rel_tol=1e-6) else (rho**t - b**t) / (rho - b)
    leak = total * (1 - rho) / (1 - rho**t)
    return Weights(k, leak, 1 + (1 - hyper.beta1) / (1 + hyper.beta1) * (1 - leak))


def mean_and_variance(signal: Number, noise: Number, w: Weights) -> tuple[Number, Number]:
    """Return unbiased estimates of the gradient's squared mean and variance.

    Parameters
    ----------
    signal, noise
        `m^**2` and `s^`, bias-corrected: numbers, tensors of one shape, or sums of both
        over the same scalars, as the estimates are linear. Units of the squared
        gradient.
    w
        From `weights`.

    Returns
    -------
    mean_sq, variance
        Of the type of the input. For pure noise the first is below 0 as often as above.

    Examples
    --------
    >>> mean_sq, variance = mean_and_variance(3.0, 2.0, Weights(k=0.5, leak=0.0, own=1.0))
    >>> mean_sq, variance
    (2.0, 2.0)
    """
    variance = (noise - w.leak * signal) / (w.own - w.leak * w.k)
    return signal - w.k * variance, variance


def needed_ratio(shape: tuple[int, ...]) -> float:
    """Return the factor over pure noise from which a tensor's mean is coherent.

    The mean is that of `m^**2 / z`.

    The factor is at least 2, where the mean holds as much signal as noise. Noise exceeds
    it one time in ten thousand, if the tensor holds as many independent numbers as
    assumed here. A vector counts as 1, because its entries often follow one error. A
    larger tensor counts as the root of its size, 32 at most. The quantile of
    chi-squared is Wilson and Hilferty's approximation.

    Examples
    --------
    >>> round(needed_ratio((64,)), 1), round(needed_ratio((16, 16)), 1), round(needed_ratio((512, 512)), 1)
    (16.2, 2.9, 2.2)
    """
    independent = min(math.sqrt(math.prod(shape)), 32.0) if len(shape) > 1 else 1.0
    spread = 2 / (9 * max(independent, 1.0))
    return max(2.0, (1 - spread + 3.719 * math.sqrt(spread)) ** 3)
