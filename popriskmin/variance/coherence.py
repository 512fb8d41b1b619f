"""How well the gradients of a batch's examples agree.

References
----------
Chatterjee and Zielinski, "On the Generalization Mystery in Deep Learning",
arXiv:2203.10036, and "Making Coherence Out of Nothing At All", arXiv:2008.01217
(m-coherence).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from popriskmin.variance.examples import Loss, example_gradients


class Agreement(NamedTuple):
    """The agreement of examples' gradients, over one parameter or all.

    Attributes
    ----------
    examples
        The number of examples, `m`.
    alpha
        `|mean_i g_i|**2 / mean_i |g_i|**2`, from 0 (they cancel) to 1 (all equal);
        `1 / m` for orthogonal gradients, NaN if every gradient is zero.
    m_coherence
        `m * alpha`: the number of examples that a small step along the gradient of one
        helps, on average. 1 for orthogonal gradients, `m` for identical ones.
    unbiased
        `(m * alpha - 1) / (m - 1)`: the mean of `g_i . g_j` over pairs of different
        examples, divided by the mean of `|g_i|**2`. Both are estimated without bias, so
        it does not depend on `m`. 0 if the gradients do not agree on average, 1 if they
        are equal.
    """

    examples: int
    alpha: float
    m_coherence: float
    unbiased: float


class Coherence(NamedTuple):
    """The agreement over all parameters together, and over each by its name."""

    overall: Agreement
    by_parameter: dict[str, Agreement]


def coherence(model: nn.Module, loss: Loss, *batch: object, chunk_size: int = 16) -> Coherence:
    """Return how well the gradients of a batch's examples agree.

    The measure is m-coherence (Chatterjee and Zielinski). If examples share their
    gradients, a step for one helps others, and the network is expected to generalize.
    It is for studies of a data set or an architecture, and tells clean labels from
    noisy ones. The model and its gradients are left as they are. This waits for the
    device.

    Parameters
    ----------
    model
        Any module. Only parameters that require gradients count. See `Examples` for
        batch normalization.
    loss
        `loss(model, *batch)`, the mean loss of a batch, of shape (), as for `Examples`.
    batch
        Tensors, or containers of them, with two or more examples along dimension 0.
    chunk_size
        The number of examples whose gradients are in memory at a time.

    Returns
    -------
    Coherence
        `overall`, and `by_parameter`: the agreement of each parameter's gradient by its
        name.

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
    >>> coherence(model, loss, torch.eye(4)).overall  # each example has its own weight
    Agreement(examples=4, alpha=0.25, m_coherence=1.0, unbiased=0.0)
    >>> coherence(model, loss, torch.ones(4, 4)).by_parameter["weight"].m_coherence
    4.0
    """
    gradients = example_gradients(model, loss, batch, chunk_size)
    if not gradients.mean:
        raise ValueError("the model has no parameters that require gradients")
    sums: dict[str, tuple[float, float]] = {}
    for name, mean in gradients.mean.items():
        wide = torch.float32 if mean.device.type == "mps" else torch.float64
        of_mean = mean.to(wide).square().sum()
        # mean_i |g_i|**2 is the squared mean and the mean squared deviation.
        of_each = of_mean + gradients.squares[name].sum(dtype=wide) / gradients.examples
        sums[name] = (float(of_mean), float(of_each))
    overall = tuple(math.fsum(values) for values in zip(*sums.values()))
    return Coherence(
        overall=_agreement(gradients.examples, *overall),
        by_parameter={name: _agreement(gradients.examples, *pair) for name, pair in sums.items()},
    )


def _agreement(examples: int, of_mean: float, of_each: float) -> Agreement:
    alpha = of_mean / of_each if of_each != 0 else math.nan
    m_coherence = examples * alpha
    return Agreement(examples, alpha, m_coherence, (m_coherence - 1) / (examples - 1))
