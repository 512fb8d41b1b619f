"""The class `PRM` and the mask around other optimizers: their arguments, groups, checkpoints and statistics."""

from popriskmin.optimizer.masked import Masked
from popriskmin.optimizer.prm import PRM

__all__ = ["PRM", "Masked"]
