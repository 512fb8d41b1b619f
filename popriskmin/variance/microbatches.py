"""The variance of an accumulated gradient, from its microbatches."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.parallel import DistributedDataParallel

from popriskmin.mask import Hyperparameters, corrections
from popriskmin.optimizer.coded_state import readable
from popriskmin.step.lists import as_real, compute_dtype
from popriskmin.variance.source import Record, Source, TakesVariances, gradient, zeros_for

# Scalars that are averaged over ranks in one message.
_MESSAGE = 1 << 23


class Microbatches(Source):
    """Measure the variance of gradients that are accumulated over two or more passes.

    Let `a_k` be the gradient of the k-th of K backward passes, so that `p.grad` is
    their sum. Each step takes::

        z = K / (K - 1) * sum_k (a_k - mean(a))**2

    This is an unbiased estimate of the variance of `p.grad` if the microbatches are
    independent and have equal weight. `z` is on the scale of `p.grad`, whether or not
    the loss was divided by K. The sum of squares grows as each gradient arrives
    (Welford's method, with the mean read off `p.grad`), in float32 or wider. It takes
    one buffer of the parameters' size, from the second backward pass until the step,
    and no further pass.

    Clipping by norm and unscaling by a loss scaler multiply `z` by the square of their
    factor: see `Source`. If the backward passes have unequal sizes, and weights to
    match, the differences of the weights count as noise. `z` then exceeds the variance
    by `c**2 / (K - 1)` times the squared mean gradient, with `c` the standard deviation
    of the sizes over their mean. If a pass does not reach a parameter, its gradient
    there counts as zero.

    Parameters
    ----------
    optimizer
        `PRM(..., variance="given")`, or with groups that have it; only those are
        measured. Build it first.
    ddp
        The DistributedDataParallel module, if there are several ranks. All but the last
        backward pass of a step must run under its `no_sync()`. Before the step the
        variances are averaged over the ranks, in one more reduction of the parameters'
        size, and divided by the number of ranks. False is for several processes that
        average no gradients.
    single
        For steps after a single backward pass, which tells no variance, as with one
        microbatch left over at the end of an epoch. "carry on" takes the variance
        estimated so far: `s^` stays as it is. "raise" makes it an error. The very first
        step raises in any case, as it has no estimate. Two such steps in a row give one
        warning.

    Raises
    ------
    ValueError
        For an optimizer without a group with `variance="given"`, with parameters
        sharded over ranks, or without `ddp` where there are several ranks.
    RuntimeError
        In `optimizer.step()`, after fewer than two backward passes (see `single`), or
        with gradients that were not seen to arrive. In a backward pass, if gradients
        were not cleared since the last step, or were changed since the last pass.

    References
    ----------
    Welford, "Note on a method for calculating corrected sums of squares and products",
    Technometrics 4 (1962).

    Examples
    --------
    >>> from popriskmin import PRM
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = PRM(model.parameters(), variance="given")
    >>> source = Microbatches(optimizer)
    >>> for _ in range(3):
    ...     for x in torch.randn(8, 16, 4):  # 8 microbatches of 16 examples
    ...         (model(x).square().mean() / 8).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> 0 < optimizer.get_mask_stats()["mean_q"] < 1
    True
    """

    def __init__(
        self,
        optimizer: TakesVariances,
        ddp: DistributedDataParallel | Literal[False] | None = None,
        *,
        single: Literal["carry on", "raise"] = "carry on",
    ) -> None:
        if single not in ("carry on", "raise"):
            raise ValueError(f"single must be 'carry on' or 'raise', got {single!r}")
        if ddp is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"there are {dist.get_world_size()} ranks: pass ddp=the DistributedDataParallel module that averages "
                "the gradients over them, or ddp=False if nothing does"
            )
        super().__init__(optimizer, ddp or None)
        self._nested = False  # whether a pass ran within another since the last step
        self._single = single
        self._singles = 0  # steps in a row that have had one backward pass

    def _see(self, record: Record, grad: Tensor) -> None:
        k = record.count
        if k == 0:
            return
        if record.synced:
            raise RuntimeError(
                f"the gradient of {record.name} was averaged over ranks before it was complete: run all but the last "
                "backward pass of a step, with its forward pass, under the DistributedDataParallel module's no_sync()"
            )
        new, total = as_real(grad.resolve_conj()), as_real(gradient(record))
        dtype = compute_dtype(new, total)
        # The deviation is that from the mean of those before.
        deviation = torch.sub(new.to(dtype), total.to(dtype), alpha=1 / k)
        # Welford's sum of squares grows by deviation**2 * k / (k + 1). Twice that is
        # kept: it begins without a factor.
        if record.variance is None:  # k is 1
            record.variance = deviation.square_()
        else:
            record.variance.addcmul_(deviation, deviation, value=2 * k / (k + 1))

    def _begin_pass(self) -> None:
        self._nested = self._nested or _within_another_pass()

    def _variances(self, records: list[Record], factors: list[Tensor]) -> list[Tensor]:
        passes = max((record.count for record in records), default=0)
        carried = self._carried(records) if passes == 1 and self._single == "carry on" else None
        self._singles = 0 if carried is None else self._singles + 1
        self._check(records, passes if carried is None else None)
        self._nested = False
        if carried is not None:
            return carried
        variances: list[Tensor] = []
        for record, factor in zip(records, factors):
            variance = zeros_for(record) if record.variance is None else record.variance
            variance.mul_(factor * (0.5 * passes / (passes - 1)))
            if 0 < record.count < passes:  # in the other passes it was zero
                grad = as_real(gradient(record)).to(variance.dtype)
                variance.addcmul_(grad, grad, value=(passes - record.count) / (record.count * (passes - 1)))
            variances.append(variance)
        if self._ddp is not None:
            average_over_ranks(variances, self._ddp.process_group)
            for variance in variances:
                variance.div_(dist.get_world_size(self._ddp.process_group))
        return variances

    def _carried(self, records: list[Record]) -> list[Tensor] | None:
        """Return `s^` of each parameter, or None if one has none yet.

        Taken for the variance it leaves `s^` as it is.
        """
        state = getattr(self._optimizer, "state", {})
        group_of = {p: group for group in self._optimizer.param_groups for p in group["params"]}
        carried = []
        for record in records:
            own = readable(state.get(record.param, {}), record.param)
            if "exp_avg_var" not in own or (own["step"].is_cpu and own["step"] < 1):
                return None
            c = corrections(own["step"], Hyperparameters.of_group(group_of[record.param]))
            s = as_real(own["exp_avg_var"])
            carried.append(s.to(compute_dtype(s)) / c.bias_var)
        return carried

    def _check(self, records: list[Record], passes: int | None) -> None:
        """Raise for passes that tell no variance; None means a single, allowed one."""
        if passes is not None:
            self._check_passes(records, passes)
        elif self._singles == 2:
            warnings.warn(
                "Microbatches has had one backward pass before each of the last 2 steps, which gives no variance; the "
                "steps take what was estimated before: accumulate gradients over more passes, or use another source",
                UserWarning,
                stacklevel=2,
            )
        if self._ddp is not None and not all(record.synced for record in records):
            raise RuntimeError(
                "the last backward pass before the step ran under no_sync(), so that the ranks' gradients differ: "
                "leave it out of no_sync()"
            )

    def _check_passes(self, records: list[Record], passes: int) -> None:
        if records and passes < 2:
            raise RuntimeError(
                f"Microbatches needs at least 2 backward passes before each step, got {passes}: accumulate gradients "
                "over more of them, or use another source of the variance"
            )
        few = [record for record in records if record.count != passes]
        if few and self._nested:
            raise RuntimeError(
                f"gradients were added {passes} times to one parameter and {few[0].count} times to {few[0].name}, with "
                "backward passes that ran within others: pass use_reentrant=False to torch.utils.checkpoint"
            )
        if few and self._ddp is not None:
            raise RuntimeError(
                f"{few[0].name} was reached by {few[0].count} of {passes} backward passes: with several ranks each "
                "must reach every parameter"
            )


def _within_another_pass() -> bool:
    """Return whether this backward pass runs within another, as checkpoints' do."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
    return False


def average_over_ranks(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace each by its mean over the ranks of the group, many in one message."""
    pending: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        pending.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for alike in pending.values():
        while alike:
            message, size = [alike.pop()], 0
            while alike and (size := size + message[-1].numel()) < _MESSAGE:
                message.append(alike.pop())
            flat = torch.cat([tensor.reshape(-1) for tensor in message]).div_(dist.get_world_size(group))
            dist.all_reduce(flat, group=group)
            for tensor, part in zip(message, torch.split(flat, [tensor.numel() for tensor in message])):
                tensor.copy_(part.view_as(tensor))
