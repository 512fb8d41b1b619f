"""The mask of PRM: how far a parameter may move, given its gradient's signal and noise.

Pure functions of tensors and numbers. Every implementation of the step (for-loop, foreach, fused) and the
statistics compute the mask from here, so that all of them decide alike.

References
----------
Litman and Guo, "A Theory of Generalization in Deep Learning", arXiv:2605.01172 (the masks and boundaries).
Balles and Hennig, "Dissecting Adam", ICML 2018, arXiv:1705.07774 (`variance_of_mean`).
Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 1994 (`threshold`).
"""

from popriskmin.mask.corrections import Corrections, Number, corrections, variance_of_mean
from popriskmin.mask.evaluate import (
    check_function,
    evaluate,
    evaluate_lists,
    finish_signal_and_noise,
    floor,
    largest,
    shares_of_means,
    signal_and_noise,
)
from popriskmin.mask.hyperparameters import (
    BOUNDARIES,
    ORIGINS,
    REDUCTIONS,
    VARIANCES,
    Hyperparameters,
    Options,
    PRMGroup,
    boundary_coefficient,
    mean_coefficient,
)
from popriskmin.mask.masks import MASKS, Mask, hard, is_of_mean, none, snr, soft, threshold
from popriskmin.mask.own import MaskFunction, found_mask, mask_name
from popriskmin.mask.shrink import ever_pulls, loading, pulling_gradient, shrunk

__all__ = [
    "BOUNDARIES",
    "MASKS",
    "ORIGINS",
    "REDUCTIONS",
    "VARIANCES",
    "Corrections",
    "Hyperparameters",
    "Mask",
    "MaskFunction",
    "Number",
    "Options",
    "PRMGroup",
    "boundary_coefficient",
    "check_function",
    "corrections",
    "evaluate",
    "evaluate_lists",
    "ever_pulls",
    "finish_signal_and_noise",
    "floor",
    "found_mask",
    "hard",
    "is_of_mean",
    "largest",
    "loading",
    "mask_name",
    "mean_coefficient",
    "none",
    "pulling_gradient",
    "shares_of_means",
    "shrunk",
    "signal_and_noise",
    "snr",
    "soft",
    "threshold",
    "variance_of_mean",
]
