"""The samples of the risk estimate: when they are taken, where they wait, and what they have come to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from popriskmin.mask import boundary_coefficient
from popriskmin.risk.expected_fall import same_pass
from popriskmin.risk.gradient_pairs import Kept, Reuse, compare, keep, restored, state_of
from popriskmin.risk.pace import Pace
from popriskmin.risk.parts import by_part
from popriskmin.risk.series import RiskEstimate, Sample, Series

EVERY_AT_FIRST = 8

# Samples wait on the device, and so many at most.
WAITING = 256


class Sampler:
    """Takes a sample of the estimate every so many steps.

    Parameters
    ----------
    optimizer
        Whose steps are told of by `gradients_ready`, before a step, and `step_ended`, after it.
    every, replacement, smoothing, by
        As `RiskMonitor` has them.
    counts
        `batch_size` and `n_dataset`; the optimizer's own where they are None.
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
        self._rows: list[Tensor] = []  # with `by`, what the samples are sums of
        self._series = Series(smoothing)

    @property
    def awaits_gradients(self) -> bool:
        """Whether a sampled step waits for the gradients of the next."""
        return self._kept is not None

    def gradients_ready(self) -> None:
        """Finish a sample: the gradients after the sampled step are there, and the step that uses them is not taken."""
        kept, self._kept = self._kept, None
        if kept is None:
            return
        with self._spending():
            found = compare(kept, self.optimizer, self.by)
            if found is None:
                return
            if self._waiting and self._waiting[0][1].shape != found.shape:  # a group has come in
                self._absorb()
            self._waiting.append((kept.step, found))
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
                self._kept = keep(self.optimizer, self.steps, [self._reuse(g) for g in self.optimizer.param_groups])

    def _spending(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._pace is None else self._pace.spending()

    def _reuse(self, group: Mapping[str, Any]) -> Reuse:
        batch_size, n_dataset = self._counts_of(group)
        if batch_size is None or n_dataset is None or self._taken(group) * batch_size <= n_dataset:
            return Reuse(0.0, 0.0)
        a = boundary_coefficient("empirical", batch_size, n_dataset)
        return Reuse(a, 0.0 if self._replacement else a * same_pass(group["betas"][0], n_dataset / batch_size))

    def _counts_of(self, group: Mapping[str, Any]) -> tuple[int | None, int | None]:
        return self._counts if self._counts[1] is not None else (group.get("batch_size"), group.get("n_dataset"))

    def _taken(self, group: Mapping[str, Any]) -> int:
        """Return the steps taken, those before the monitor was attached too where the host knows of them."""
        steps = (
            self.optimizer.state[param].get("step", 0) for param in group["params"] if param in self.optimizer.state
        )
        known = [int(step) for step in steps if not isinstance(step, Tensor) or step.device.type == "cpu"]
        return max([self.steps, *known])

    def passes(self) -> float | None:
        """Return how often the data set has been gone through, by the group that has seen least; None without one."""
        found = []
        for group in self.optimizer.param_groups:
            batch_size, n_dataset = self._counts_of(group)
            if batch_size is not None and n_dataset is not None:
                found.append(self._taken(group) * batch_size / n_dataset)
        return min(found, default=None)

    def steps_of_a_pass(self) -> int | None:
        """Return the steps that the longest pass of a group takes; None where no group has a data set."""
        counts = [self._counts_of(group) for group in self.optimizer.param_groups]
        return max((math.ceil(n / b) for b, n in counts if b is not None and n is not None), default=None)

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
        return by_part(self._series.samples, self._rows, self.optimizer.param_groups, self.by or by, by)

    def estimates(self, by: str) -> dict[str, RiskEstimate]:
        """Return the estimate of each part by its name."""
        found = {}
        for name, samples in self.parts(by).items():
            series = Series(self._series.smoothing)
            for sample in samples:
                series.add(sample)
            found[name] = series.estimate(self.steps)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs; tensors and plain numbers."""
        self._absorb()
        return {
            "steps": self.steps,
            "every": self.every,
            "pace": self._pace is not None,
            "samples": torch.tensor(self._series.samples, dtype=torch.float64).reshape(-1, len(Sample._fields)),
            "rows": list(self._rows),
            "kept": state_of(self._kept, self.optimizer),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises
        ------
        ValueError
            Where gradients in it do not fit the parameters; nothing is changed then.
        """
        self._kept = restored(state_dict["kept"], self.optimizer)
        self.steps = state_dict["steps"]
        self.every, self._pace = state_dict["every"], Pace() if state_dict["pace"] else None
        self._waiting, self._rows = [], list(state_dict["rows"])
        self._series = Series(self._series.smoothing)
        for step, fresh, influence in state_dict["samples"].tolist():
            self._series.add(Sample(int(step), fresh, influence))
