"""Whether training still generalizes: by held-out examples, or by an estimate."""

from popriskmin.risk.monitor import RiskMonitor
from popriskmin.risk.samples import RiskEstimate

__all__ = ["RiskEstimate", "RiskMonitor"]
