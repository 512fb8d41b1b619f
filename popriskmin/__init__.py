"""PRM, an optimizer that trains on population risk: AdamW with one running variance more."""

from popriskmin.diagnosis import diagnose
from popriskmin.groups import param_groups
from popriskmin.optimizer import PRM
from popriskmin.risk import RiskMonitor
from popriskmin.version import __version__

__all__ = ["PRM", "RiskMonitor", "__version__", "diagnose", "param_groups"]
