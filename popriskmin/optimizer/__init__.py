"""The class `PRM`: its arguments, groups, checkpoints and statistics."""

from popriskmin.optimizer.prm import PRM

__all__ = ["PRM"]
