"""Does training still generalize? An estimate of the fall of the population risk, read off an optimizer's state."""

from popriskmin.risk.monitor import RiskEstimate, RiskMonitor

__all__ = ["RiskEstimate", "RiskMonitor"]
