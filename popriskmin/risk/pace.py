"""How often something may be done beside training without being felt."""

from __future__ import annotations

import math
import statistics
import time

# Share of the training time that samples may take. The hook itself takes some ten microseconds of every step: together
# they shall stay under 3% where a step takes a millisecond.
SHARE = 0.01

# Samples that are timed before it is decided; the first of them warms up.
TIMED = 6


class Pace:
    """Times training steps and samples, and says after how many steps the next sample is due.

    On an accelerator it sees the time in which work is handed over, not the time that the work takes.
    """

    def __init__(self) -> None:
        self._steps: list[float] = []
        self._samples: list[float] = []
        self._since: float | None = None

    def step_ended(self) -> None:
        """Note the end of a training step, before a sample is taken."""
        now = time.perf_counter()
        if self._since is not None:
            self._steps.append(now - self._since)
        self._since = now

    def sample_ended(self, taken: bool) -> bool:
        """Note the end of a sample, or that none was taken; return whether enough was seen."""
        now = time.perf_counter()
        if taken and self._since is not None:
            self._samples.append(now - self._since)
        self._since = now
        return len(self._samples) >= TIMED

    def every(self) -> int:
        """Return the smallest power of two of steps over which one sample takes no more than its share."""
        step, sample = statistics.median(self._steps), statistics.median(self._samples[1:])
        needed = sample / (SHARE * step) if step > 0 else 1.0
        return 1 << max(0, math.ceil(math.log2(max(needed, 1.0))))
