"""PRM, an optimizer that trains on population risk: AdamW with one running variance more."""

import sys

from popriskmin.diagnosis import ShrinkageController, SoftnessController, controller, diagnose, noise
from popriskmin.optimizer import PRM, Masked, groups
from popriskmin.optimizer.groups import param_groups
from popriskmin.optimizer.patch import apply_patch, patch, patch_size
from popriskmin.optimizer.unwrap import unwrap
from popriskmin.risk import RiskMonitor
from popriskmin.step import functional, kernels, rounding
from popriskmin.variance import Examples, Microbatches, Ranks, coherence
from popriskmin.version import __version__

__all__ = [
    "PRM",
    "Examples",
    "Masked",
    "Microbatches",
    "Ranks",
    "RiskMonitor",
    "ShrinkageController",
    "SoftnessController",
    "__version__",
    "apply_patch",
    "coherence",
    "diagnose",
    "param_groups",
    "patch",
    "patch_size",
    "unwrap",
]

# What the pages of 0.1.0 named by the module's place at that time is found there still.
for _module in (controller, functional, groups, kernels, noise, rounding):
    sys.modules[f"popriskmin.{_module.__name__.rpartition('.')[2]}"] = _module


def __dir__() -> list[str]:
    """Return the public names alone."""
    return __all__
