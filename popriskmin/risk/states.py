"""What may be loaded into a risk monitor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from popriskmin.risk.series import Sample

STATE_FORMAT = 1

FIELDS = ("format", "steps", "every", "pace", "samples", "rows", "kept", "held_out")


def check_state(state_dict: Mapping[str, Any], by: str | None, held_out: bool) -> None:
    """Raise ValueError for what is no state of a monitor with this `by`, and held-out losses or none."""
    missing = set(FIELDS) - set(state_dict)
    if missing:
        raise ValueError(f"not the state of a RiskMonitor: it lacks {', '.join(sorted(missing))}")
    if not isinstance(state_dict["format"], int) or state_dict["format"] > STATE_FORMAT:
        raise ValueError(
            f"the state of a RiskMonitor has format {state_dict['format']}, and this version of popriskmin reads "
            f"formats up to {STATE_FORMAT}; a newer version can load it"
        )
    for name in ("steps", "every"):
        if not isinstance(state_dict[name], int) or state_dict[name] < (name == "every"):
            raise ValueError(f"not the state of a RiskMonitor: {name} is {state_dict[name]!r}")
    samples = state_dict["samples"]
    if not isinstance(samples, Tensor) or samples.dim() != 2 or samples.shape[1] != len(Sample._fields):
        raise ValueError("not the state of a RiskMonitor: samples is no table of three columns")
    if len(state_dict["rows"]) != (len(samples) if by is not None else 0):
        raise ValueError(f"the state of a RiskMonitor has other parts than this one, which has by={by!r}")
    if (state_dict["held_out"] is not None) != held_out:
        has, needs = ("no ", "") if held_out else ("", "no ")
        raise ValueError(f"the state of a RiskMonitor has {has}held-out losses, and this one {needs}held_out")
