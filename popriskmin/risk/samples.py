"""The samples of the risk estimate: when they are taken, and what they add up to."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from popriskmin.mask import boundary_coefficient
from popriskmin.optimizer.groups import Group, parameter_names
from popriskmin.risk.expected_fall import Kept, Reuse, compare, keep, restored, same_pass, state_of

PARTS = ("group", "parameter")

EVERY_AT_FIRST = 8

# At most this many samples wait on the device.
WAITING = 256

# Share of the training time that samples may take. The hooks themselves take some ten
# microseconds of every step. Together they stay under 3% of a step of a millisecond.
SHARE = 0.01

# Samples that are timed before the pace is decided; the first of them warms up.
TIMED = 6

# A mean of fewer samples has no standard error to speak of.
FEWEST_SAMPLES = 20

# Correlation of the samples of neighbouring steps, which share most of one product.
NEIGHBOURS = 0.5


class Sample(NamedTuple):
    """The two terms of one step.

    Attributes
    ----------
    step
        The steps since the monitor was attached, this one included.
    fresh
        The expected fall of the risk as if the training set had no noise of its own.
    influence
        The most that the training set's own noise takes from it.
    """

    step: int
    fresh: float
    influence: float


class RiskEstimate(NamedTuple):
    """The return value of `RiskMonitor.estimate`.

    Falls of the population risk are in units of the loss, and positive where it falls.
    If a data set is used again and again the estimate has two ends, and the truth is
    expected between them, except for what weight decay undoes. If every batch is fresh
    the two ends are equal.

    Attributes
    ----------
    fresh
        The expected fall in one step as if the training set were the population,
        smoothed over the last steps.
    reused
        The same as if nothing of the training set's own noise had been fitted yet.
    fresh_stderr, reused_stderr
        Their standard errors, from the scatter of the samples. The biases that
        docs/risk.md names are not part of them.
    fresh_total, reused_total
        The expected fall since the monitor was attached, by either end.
    steps
        The steps since the monitor was attached.
    """

    fresh: float
    reused: float
    fresh_stderr: float
    reused_stderr: float
    fresh_total: float
    reused_total: float
    steps: int


class Pace:
    """Times training steps and other work, and says how often that work is due.

    On an accelerator it sees the time in which work is handed over, not the time that
    the work takes.

    Parameters
    ----------
    share
        The part of the training time that the work may take.
    """

    def __init__(self, share: float = SHARE) -> None:
        self.share = share
        self._steps: list[float] = []
        self._samples: list[float] = []
        self._since: float | None = None
        self._spent: float | None = None

    def step_ended(self) -> None:
        """Note the end of a training step; the other work's time is not counted."""
        now = time.perf_counter()
        if self._since is not None:
            self._steps.append(now - self._since - (self._spent or 0.0))
        if self._spent is not None:
            self._samples.append(self._spent)
        self._spent = None
        self._since = now

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """Time the work beside training."""
        start = time.perf_counter()
        yield
        self._spent = (self._spent or 0.0) + time.perf_counter() - start

    @property
    def known(self) -> bool:
        """Whether enough samples were timed."""
        return len(self._samples) >= TIMED

    def every(self) -> int:
        """Return the least power of two of steps in which a sample keeps to its share."""
        step, sample = statistics.median(self._steps), statistics.median(self._samples[1:])
        needed = sample / (self.share * step) if step > 0 else 1.0
        return 1 << max(0, math.ceil(math.log2(max(needed, 1.0))))


class Smoothed:
    """The exponentially weighted mean of a series, and its standard error.

    The scatter of a sample is taken from the differences of neighbours, which a slow
    trend leaves alone. If only neighbours are correlated, by `r`, those differences are
    too small by `1 - r`, and the mean's variance is larger by `1 + 2 * r`.

    Parameters
    ----------
    fewest
        The mean always averages over about this many samples or more.
    """

    def __init__(self, fewest: int) -> None:
        self._most_forgotten = math.exp(-1 / fewest)
        self.count = 0
        self._sum = 0.0
        self._weight = 0.0
        self._squared_weight = 0.0
        self._last = 0.0
        self._squares = 0.0
        self._squares_weight = 0.0

    def add(self, age: float, correlation: float, value: float) -> None:
        """Take in the next sample.

        Parameters
        ----------
        age
            The time since the sample before, in units of the horizon.
        correlation
            With the sample before, in [0, 1).
        value
            The sample.
        """
        kept = max(math.exp(-age), self._most_forgotten)
        if self.count:
            # Half the square of a difference has one sample's variance.
            inflation = (1 + 2 * correlation) / (1 - correlation)
            self._squares = kept * self._squares + inflation * (value - self._last) ** 2 / 2
            self._squares_weight = kept * self._squares_weight + 1
        self._sum = kept * self._sum + value
        self._weight = kept * self._weight + 1
        self._squared_weight = kept**2 * self._squared_weight + 1
        self._last = value
        self.count += 1

    @property
    def mean(self) -> float:
        """The weighted mean; NaN before the first sample."""
        return self._sum / self._weight if self.count else math.nan

    @property
    def stderr(self) -> float:
        """The standard error of the mean; NaN before the second sample."""
        if self._squares_weight == 0:
            return math.nan
        variance = self._squares / self._squares_weight
        return math.sqrt(variance * self._squared_weight) / self._weight


