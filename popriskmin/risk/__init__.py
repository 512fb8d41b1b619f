"""Does training still generalize? What held-out examples say, or an estimate read off an optimizer's state."""

from popriskmin.risk.monitor import RiskMonitor
from popriskmin.risk.series import RiskEstimate

__all__ = ["RiskEstimate", "RiskMonitor"]
