"""How well the gradients of a batch's examples agree.

References
----------
Chatterjee and Zielinski, "On the Generalization Mystery in Deep Learning",
arXiv:2203.10036, and "Making Coherence Out of Nothing At All", arXiv:2008.01217
(m-coherence).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from popriskmin.variance.examples import Loss, example_moments


class Agreement(NamedTuple):
    """How well the gradients of `examples` examples agree, over one parameter or all; plain numbers.

    Attributes
    ----------
    examples
        `m`, the number of examples.
    alpha
        `|mean_i g_i|**2 / mean_i |g_i|**2`, from 0 (they cancel) to 1 (all alike); `1 /
        m` for orthogonal ones. NaN where every gradient is zero.
    m_coherence
        `m * alpha`: how many of the examples a small step along the gradient of one
        helps, on average. 1 for orthogonal gradients, `m` for identical ones.
    unbiased
        `(m * alpha - 1) / (m - 1)`: the mean of `g_i . g_j` over pairs of different
        examples over that of `|g_i|**2`, which does not depend on `m`, an unbiased
        estimate over another. 0 where they do not agree on average, 1 where they are
        alike.
    """

    examples: int
    alpha: float
    m_coherence: float
    unbiased: float


class Coherence(NamedTuple):
    """The agreement over all parameters together, and over each by its name."""

    overall: Agreement
    by_parameter: dict[str, Agreement]


def coherence(model: nn.Module, loss: Loss, *batch: Any, chunk_size: int = 16) -> Coherence:
    """Say how well the gradients of a batch's examples agree, over all parameters and over each.

    The measure is m-coherence (Chatterjee and Zielinski): where examples share their
    gradients, a step for one helps others, and what is learnt from them is expected to
    generalize. The model and its gradients are left as they are. This waits for the
    device.

    Parameters
    ----------
    model
        Any module; its parameters that require gradients are looked at. See `Examples`
        for batch normalization.
    loss
        `loss(model, *batch)`, the mean loss of a batch, of shape (), as for `Examples`.
    batch
        Tensors, or containers of them, with two or more examples along dimension 0.
    chunk_size
        How many examples' gradients are held at a time.

    Returns
    -------
    Coherence
        `overall`, and `by_parameter` from name to the same for that parameter's
        gradient alone.

    Raises
    ------
    ValueError
        For a model without parameters that require gradients, batch normalization,
        fewer than two examples, or a `chunk_size` below 1.

    Examples
    --------
    >>> model = torch.nn.Linear(4, 1, bias=False)
    >>> def loss(model, x):
    ...     return model(x).mean()
    >>> coherence(model, loss, torch.eye(4)).overall  # each example has a weight of its own
    Agreement(examples=4, alpha=0.25, m_coherence=1.0, unbiased=0.0)
    >>> coherence(model, loss, torch.ones(4, 4)).by_parameter["weight"].m_coherence
    4.0
    """
    moments = example_moments(model, loss, batch, chunk_size)
    if not moments.mean:
        raise ValueError("the model has no parameters that require gradients")
    sums: dict[str, tuple[float, float]] = {}
    for name, mean in moments.mean.items():
        wide = torch.float32 if mean.device.type == "mps" else torch.float64
        of_mean = mean.to(wide).square().sum()
        # mean_i |g_i|**2 is the squared mean and the mean squared deviation.
        of_each = of_mean + moments.squares[name].sum(dtype=wide) / moments.examples
        sums[name] = (float(of_mean), float(of_each))
    overall = tuple(math.fsum(values) for values in zip(*sums.values()))
    return Coherence(
        overall=_agreement(moments.examples, *overall),
        by_parameter={name: _agreement(moments.examples, *pair) for name, pair in sums.items()},
    )


def _agreement(examples: int, of_mean: float, of_each: float) -> Agreement:
    alpha = of_mean / of_each if of_each != 0 else math.nan
    m_coherence = examples * alpha
    return Agreement(examples, alpha, m_coherence, (m_coherence - 1) / (examples - 1))
