"""The population-risk estimate: what training still gains on data that it has not seen, without such data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from popriskmin.mask import boundary_coefficient
from popriskmin.optimizer.initializing import made_state_alone
from popriskmin.optimizer.options import check_counts
from popriskmin.optimizer.prm import PRM
from popriskmin.optimizer.unwrap import described, unwrapped
from popriskmin.risk.adam_variance import Variances
from popriskmin.risk.pace import Pace
from popriskmin.risk.smoothing import Smoothed
from popriskmin.risk.terms import fall_and_influence, hyperparameters, moments, same_pass
from popriskmin.step.compat import run_uncompiled

STATE_FORMAT = 1

# A standard error of fewer samples says too little.
FEWEST_SAMPLES = 6

EVERY_AT_FIRST = 8

# Samples wait on the device, and so many at most.
WAITING = 256


class RiskEstimate(NamedTuple):
    """What `RiskMonitor.estimate` returns; falls of the population risk in units of the loss, positive where it falls.

    Attributes
    ----------
    per_step
        The expected fall in one step, smoothed over the last steps.
    total
        The expected fall since the monitor was attached.
    stderr
        The standard error of `per_step`, from how the samples scatter; the biases in docs/risk.md come on top.
    steps
        The steps seen.
    fresh, reused
        As `per_step` with `unfitted` 0, as if the training set were the world, and 1, as if nothing of its noise had
        been fitted yet: the two ends between which the truth is expected, but for what weight decay undoes. Without
        `n_dataset` both are `per_step`.
    """

    per_step: float
    total: float
    stderr: float
    steps: int
    fresh: float
    reused: float


class Sample(NamedTuple):
    """The terms of one step: the expected fall but for the training set's own noise, and what that takes at most."""

    step: int
    fresh: float
    influence: float