class Series:
    """Samples in the order of their steps, their smoothed means and their totals.

    Parameters
    ----------
    smoothing
        Horizon of the means in steps.
    """

    def __init__(self, smoothing: int) -> None:
        self.smoothing = smoothing
        self.samples: list[Sample] = []
        self.finite = True  # whether the last sample was
        self._ends = (Smoothed(FEWEST_SAMPLES), Smoothed(FEWEST_SAMPLES))
        self._totals = [0.0, 0.0]

    def add(self, sample: Sample) -> None:
        """Take in the sample of a later step; note one that is not finite, and drop it."""
        self.finite = math.isfinite(sample.fresh) and math.isfinite(sample.influence)
        if not self.finite:
            return
        before = self.samples[-1] if self.samples else sample._replace(step=0)
        gap = sample.step - before.step
        values = (sample.fresh, sample.fresh - sample.influence)
        last_values = (before.fresh, before.fresh - before.influence)
        for i, (value, last) in enumerate(zip(values, last_values)):
            self._ends[i].add(gap / self.smoothing, NEIGHBOURS if gap == 1 else 0.0, value)
            # Between samples the fall is taken to change evenly.
            self._totals[i] += gap * (value + last) / 2
        self.samples.append(sample)

    def estimate(self, steps: int) -> RiskEstimate:
        """Return the estimate after `steps` steps; NaN after one that is not finite."""
        fresh, reused = self._ends
        numbers = [fresh.mean, reused.mean, fresh.stderr, reused.stderr, *self._totals]
        return RiskEstimate._make([*(numbers if self.finite else [math.nan] * 6), steps])


def by_part(
    samples: Sequence[Sample],
    rows: Sequence[Tensor],
    groups: Sequence[Group],
    kept: str,
    by: str,
) -> dict[str, list[Sample]]:
    """Return the samples of each part by its name.

    Parameters
    ----------
    samples, rows
        Equally many: each sample, and the table of shape (parts, 2) that it is the sum
        of.
    groups
        The optimizer's.
    kept, by
        "group" or "parameter": the meaning of a row in the tables, and the parts asked
        for.
    """
    names = parameter_names(groups)
    if kept == "group":
        owners = [f"group {i}" for i in range(len(groups))]
    elif by == "group":
        owners = [f"group {i}" for i, names_of in enumerate(names) for _ in names_of]
    else:
        owners = [str(name) for names_of in names for name in names_of]
    parts: dict[str, list[Sample]] = {}
    for sample, table in zip(samples, rows):
        sums: dict[str, list[float]] = {}
        for owner, (fresh, influence) in zip(owners, table.tolist()):
            pair = sums.setdefault(owner, [0.0, 0.0])
            pair[0] += fresh
            pair[1] += influence
        for owner, (fresh, influence) in sums.items():
            parts.setdefault(owner, []).append(Sample(sample.step, fresh, influence))
    return parts


