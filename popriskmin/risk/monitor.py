"""The risk monitor: what training still gains on data that it has not seen, judged while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, overload

from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from popriskmin.optimizer.checkpoint_probe import made_state_alone, makes_state_alone
from popriskmin.optimizer.options import check_counts
from popriskmin.optimizer.prm import PRM
from popriskmin.optimizer.unwrap import described, unwrapped
from popriskmin.risk.held_out import CONFIDENCE, HeldOut
from popriskmin.risk.parts import PARTS
from popriskmin.risk.sampler import Sampler
from popriskmin.risk.series import RiskEstimate, Sample
from popriskmin.risk.states import STATE_FORMAT, check_state
from popriskmin.risk.verdict import OVERFITTING, of_ends
from popriskmin.step.compat import run_uncompiled

# Nothing is said of the estimate before so many samples.
FEWEST_FOR_A_VERDICT = 50


class RiskMonitor:
    """Estimates by how much each step lowers the population risk.

    Wherever a few examples can be spared, say fifty, hold them out and give `held_out`: the verdict is then that of
    their losses. Without them it is that of an estimate from the optimizer's state and the gradients of two steps. A
    step takes `D(m)` off the weights, a function of the mean gradient `m`, and the next batch's gradient `g'` knows
    nothing of it. So to second order, and without a further pass, the step lowers the risk by the sum over scalars of::

        (g' * D(m) + g * D(m')) / 2

    where `g` is the step's own gradient and `m'` the mean with `g'` in its place. That holds for fresh data. Where
    `n_dataset` examples are used again and again, it is the fall on the training set, and what that owes to the set's
    own noise is not known but for its bounds: the estimate has two ends. Derivation, assumptions, biases and how well
    all this follows the held-out loss: docs/risk.md.

    It looks at every `every`-th step through the optimizer's hooks, changes nothing, keeps one copy of the gradients
    from a sampled step to the next, and waits for the device only when asked for a result, once in 256 samples, and to
    read held-out losses. A parameter without a gradient does not count.

    Parameters
    ----------
    optimizer
        `PRM`, `torch.optim.AdamW` or `torch.optim.Adam`, or a framework's wrapper around one of these.
    every
        Steps from one sample to the next. None begins with 8 and measures for 48 steps how long a step takes and how
        long a sample; then it is the power of two that keeps samples to 1% of the time. That depends on the
        machine: give a number where a run must give the same numbers twice.
    n_dataset, batch_size
        Numbers of examples in the data set and in a step (of all micro-batches and ranks together), where the data set
        is used more than once. Taken from PRM's groups if they have them and nothing is given here.
    replacement
        Whether batches are drawn with replacement, and not in shuffled passes over the data set.
    smoothing
        Steps over which the estimate is averaged, with exponentially falling weights.
    by
        "group" or "parameter": keep samples of these parts too, for `estimate(by=...)` and `parts`.
    held_out
        A function without arguments that returns one loss per held-out example, shape (examples,), always of the same
        examples in the same order. It is called under `torch.no_grad()`; putting the model into evaluation mode and
        back is its own matter, and so is gathering the losses where examples are spread over ranks. The verdict is
        then theirs. Where parameters are sharded (FSDP2) the first look comes after the first step, and before it only
        with `keep_best`.
    held_out_every
        Steps from one look at the held-out losses to the next, at least; looks are also 5% of the steps taken apart.
        None is one pass over the data where `n_dataset` is known. Where it is not, it begins with 16 and finds by time
        the power of two, not below 16, that keeps looks to 5% of it; that depends on the machine. Looks that are much
        closer than a pass are the worse for it: more of them err.
    keep_best
        The model whose weights are to be kept where the held-out losses were lowest, for `restore_best`; with the
        candidate for the next best one they take two copies of it in memory, of a model that is sharded over ranks
        (FSDP2) two of each rank's parts.
    confidence
        Of the verdict, between 0.5 and 1. None is 0.7 with `held_out`, of each of the two looks in a row that
        "overfitting" takes: there waiting costs more than it saves. Without, it is 0.95, of "improving" at one look and
        of "overfitting" over the whole run.

    Raises
    ------
    TypeError
        For another optimizer.
    ValueError
        For an argument out of range, and `n_dataset` without `batch_size` or the reverse.

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
        found = unwrapped(optimizer)
        optimizer = found.optimizer
        if not isinstance(optimizer, (PRM, Adam, AdamW)):
            raise TypeError(
                f"RiskMonitor reads popriskmin.PRM, torch.optim.AdamW and torch.optim.Adam, got {described(found)}"
            )
        for name, value in (
            ("every", 1 if every is None else every),
            ("smoothing", smoothing),
            ("held_out_every", 1 if held_out_every is None else held_out_every),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        if held_out is not None and not callable(held_out):
            raise TypeError(f"held_out must be a function that returns losses, got {type(held_out).__name__}")
        if held_out is None and (held_out_every is not None or keep_best is not None):
            raise ValueError("held_out_every and keep_best say what to do with held-out losses: give held_out too")
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
        self._sampler = Sampler(optimizer, every, (batch_size, n_dataset), replacement, smoothing, by)
        self._held_out = None
        if held_out is not None:
            looks = self._sampler.steps_of_a_pass() if held_out_every is None else held_out_every
            self._held_out = HeldOut(held_out, confidence, looks, keep_best)
        self._handles = [
            optimizer.register_step_pre_hook(run_uncompiled(self._before_step)),
            optimizer.register_step_post_hook(run_uncompiled(self._after_step)),
        ]

    def detach(self) -> None:
        """Stop watching; what has been seen stays."""
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Let the sampler see this step's gradients, after the closure has made them where there is one."""
        if self._held_out is not None and self._sampler.steps == 0 and not makes_state_alone(optimizer):
            self._held_out.begin(param for group in optimizer.param_groups for param in group["params"])
        if not self._sampler.awaits_gradients:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._sampler.gradients_ready()
            return None

        def observed() -> Any:
            loss = closure()
            self._sampler.gradients_ready()
            return loss

        return ((args[0], observed, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": observed})

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if made_state_alone(optimizer, counted=0 if isinstance(optimizer, PRM) else 1):
            return  # a distributed checkpoint has begun to load
        self._sampler.step_ended()
        if self._held_out is not None:
            self._held_out.step_ended(self._sampler.steps)

    @property
    def every(self) -> int:
        """Steps from one sample to the next; without a number of one's own it changes once, when the pace is found."""
        return self._sampler.every

    @property
    def samples(self) -> list[Sample]:
        """The samples so far, one for every `every` steps; a list of `Sample`."""
        return list(self._sampler.series().samples)

    @property
    def parts(self) -> dict[str, list[Sample]]:
        """The samples of each group or parameter, whichever `by` says, by its name; they add up to `samples`.

        A parameter that came later than a sample has none there. Where the optimizer was given names they are these,
        otherwise a parameter is called by its place among all.

        Raises
        ------
        RuntimeError
            Without `by`.
        """
        if self._sampler.by is None:
            raise RuntimeError('RiskMonitor keeps samples of parts only where it is told to: give it by="parameter"')
        return self._sampler.parts(self._sampler.by)

    @overload
    def estimate(self) -> RiskEstimate: ...
    @overload
    def estimate(self, by: str) -> dict[str, RiskEstimate]: ...
    def estimate(self, by: str | None = None) -> RiskEstimate | dict[str, RiskEstimate]:
        """Return the estimate as it stands.

        Parameters
        ----------
        by
            None: of the whole step. "group" or "parameter": of each of these, by its name, for a monitor that was given
            the same `by` or a finer one.

        Raises
        ------
        RuntimeError
            Before the first sample.
        ValueError
            For parts that are not kept.
        """
        sampler = self._sampler
        series = sampler.series()
        if not series.samples and series.finite:
            raise RuntimeError(
                f"no sample yet: the optimizer has taken {sampler.steps} steps since the monitor was attached, and "
                f"every {sampler.every} of them give one, as soon as the next brings its gradients"
            )
        if by is None:
            return series.estimate(sampler.steps)
        if by not in PARTS or sampler.by not in (by, "parameter"):
            raise ValueError(f"by={by!r} is not kept by a RiskMonitor with by={sampler.by!r}: give it by={by!r}")
        return sampler.estimates(by)

    @property
    def verdict(self) -> str | None:
        """What may be said now: "improving", "overfitting", "unclear", or nothing yet, None.

        With `held_out` it is the judgement of the last look but one, beside the best before it, and "overfitting" where
        that of the one before was the same. Without, "improving"
        asks that both ends of the estimate lie above 0 with the stated confidence, "overfitting" that both lie below
        and that examples have come more than once; nothing is said before 50 samples and one whole pass. On a data set
        that is used again and again that is seldom more than "unclear": see docs/risk.md.
        """
        if self._held_out is not None:
            return self._held_out.verdict
        series, passes = self._sampler.series(), self._sampler.passes()
        if len(series.samples) < FEWEST_FOR_A_VERDICT or not series.finite or (passes is not None and passes < 1):
            return None
        steps = self._sampler.steps
        return of_ends(series.estimate(steps), self.confidence, 1 + steps // series.smoothing, passes is not None)

    @property
    def overfitting(self) -> bool:
        """Whether the verdict is "overfitting". It can become false again; who stops by it stops at the first time."""
        return self.verdict == OVERFITTING

    @property
    def best_step(self) -> int | None:
        """The step after which the smoothed held-out loss was lowest so far; None before the first look."""
        return None if self._held_out is None else self._held_out.best_step

    @property
    def held_out_curve(self) -> list[tuple[int, float]]:
        """The looks so far: steps, counted since the monitor was attached, and mean held-out losses."""
        return [] if self._held_out is None else list(self._held_out.curve)

    def restore_best(self) -> int:
        """Load the weights of `best_step` into the model that was given as `keep_best`, and return that step.

        Raises
        ------
        RuntimeError
            Without `keep_best`, or before the first look.
        """
        if self._held_out is None:
            raise RuntimeError("no weights were kept: give RiskMonitor held_out and keep_best")
        return self._held_out.restore()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, so that a run that goes on from it gives the same numbers.

        Tensors and plain numbers: `torch.load(..., weights_only=True)` reads it. Where parameters are sharded over
        ranks (FSDP2) the sample under way is left out, so that a run on another number of ranks can load it. With
        `keep_best` the kept weights are part of it; sharded ones are gathered to the CPU, for which every rank must
        call, and one of them can save.
        """
        held_out = None if self._held_out is None else self._held_out.state_dict()
        return {"format": STATE_FORMAT, **self._sampler.state_dict(), "held_out": held_out}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; the optimizer's own is loaded by itself.

        Raises
        ------
        ValueError
            For something that is no state of a RiskMonitor, of a newer version, of other parameters, of a monitor
            with another `by`, or with held-out losses where this one has none or the reverse.
        """
        check_state(state_dict, self._sampler.by, self._held_out is not None)
        self._sampler.load_state_dict(state_dict)
        if self._held_out is not None:
            self._held_out.load_state_dict(state_dict["held_out"])


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)