class RiskMonitor:
    """Estimates from an optimizer's state by how much each step lowers the population risk.

    For each scalar the mean gradient `m^` is the population's gradient `u` and noise of variance `k * z`, where `z` is
    the variance of the minibatch gradient. So a step is expected to lower the risk by the sum over scalars of::

        lr / (sqrt(v^) + eps) * (q * m^**2 - k * z * d(q * m^)/dm^)

    with `q` PRM's mask, and 1 for Adam and AdamW, where this is `lr * (m^**2 - k * z) / (sqrt(v^) + eps)`. Where
    `n_dataset` examples are used again and again, two terms in `a * z`, `a = batch_size / (n_dataset - batch_size)`,
    are added in the bracket: what batches of one pass, having no example in common, take from `m^**2`, and what the
    training gradient owes to the noise of the training set, `-unfitted * a * z`, of which training uses up more and
    more. Derivation, assumptions, biases and how well it follows the held-out loss: docs/risk.md.

    It looks at every `every`-th step through `register_step_post_hook`, changes nothing, and waits for the device only
    when asked for a result, and once in 256 samples. A parameter without a gradient has not moved and does not count.

    Parameters
    ----------
    optimizer
        `PRM`, `torch.optim.AdamW` or `torch.optim.Adam`. For the last two, which keep no variance, the
        monitor keeps one, a tensor per parameter, and feeds it at the sampled steps; for PRM it keeps nothing.
    every
        Steps from one sample to the next. None begins with 8 and measures for 48 steps how long a step takes and how
        long a sample; then it is the power of two that keeps samples to 1% of the time. That depends on the
        machine: give a number where a run must give the same numbers twice.
    n_dataset, batch_size
        Numbers of examples in the data set and in a step (of all micro-batches and ranks together), where the data set
        is used more than once. Taken from PRM's groups if they have them and nothing is given here.
    unfitted
        The share of the training set's own noise that has not been fitted yet, in [0, 1]. 1 is right at the beginning,
        and expects the least; what it is later depends on the problem. The default is what fitted the runs of
        docs/risk.md best.
    replacement
        Whether batches are drawn with replacement, and not in shuffled passes over the data set.
    smoothing
        Steps over which `per_step` is averaged, with exponentially falling weights.
    confidence
        With which `overfitting` is said at one look, between 0.5 and 1. The default asks for little more than that the
        smoothed fall be negative: what scatters is much, and waiting for 95% costs more than it saves.

    Raises
    ------
    TypeError
        For another optimizer.
    ValueError
        For an argument out of range, `n_dataset` without `batch_size` or the reverse, and Adam without a mean
        (`betas[0]` of 0).

    References
    ----------
    Litman and Guo, "A Theory of Generalization in Deep Learning", arXiv:2605.01172. Stein, "Estimation of the Mean of
    a Multivariate Normal Distribution", 1981 (the derivative of `q * m^`).

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(2000, 5)
    >>> y = x.sum(1, keepdim=True) + torch.randn(2000, 1)
    >>> model = torch.nn.Linear(5, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    >>> monitor = RiskMonitor(optimizer)
    >>> for rows in torch.arange(2000).split(10):
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
    ...     optimizer.step()
    >>> estimate = monitor.estimate()
    >>> estimate.steps, estimate.total > 0, monitor.overfitting
    (200, True, False)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        every: int | None = None,
        n_dataset: int | None = None,
        batch_size: int | None = None,
        unfitted: float = 0.25,
        replacement: bool = False,
        smoothing: int = 50,
        confidence: float = 0.6,
    ) -> None:
        found = unwrapped(optimizer)
        optimizer = found.optimizer
        if not isinstance(optimizer, (PRM, torch.optim.Adam, torch.optim.AdamW)):
            raise TypeError(
                f"RiskMonitor reads popriskmin.PRM, torch.optim.AdamW and torch.optim.Adam, got {described(found)}"
            )
        for name, value in (("every", 1 if every is None else every), ("smoothing", smoothing)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        if not (_is_number(unfitted) and 0 <= unfitted <= 1):
            raise ValueError(f"unfitted must be a share from 0 to 1, got {unfitted!r}")
        if not (_is_number(confidence) and 0.5 < confidence < 1):
            raise ValueError(f"confidence must be between 0.5 and 1, got {confidence!r}")
        if not isinstance(replacement, bool):
            raise ValueError(f"replacement must be True or False, got {replacement!r}")
        if (n_dataset is None) != (batch_size is None):
            raise ValueError(
                f"n_dataset and batch_size are needed together, got n_dataset={n_dataset} and batch_size={batch_size}"
            )
        check_counts({"warmup_steps": 0, "batch_size": batch_size, "n_dataset": n_dataset})
        for group in optimizer.param_groups:
            hyperparameters(optimizer, group)  # says what is wrong before a step does
        self.optimizer = optimizer
        self._pace = Pace() if every is None else None
        self.every = EVERY_AT_FIRST if every is None else every
        self.smoothing = smoothing
        self.confidence = confidence
        self._counts = (batch_size, n_dataset)
        self.unfitted = unfitted
        self.replacement = replacement
        self._variances = Variances()
        self._steps = 0
        self._waiting: list[tuple[int, Tensor]] = []
        self._samples: list[Sample] = []
        self._smoothed = Smoothed(FEWEST_SAMPLES)
        self._total = 0.0
        self._finite = True
        self._handle = optimizer.register_step_post_hook(run_uncompiled(self._after_step))

    def detach(self) -> None:
        """Stop watching; what has been seen stays."""
        self._handle.remove()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if made_state_alone(optimizer, counted=0 if isinstance(optimizer, PRM) else 1):
            return  # a distributed checkpoint has begun to load
        self._steps += 1
        due = self._steps % self.every == 0
        if self._pace is not None:
            self._pace.step_ended()
        if due:
            self._sample()
        if self._pace is not None and self._pace.sample_ended(due):
            self.every, self._pace = self._pace.every(), None

    @torch.no_grad()
    def _sample(self) -> None:
        gathered: Tensor | None = None
        for group in self.optimizer.param_groups:
            hyper = hyperparameters(self.optimizer, group)
            if not isinstance(self.optimizer, PRM):
                self._variances.update(group["params"], self.optimizer, hyper, self._steps)
            a, added = self._reuse(group)
            for entry in moments(group["params"], self.optimizer, hyper, self._variances.tensors):
                fall, influence = fall_and_influence(entry, hyper).unbind()
                terms = torch.stack([fall + influence * added, influence * a])
                gathered = terms if gathered is None else gathered + terms.to(gathered.device)
        if gathered is not None:
            self._waiting.append((self._steps, gathered))
        if len(self._waiting) >= WAITING:
            self._absorb()

    def _reuse(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """Return `a`, and what shuffled passes take from `m^**2` in units of `z`; zeros while no example came twice."""
        batch_size, n_dataset = self._counts
        if n_dataset is None:
            batch_size, n_dataset = group.get("batch_size"), group.get("n_dataset")
        if batch_size is None or n_dataset is None or self._taken(group) * batch_size <= n_dataset:
            return 0.0, 0.0
        a = boundary_coefficient("empirical", batch_size, n_dataset)
        return a, 0.0 if self.replacement else a * same_pass(group["betas"][0], n_dataset / batch_size)

    def _taken(self, group: Mapping[str, Any]) -> int:
        """Return the steps taken, those before the monitor was attached too where the host knows of them."""
        steps = (
            self.optimizer.state[param].get("step", 0) for param in group["params"] if param in self.optimizer.state
        )
        known = [int(step) for step in steps if not isinstance(step, Tensor) or step.device.type == "cpu"]
        return max([self._steps, *known])

    def _absorb(self) -> None:
        """Bring the samples that wait on the device to the host, in one transfer."""
        if self._waiting:
            steps = [step for step, _ in self._waiting]
            values = torch.stack([terms.to(self._waiting[0][1].device) for _, terms in self._waiting]).tolist()
            self._waiting = []
            for step, (fresh, influence) in zip(steps, values):
                self._add(Sample(step, fresh, influence))

    def _add(self, sample: Sample) -> None:
        expected = sample.fresh - self.unfitted * sample.influence
        self._finite = math.isfinite(expected)
        if not self._finite:
            return
        before = self._samples[-1] if self._samples else sample._replace(step=0)
        gap = sample.step - before.step
        # Between samples the fall is taken to change evenly.
        self._total += gap * (expected + before.fresh - self.unfitted * before.influence) / 2
        self._samples.append(sample)
        # Neighbours share gradients: their means have the correlation beta1**gap, the squares of which these are made.
        correlation = max(group["betas"][0] for group in self.optimizer.param_groups) ** (2 * gap)
        self._smoothed.add(gap / self.smoothing, correlation, expected, sample.fresh, sample.influence)

    @property
    def samples(self) -> list[Sample]:
        """The samples so far, one for every `every` steps, from the second step on; a list of `Sample`."""
        self._absorb()
        return list(self._samples)

    def estimate(self) -> RiskEstimate:
        """Return the estimate as it stands.

        Raises
        ------
        RuntimeError
            Before the first sample.
        """
        self._absorb()
        if not self._samples and self._finite:
            raise RuntimeError(
                f"no sample yet: the optimizer has taken {self._steps} steps since the monitor was attached, and every "
                f"{self.every} of them give one, from the second on"
            )
        per_step, fresh, influence = self._smoothed.means if self._finite else [math.nan] * 3
        return RiskEstimate(
            per_step=per_step,
            total=self._total if self._finite else math.nan,
            stderr=self._smoothed.stderr if self._finite else math.nan,
            steps=self._steps,
            fresh=fresh,
            reused=fresh - influence,
        )

    @property
    def overfitting(self) -> bool:
        """Whether the expected fall, smoothed, is negative with the stated confidence: the risk is rising.

        The confidence is that of one look. Where nothing is left to learn the expected fall is 0, and who looks long
        enough sees it below by chance: without `n_dataset` this says that training has come to rest, not that it does
        harm. False before the sixth sample, and after a sample that is not finite. It can become false again; who stops
        by it stops the first time it is true.
        """
        self._absorb()
        smoothed = self._smoothed
        if smoothed.count < FEWEST_SAMPLES or not self._finite:
            return False
        return smoothed.means[0] + NormalDist().inv_cdf(self.confidence) * smoothed.stderr < 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, so that a run that goes on from it gives the same numbers.

        Tensors and plain numbers: `torch.load(..., weights_only=True)` reads it.
        """
        self._absorb()
        return {
            "format": STATE_FORMAT,
            "steps": self._steps,
            "every": self.every,
            "pace": self._pace is not None,
            "variances": self._variances.state(self.optimizer),
            "samples": torch.tensor(self._samples, dtype=torch.float64).reshape(-1, len(Sample._fields)),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; the optimizer's own is loaded by itself.

        Raises
        ------
        ValueError
            For something that is no state of a RiskMonitor, of a newer version, or of other parameters.
        """
        missing = {"format", "steps", "every", "pace", "samples", "variances"} - set(state_dict)
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
        rows = state_dict["samples"]
        if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.shape[1] != len(Sample._fields):
            raise ValueError("not the state of a RiskMonitor: samples is no table of three columns")
        self._variances.load(state_dict["variances"], self.optimizer)
        self._steps = state_dict["steps"]
        self.every, self._pace = state_dict["every"], Pace() if state_dict["pace"] else None
        self._waiting, self._samples = [], []
        self._smoothed, self._total, self._finite = Smoothed(FEWEST_SAMPLES), 0.0, True
        for step, fresh, influence in rows.tolist():
            self._add(Sample(int(step), fresh, influence))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)
