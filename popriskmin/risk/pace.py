"""How often something may be done beside training without being felt."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator

# Share of the training time that samples may take. The hooks themselves take some ten microseconds of every step:
# together they shall stay under 3% where a step takes a millisecond.
SHARE = 0.01

# Samples that are timed before it is decided; the first of them warms up.
TIMED = 6


class Pace:
    """Times training steps and what is done beside them, and says after how many steps that is due again.

    On an accelerator it sees the time in which work is handed over, not the time that the work takes.

    Parameters
    ----------
    share
        Of the training time, that may be spent.
    """

    def __init__(self, share: float = SHARE) -> None:
        self.share = share
        self._steps: list[float] = []
        self._samples: list[float] = []
        self._since: float | None = None
        self._spent: float | None = None

    def step_ended(self) -> None:
        """Note the end of a training step; what was spent since the one before is no part of it."""
        now = time.perf_counter()
        if self._since is not None:
            self._steps.append(now - self._since - (self._spent or 0.0))
        if self._spent is not None:
            self._samples.append(self._spent)
        self._spent = None
        self._since = now

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """Time what is done beside training."""
        start = time.perf_counter()
        yield
        self._spent = (self._spent or 0.0) + time.perf_counter() - start

    @property
    def known(self) -> bool:
        """Whether enough was seen."""
        return len(self._samples) >= TIMED

    def every(self) -> int:
        """Return the smallest power of two of steps over which one sample takes no more than its share."""
        step, sample = statistics.median(self._steps), statistics.median(self._samples[1:])
        needed = sample / (self.share * step) if step > 0 else 1.0
        return 1 << max(0, math.ceil(math.log2(max(needed, 1.0))))
