"""PRM in training frameworks: one file each, and the numbers for their logs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from popriskmin.diagnosis import diagnose
from popriskmin.diagnosis.rows import FAULTS, FINE
from popriskmin.optimizer.stats import MaskStats, combined
from popriskmin.optimizer.unwrap import unwrapped_prm
from popriskmin.risk import RiskMonitor

__all__ = ["VERDICTS", "log"]

# The monitor's verdicts as numbers, for trackers that take nothing else.
VERDICTS = {"improving": 1.0, "unclear": 0.0, "overfitting": -1.0}


def log(
    optimizer: Any, monitor: RiskMonitor | None = None, *, diagnosis: bool = False, local: bool = False
) -> dict[str, float]:
    """Return the log of a `PRM` as one flat dict of floats, for any tracker.

    This waits for the device: call it where you log, not at every step.

    Parameters
    ----------
    optimizer
        A `PRM`, wrapped by a framework or not. Under `ZeroRedundancyOptimizer` the
        figures are this rank's.
    monitor
        Adds what a `RiskMonitor` has to say.
    diagnosis
        Count the tensors by what `diagnose` finds, each of its causes in a figure of
        its own, as `prm/diagnosis/noise`. All ranks must ask.
    local
        Under FSDP2: this rank's shards alone, without a message, so that one rank may
        log by itself. Without it all ranks must ask.

    Returns
    -------
    dict
        Empty before the first step. Then, for everything together, `prm/mean_q` and the
        other numbers of `get_mask_stats`. `prm/lr` and `prm/softness`; where there are
        several groups, these and the statistics come for each, as `prm/group0/lr`. From
        the monitor, as soon as it has them: `prm/verdict`, 1 for "improving", 0 for
        "unclear" and -1 for "overfitting"; `prm/fresh`, `prm/reused`, `prm/fresh_total`
        and `prm/reused_total` of its estimate; `prm/held_out`, the mean held-out loss
        of the last look, and `prm/best_step`.

    Raises
    ------
    TypeError
        For another optimizer.
    ValueError
        For `diagnosis` together with `local`.

    Examples
    --------
    >>> import torch
    >>> from popriskmin import PRM
    >>> w = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = PRM([w], lr=0.1, softness=3.0)
    >>> log(optimizer)
    {}
    >>> w.grad = torch.tensor([1.0, -2.0, 0.5])
    >>> optimizer.step()
    >>> {name: round(value, 4) for name, value in log(optimizer).items() if name in ("prm/mean_q", "prm/lr")}
    {'prm/mean_q': 0.25, 'prm/lr': 0.1}
    """
    if diagnosis and local:
        raise ValueError("diagnosis needs the figures of all ranks: leave out local=True, or diagnosis=True")
    prm = unwrapped_prm(optimizer, "log").optimizer
    rows: dict[int, MaskStats] = prm.get_mask_stats(by="group", local=local)
    if not rows:
        return {}
    values = _prefixed("prm", combined(rows.values()))
    several = len(prm.param_groups) > 1
    for i, group in enumerate(prm.param_groups):
        place = f"prm/group{i}" if several else "prm"
        values |= _prefixed(place, rows.get(i, {}) if several else {})
        values |= _prefixed(place, {"lr": float(group["lr"]), "softness": float(group["softness"])})
    if monitor is not None:
        values |= _prefixed("prm", _judged(monitor))
    if diagnosis:
        counts = Counter(row.cause for row in diagnose(prm).rows)
        values |= _prefixed("prm/diagnosis", {cause.replace(" ", "_"): counts[cause] for cause in (*FINE, *FAULTS)})
    return values


def _judged(monitor: RiskMonitor) -> dict[str, float]:
    values: dict[str, float] = {}
    verdict = monitor.verdict
    if verdict is not None:
        values["verdict"] = VERDICTS[verdict]
    with contextlib.suppress(RuntimeError):  # no sample yet
        estimate = monitor.estimate()
        values |= {name: getattr(estimate, name) for name in ("fresh", "reused", "fresh_total", "reused_total")}
    if monitor.held_out_curve and monitor.best_step is not None:
        values |= {"held_out": monitor.held_out_curve[-1][1], "best_step": monitor.best_step}
    return values


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": float(value) for name, value in values.items()}
