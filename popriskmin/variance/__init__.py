"""Sources of the gradient's variance that do not take a drift of the mean for noise.

Each measures how gradients differ that were computed with the same weights, and hands
the variance of `p.grad` to every step of an optimizer with `variance="given"`:
`Microbatches` from gradient accumulation, `Ranks` from DistributedDataParallel,
`Examples` from the gradients of single examples. `coherence` says how well those agree.
"""

from popriskmin.variance.coherence import Agreement, Coherence, coherence
from popriskmin.variance.examples import Examples
from popriskmin.variance.microbatches import Microbatches
from popriskmin.variance.ranks import Ranks

__all__ = ["Agreement", "Coherence", "Examples", "Microbatches", "Ranks", "coherence"]
