"""The risk monitor: whether training still lowers the loss on unseen data."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from numbers import Real
from statistics import NormalDist
from typing import Any, overload

from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from popriskmin.optimizer.checkpoint_probe import made_state_alone, makes_state_alone
from popriskmin.optimizer.closure import Arguments, with_gradients
from popriskmin.optimizer.masked import Masked
from popriskmin.optimizer.options import check_counts
from popriskmin.optimizer.prm import PRM
from popriskmin.optimizer.unwrap import described, unwrapped
from popriskmin.risk.held_out import CONFIDENCE, IMPROVING, OVERFITTING, UNCLEAR, HeldOut
from popriskmin.risk.samples import PARTS, RiskEstimate, Sample, Sampler
from popriskmin.step.compat import run_uncompiled

# The estimate gives no verdict before this many samples.
FEWEST_FOR_A_VERDICT = 50

# From one sample to the next of an optimizer whose state is not read.
UNREAD = sys.maxsize

STATE_FORMAT = 1

FIELDS = ("format", "steps", "every", "pace", "samples", "rows", "kept", "held_out")


class RiskMonitor:
    """Says whether training still lowers the population risk.

    If a few examples can be spared, fifty say, hold them out and give `held_out`: the
    verdict then follows their losses. Without them the verdict follows an estimate from
    the optimizer's state and the gradients of two steps. A step takes `D(m)` off the
    weights, a function of the mean gradient `m`. The next batch's gradient `g'` is
    independent of it. So to second order, and without a further pass, the step lowers
    the risk by the sum over scalars of::

        (g' * D(m) + g * D(m')) / 2

    where `g` is the step's own gradient and `m'` the mean with `g'` in its place. This
    holds for fresh data. If `n_dataset` examples are used again and again, it is the
    fall on the training set. The part that only fits the set's own noise is known by
    its bounds alone, so the estimate has two ends. docs/risk.md gives the derivation,
    the assumptions, the biases, and how well all this follows the held-out loss.

    The monitor watches every `every`-th step through the optimizer's hooks and changes
    nothing. It keeps one copy of the gradients from a sampled step to the next. It
    waits for the device when a result is asked for, once in 256 samples, and to read
    held-out losses. Parameters without a gradient do not count.

    Parameters
    ----------
    optimizer
        `PRM`, `torch.optim.AdamW` or `torch.optim.Adam`, with `held_out` any other such
        as `Masked` too, of which there is no estimate; or a framework's wrapper around
        one.
    every
        Steps from one sample to the next. None begins with 8, measures for 48 steps how
        long a step and a sample take, and then takes the power of two that keeps
        samples to 1% of the time. That depends on the machine: give a number if a run
        must give the same numbers twice.
    n_dataset, batch_size
        Numbers of examples in the data set and in a step (of all micro-batches and
        ranks together), if the data set is used more than once. None takes those of
        PRM's groups.
    replacement
        Whether batches are drawn with replacement. If not, they come in shuffled
        passes.
    smoothing
        Steps over which the estimate is averaged, with exponentially falling weights.
    by
        "group" or "parameter": also keep the samples of these parts, for
        `estimate(by=...)` and `parts`. They tell which layer still learns something
        that generalizes.
    held_out
        A function without arguments that returns one loss for each held-out example,
        shape (examples,), of the same examples in the same order. It is called under
        `torch.no_grad()`. It has to put the model into evaluation mode and back itself,
        and to gather the losses if examples are spread over ranks. If parameters are
        sharded (FSDP2) the first look comes after the first step, and before it only
        with `keep_best`.
    held_out_every
        The fewest steps from one look at the held-out losses to the next. Looks are
        also at least 5% of the steps taken apart. None is one pass over the data if
        `n_dataset` is known. If not, it begins with 16 and then takes the power of two,
        at least 16, that keeps looks to 5% of the time, which depends on the machine.
        Looks much closer than a pass err more often.
    keep_best
        The model whose weights are kept where the held-out losses were lowest, for
        `restore_best`. This takes two copies of the weights in memory, of a model that
        is sharded over ranks (FSDP2) two copies of each rank's parts.
    confidence
        Of the verdict, between 0.5 and 1. None is 0.7 with `held_out`, for each of the
        two looks in a row that "overfitting" takes: more would cost more by waiting
        than it saves. Without `held_out` None is 0.95, for "improving" at one look and
        for "overfitting" over the whole run.

    Raises
    ------
    TypeError
        For another optimizer without `held_out`.
    ValueError
        For an argument out of range, for `every` or `by` where there is no estimate, and
        `n_dataset` without `batch_size` or the
        reverse.

    References
    ----------
    Litman and Guo, "A Theory of Generalization in Deep Learning", arXiv:2605.01172.

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(2000, 5)
    >>> y = x.sum(1, keepdim=True) + torch.randn(2000, 1)
    >>> model = torch.nn.Linear(5, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    >>> held_out = lambda: (model(x[-50:]) - y[-50:]).square()[:, 0]
    >>> judge = RiskMonitor(optimizer, held_out=held_out, held_out_every=5)
    >>> monitor = RiskMonitor(optimizer, every=1, by="parameter")
    >>> for rows in torch.arange(1950).split(10):
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
    ...     optimizer.step()
    >>> judge.verdict, judge.best_step
    ('improving', 186)
    >>> monitor.verdict, monitor.estimate().fresh_total > 0
    ('improving', True)
    >>> sorted(monitor.estimate(by="parameter"))
    ['0', '1']
    """

    def __init__(
        self,
        optimizer: Optimizer,
        every: int | None = None,
        n_dataset: int | None = None,
        batch_size: int | None = None,
        replacement: bool = False,
        smoothing: int = 50,
        confidence: float | None = None,
        by: str | None = None,
        held_out: Callable[[], Tensor] | None = None,
        held_out_every: int | None = None,
        keep_best: nn.Module | None = None,
    ) -> None:
        inside = unwrapped(optimizer)
        optimizer = inside.optimizer
        if not isinstance(optimizer, (PRM, Adam, AdamW)):
            _check_unread(optimizer, held_out, every, by, described(inside))
            every = UNREAD
        _check_steps(every=every, smoothing=smoothing, held_out_every=held_out_every)
        if held_out is not None and not callable(held_out):
            raise TypeError(f"held_out must be a function that returns losses, got {type(held_out).__name__}")
        if held_out is None and (held_out_every is not None or keep_best is not None):
            raise ValueError("held_out_every and keep_best are about held-out losses: give held_out too")
        if confidence is None:
            confidence = CONFIDENCE if held_out is not None else 0.95
        if not (_is_number(confidence) and 0.5 < confidence < 1):
            raise ValueError(f"confidence must be between 0.5 and 1, got {confidence!r}")
        if not isinstance(replacement, bool):
            raise ValueError(f"replacement must be True or False, got {replacement!r}")
        if by not in (None, *PARTS):
            raise ValueError(f"by must be one of {', '.join(PARTS)}, or None, got {by!r}")
        if (n_dataset is None) != (batch_size is None):
            raise ValueError(
                f"n_dataset and batch_size are needed together, got n_dataset={n_dataset} and batch_size={batch_size}"
            )
        check_counts({"warmup_steps": 0, "batch_size": batch_size, "n_dataset": n_dataset})
        self.optimizer = optimizer
        self.confidence = confidence
        counts = (batch_size, n_dataset)
        self._sampler = Sampler(optimizer, every, counts, replacement, smoothing, by)
        self._held_out = None
        if held_out is not None:
            looks = self._sampler.steps_of_a_pass() if held_out_every is None else held_out_every
            self._held_out = HeldOut(held_out, confidence, looks, keep_best)
        self._handles = [
            optimizer.register_step_pre_hook(run_uncompiled(self._before_step)),
            optimizer.register_step_post_hook(run_uncompiled(self._after_step)),
        ]

    def detach(self) -> None:
        """Stop watching; the samples and looks so far stay."""
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Let the sampler see this step's gradients."""
        held_out, steps = self._held_out, self._sampler.steps
        if held_out is not None and steps == 0 and not makes_state_alone(optimizer):
            held_out.begin(p for group in optimizer.param_groups for p in group["params"])
        if not self._sampler.awaits_gradients:
            return None
        return with_gradients(args, kwargs, self._sampler.gradients_ready)

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if made_state_alone(optimizer, counted=0 if isinstance(optimizer, (PRM, Masked)) else 1):
            return  # a distributed checkpoint has begun to load
        self._sampler.step_ended()
        if self._held_out is not None:
            self._held_out.step_ended(self._sampler.steps)

    @property
    def every(self) -> int:
        """Steps from one sample to the next; changes once if it was given as None."""
        return self._sampler.every

    @property
    def samples(self) -> list[Sample]:
        """The samples so far, one for every `every` steps; a list of `Sample`."""
        return list(self._sampler.series().samples)

    @property
    def parts(self) -> dict[str, list[Sample]]:
        """The samples of each group or parameter (see `by`) by its name.

        They add up to `samples`. A parameter that was added later than a sample has
        none there. A parameter is called by its name if the optimizer was given names,
        otherwise by its place among all parameters.

        Raises
        ------
        RuntimeError
            Without `by`.
        """
        if self._sampler.by is None:
            raise RuntimeError('RiskMonitor keeps the samples of parts only if it is told to: give it by="parameter"')
        return self._sampler.parts(self._sampler.by)

    @overload
    def estimate(self) -> RiskEstimate: ...
    @overload
    def estimate(self, by: str) -> dict[str, RiskEstimate]: ...
    def estimate(self, by: str | None = None) -> RiskEstimate | dict[str, RiskEstimate]:
        """Return the estimate so far.

        Parameters
        ----------
        by
            None: of the whole step. "group" or "parameter": of each of these, by its
            name. The monitor must have been given the same `by` or a finer one.

        Raises
        ------
        RuntimeError
            Before the first sample.
        ValueError
            For parts that are not kept.
        """
        sampler = self._sampler
        series = sampler.series()
        if sampler.every == UNREAD:
            name = type(self.optimizer).__name__
            raise RuntimeError(f"there is no estimate for {name}, only the verdict of held-out losses")
        if not series.samples and series.finite:
            raise RuntimeError(
                f"no sample yet: the optimizer has taken {sampler.steps} steps since the "
                f"monitor was attached, and every {sampler.every} of them give one, as soon as "
                "the next brings its gradients"
            )
        if by is None:
            return series.estimate(sampler.steps)
        if by not in PARTS or sampler.by not in (by, "parameter"):
            raise ValueError(f"by={by!r} is not kept by a RiskMonitor with by={sampler.by!r}: give it by={by!r}")
        return sampler.estimates(by)

    @property
    def verdict(self) -> str | None:
        """The verdict: "improving", "overfitting" or "unclear"; None before there is one.

        With `held_out` the last look but one is judged against the best look before it.
        "overfitting" takes two such judgements in a row. Without `held_out`,
        "improving" asks that both ends of the estimate lie above 0 with the given
        confidence, and "overfitting" that both lie below 0 and that examples were used
        more than once. The verdict is None before 50 samples and one whole pass. On a
        data set that is used again and again it is seldom more than "unclear": see
        docs/risk.md.
        """
        if self._held_out is not None:
            return self._held_out.verdict
        series, passes = self._sampler.series(), self._sampler.passes()
        if len(series.samples) < FEWEST_FOR_A_VERDICT or not series.finite:
            return None
        if passes is not None and passes < 1:
            return None
        steps = self._sampler.steps
        looks = 1 + steps // series.smoothing
        return of_ends(series.estimate(steps), self.confidence, looks, passes is not None)

    @property
    def overfitting(self) -> bool:
        """Whether the verdict is "overfitting".

        It can become false again. To stop early, stop the first time that it is true.
        """
        return self.verdict == OVERFITTING

    @property
    def best_step(self) -> int | None:
        """The step of the lowest smoothed held-out loss; None before the first look."""
        return None if self._held_out is None else self._held_out.best_step

    @property
    def held_out_curve(self) -> list[tuple[int, float]]:
        """The looks so far: steps since the start, and mean held-out losses."""
        return [] if self._held_out is None else list(self._held_out.curve)

    def restore_best(self) -> int:
        """Load the weights of `best_step` into `keep_best`, and return that step.

        Raises
        ------
        RuntimeError
            Without `keep_best`, or before the first look.
        """
        if self._held_out is None:
            raise RuntimeError("no weights were kept: give RiskMonitor held_out and keep_best")
        return self._held_out.restore()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs for a resumed run to give the same numbers.

        It holds tensors and plain numbers: `torch.load(..., weights_only=True)` reads
        it. If parameters are sharded over ranks (FSDP2) the sample under way is left
        out, so that a run on another number of ranks can load it. With `keep_best` the
        kept weights are part of it. Sharded ones are gathered to the CPU, so every rank
        must call, and one of them can save.
        """
        held_out = None if self._held_out is None else self._held_out.state_dict()
        return {"format": STATE_FORMAT, **self._sampler.state_dict(), "held_out": held_out}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; the optimizer's own is loaded separately.

        Raises
        ------
        ValueError
            For a mapping that is no state of a RiskMonitor, or the state of a newer
            version, of other parameters, of a monitor with another `by`, or with
            held-out losses if this one has none or the reverse.
        """
        check_state(state_dict, self._sampler.by, self._held_out is not None)
        self._sampler.load_state_dict(state_dict)
        if self._held_out is not None:
            self._held_out.load_state_dict(state_dict["held_out"])


def _is_number(value: object) -> bool:
    return isinstance(value, Real)


def _check_unread(optimizer: object, held_out: object, every: int | None, by: str | None, description: str) -> None:
    """Raise where an optimizer whose state gives no estimate cannot be judged otherwise."""
    if held_out is None or not isinstance(optimizer, Optimizer):
        raise TypeError(
            "RiskMonitor estimates the risk of popriskmin.PRM, torch.optim.AdamW and torch.optim.Adam, and judges "
            f"others by held-out losses alone: give it held_out, got {description}"
        )
    if every is not None or by is not None:
        raise ValueError(f"every and by are of the estimate, which there is not of {description}")


def _check_steps(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is None and name != "smoothing":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")


def of_ends(estimate: RiskEstimate, confidence: float, looks: int, reused: bool) -> str:
    """Return the verdict on an estimate.

    Parameters
    ----------
    estimate
        Its two ends and their standard errors.
    confidence
        Of "improving" at one look, and of "overfitting" over all looks together.
    looks
        The number of separate looks so far. The `n`-th may err with `1 / (n * (n + 1))`
        of `1 - confidence`, so that all together err with no more than `1 -
        confidence`.
    reused
        Whether examples were used more than once. Examples used once cannot be
        overfitted.
    """
    one, all_looks = NormalDist().inv_cdf(confidence), quantile_over_looks(confidence, looks)
    ends = ((estimate.fresh, estimate.fresh_stderr), (estimate.reused, estimate.reused_stderr))
    if all(end - one * stderr > 0 for end, stderr in ends):
        return IMPROVING
    highest = [end + all_looks * stderr for end, stderr in ends]
    if reused and max(highest) < 0 and not any(map(math.isnan, highest)):
        return OVERFITTING
    return UNCLEAR


def quantile_over_looks(confidence: float, looks: int) -> float:
    """Return the standard errors that the `looks`-th look asks for.

    All looks together then err with at most `1 - confidence`.

    Examples
    --------
    >>> [round(quantile_over_looks(0.95, looks), 2) for looks in (1, 10, 100)]
    [1.96, 3.32, 4.42]
    """
    return -NormalDist().inv_cdf((1 - confidence) / (looks * (looks + 1)))


def check_state(state_dict: Mapping[str, Any], by: str | None, held_out: bool) -> None:
    """Raise ValueError for a mapping that is no state of such a monitor.

    Parameters
    ----------
    state_dict
        The mapping to be loaded.
    by, held_out
        The monitor's `by`, and whether it has held-out losses.
    """
    missing = set(FIELDS) - set(state_dict)
    if missing:
        raise ValueError(f"not the state of a RiskMonitor: it lacks {', '.join(sorted(missing))}")
    if not isinstance(state_dict["format"], int) or state_dict["format"] > STATE_FORMAT:
        raise ValueError(
            f"the state of a RiskMonitor has format {state_dict['format']}, and this version of "
            f"popriskmin reads formats up to {STATE_FORMAT}; a newer version can load it"
        )
    for name in ("steps", "every"):
        if not isinstance(state_dict[name], int) or state_dict[name] < (name == "every"):
            raise ValueError(f"not the state of a RiskMonitor: {name} is {state_dict[name]!r}")
    samples, columns = state_dict["samples"], len(Sample._fields)
    if not isinstance(samples, Tensor) or samples.dim() != 2 or samples.shape[1] != columns:
        raise ValueError("not the state of a RiskMonitor: samples is no table of three columns")
    if len(state_dict["rows"]) != (len(samples) if by is not None else 0):
        raise ValueError(f"the state of a RiskMonitor has other parts than this one, which has by={by!r}")
    if (state_dict["held_out"] is not None) != held_out:
        has, needs = ("no ", "") if held_out else ("", "no ")
        raise ValueError(f"the state of a RiskMonitor has {has}held-out losses, and this one {needs}held_out")
