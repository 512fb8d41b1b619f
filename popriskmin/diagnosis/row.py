"""What a diagnosis says of one parameter tensor."""

from __future__ import annotations

from typing import NamedTuple

# What is said of a mask that is shut without a fault in it, and of one that is not
# shut.
FINE = ("open", "warmup", "early", "noise", "slowed")
# What is a fault.
FAULTS = ("weak", "epsilon", "strict", "decay", "dead", "not finite")
# What to do about causes that are no faults.
SLOWED = "none is needed; a larger lr makes up for it, or a smaller softness"
NOISE = (
    "none is needed, unless the module must learn from a signal weaker than its noise, as a router may: then "
    "mask='none' for its group, min_q, a smaller softness or a larger batch"
)


class Row(NamedTuple):
    """What is said of one parameter tensor. Numbers are of the last step, and plain.

    Attributes
    ----------
    name
        As in `get_mask_stats(by="parameter")`: the parameter's name, or its place where
        the optimizer has no names.
    group
        The number of its parameter group.
    step
        The steps that it has taken; 0 for one that has had no gradient yet, of which no
        other number is known.
    parameter_count
        Scalars.
    mean_q, active_fraction, snr
        As in `get_mask_stats`.
    over_noise
        The squared mean gradient in units of the gradient's variance, `m^**2 / z`,
        averaged over the scalars that have gradients (each counted as 1 at most), and
        divided by what pure noise gives it, `popriskmin.mask.variance_of_mean`. 1 says
        noise; at 2 the mean holds as much signal as noise.
    gradient
        Root mean square of the gradient, from `v^`.
    zero_fraction
        Share of the scalars without a gradient, now or for about the last 100 steps.
        The cause is that of the others.
    decay_ratio
        Length of the weight decay's step over that of the masked gradient step; 0 where
        nothing decays.
    cause
        "open", "warmup", "early" (too few steps to say), "noise" and "slowed" are no
        faults; "weak", "epsilon", "strict", "decay", "dead" and "not finite" are.
    reason, advice
        In words; the advice is empty where there is none to give.
    """

    name: str | int
    group: int
    step: int
    parameter_count: int
    mean_q: float
    active_fraction: float
    snr: float
    over_noise: float
    gradient: float
    zero_fraction: float
    decay_ratio: float
    cause: str
    reason: str
    advice: str
