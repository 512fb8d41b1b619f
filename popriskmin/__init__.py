"""PRM, an optimizer that trains on population risk: AdamW with one running variance more."""

from popriskmin.optimizer import PRM
from popriskmin.version import __version__

__all__ = ["PRM", "__version__"]