class Sampler:
    """Takes a sample of the estimate every so many steps.

    Parameters
    ----------
    optimizer
        Its steps are announced by `gradients_ready`, before a step, and `step_ended`.
    every, replacement, smoothing, by
        As in `RiskMonitor`.
    counts
        `batch_size` and `n_dataset`; if they are None the optimizer's own.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        every: int | None,
        counts: tuple[int | None, int | None],
        replacement: bool,
        smoothing: int,
        by: str | None,
    ) -> None:
        self.optimizer = optimizer
        self.every = EVERY_AT_FIRST if every is None else every
        self.by = by
        self.steps = 0
        self._pace = Pace() if every is None else None
        self._counts = counts
        self._replacement = replacement
        self._kept: Kept | None = None
        self._waiting: list[tuple[int, Tensor]] = []
        self._rows: list[Tensor] = []  # with `by`: the tables behind the samples
        self._series = Series(smoothing)

    @property
    def awaits_gradients(self) -> bool:
        """Whether a sampled step waits for the gradients of the next."""
        return self._kept is not None

    def gradients_ready(self) -> None:
        """Finish a sample: the next gradients are there and not used yet."""
        kept, self._kept = self._kept, None
        if kept is None:
            return
        with self._spending():
            rows = compare(kept, self.optimizer, self.by)
            if rows is None:
                return
            if self._waiting and self._waiting[0][1].shape != rows.shape:
                self._absorb()  # a group was added
            self._waiting.append((kept.step, rows))
            if len(self._waiting) >= WAITING:
                self._absorb()

    def step_ended(self) -> None:
        """Count a step, and begin a sample where one is due."""
        self.steps += 1
        if self._pace is not None:
            self._pace.step_ended()
            if self._pace.known:
                self.every, self._pace = self._pace.every(), None
        if self.steps % self.every == 0:
            with self._spending():
                reuse = [self._reuse(group) for group in self.optimizer.param_groups]
                self._kept = keep(self.optimizer, self.steps, reuse)

    def _spending(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._pace is None else self._pace.spending()

    def _reuse(self, group: Group) -> Reuse:
        batch_size, n_dataset = self._counts_of(group)
        if batch_size is None or n_dataset is None:
            return Reuse(0.0, 0.0)
        if self._taken(group) * batch_size <= n_dataset:
            return Reuse(0.0, 0.0)
        a = boundary_coefficient("empirical", batch_size, n_dataset)
        shuffled = 0.0 if self._replacement else a * same_pass(group["betas"][0], n_dataset / batch_size)
        return Reuse(a, shuffled)

    def _counts_of(self, group: Group) -> tuple[int | None, int | None]:
        own = group.get("batch_size"), group.get("n_dataset")
        return own if self._counts[1] is None else self._counts

    def _taken(self, group: Group) -> int:
        """Return the steps taken, also those before the monitor if the host knows them."""
        state = self.optimizer.state
        steps = [state[param].get("step", 0) for param in group["params"] if param in state]
        known = [int(t) for t in steps if not isinstance(t, Tensor) or t.device.type == "cpu"]
        return max([self.steps, *known])

    def passes(self) -> float | None:
        """Return the passes over the data of the group that has seen least.

        None if no group has a data set.
        """
        passes = []
        for group in self.optimizer.param_groups:
            batch_size, n_dataset = self._counts_of(group)
            if batch_size is not None and n_dataset is not None:
                passes.append(self._taken(group) * batch_size / n_dataset)
        return min(passes, default=None)

    def steps_of_a_pass(self) -> int | None:
        """Return the steps of the longest pass of a group; None without a data set."""
        counts = [self._counts_of(group) for group in self.optimizer.param_groups]
        steps = [math.ceil(n / b) for b, n in counts if b is not None and n is not None]
        return max(steps, default=None)

    def series(self) -> Series:
        """Return the samples so far, those that wait on the device too."""
        self._absorb()
        return self._series

    def _absorb(self) -> None:
        """Bring the samples that wait on the device to the host, in one transfer."""
        if not self._waiting:
            return
        device = self._waiting[0][1].device
        table = torch.stack([rows.to(device) for _, rows in self._waiting]).cpu().double()
        for (step, _), rows in zip(self._waiting, table):
            fresh, influence = rows.sum(0).tolist()
            self._series.add(Sample(step, fresh, influence))
            if self._series.finite and self.by is not None:
                self._rows.append(rows.clone())
        self._waiting = []

    def parts(self, by: str) -> dict[str, list[Sample]]:
        """Return the samples of each part by its name."""
        self._absorb()
        groups = self.optimizer.param_groups
        return by_part(self._series.samples, self._rows, groups, self.by or by, by)

    def estimates(self, by: str) -> dict[str, RiskEstimate]:
        """Return the estimate of each part by its name."""
        estimates = {}
        for name, samples in self.parts(by).items():
            series = Series(self._series.smoothing)
            for sample in samples:
                series.add(sample)
            estimates[name] = series.estimate(self.steps)
        return estimates

    def state_dict(self) -> dict[str, object]:
        """Return what a checkpoint needs: tensors and plain numbers."""
        self._absorb()
        samples = torch.tensor(self._series.samples, dtype=torch.float64)
        return {
            "steps": self.steps,
            "every": self.every,
            "pace": self._pace is not None,
            "samples": samples.reshape(-1, len(Sample._fields)),
            "rows": list(self._rows),
            "kept": state_of(self._kept, self.optimizer),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned.

        Raises
        ------
        ValueError
            If its gradients do not fit the parameters; nothing is changed then.
        """
        self._kept = restored(state_dict["kept"], self.optimizer)
        self.steps = state_dict["steps"]
        self.every, self._pace = state_dict["every"], Pace() if state_dict["pace"] else None
        self._waiting, self._rows = [], list(state_dict["rows"])
        self._series = Series(self._series.smoothing)
        for step, fresh, influence in state_dict["samples"].tolist():
            self._series.add(Sample(int(step), fresh, influence))
