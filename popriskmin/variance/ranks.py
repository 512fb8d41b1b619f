"""The variance of a gradient that is averaged over ranks, from the ranks' gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from popriskmin.step.lists import as_real, compute_dtype
from popriskmin.variance.source import Hook, Record, Source, TakesVariances, gradient


class Ranks(Source):
    """Measure the variance of gradients that are averaged over two or more ranks.

    Let `g_r` be the gradient of rank r of R, of its own examples, so that `p.grad` is
    their mean, which DistributedDataParallel takes. Each step takes::

        z = (mean_r(g_r**2) - p.grad**2) / (R - 1)

    This is an unbiased estimate of the variance of `p.grad` if the ranks' batches are
    independent and have equal weight. For every bucket of gradients a communication
    hook starts one more reduction, of their squares, in float32 or wider. These are the
    one buffer of the parameters' size that is kept until the step.

    For gradients that are accumulated under `no_sync()` the ranks' sums are compared.
    Without `no_sync()` each averaged backward pass is measured, and the variances add
    up. Clipping by norm and unscaling by a loss scaler multiply `z` by the square of
    their factor: see `Source`.

    Parameters
    ----------
    optimizer
        `PRM(..., variance="given")`, or with groups that have it; only those are
        measured. Build it first.
    ddp
        The DistributedDataParallel module that the optimizer's parameters are trained
        in, without a communication hook.
    hook
        The communication hook that averages the gradients, such as `fp16_compress_hook`
        of `torch.distributed.algorithms.ddp_comm_hooks.default_hooks`. None averages
        them as the module does without one.
    hook_state
        Handed to the hook as its first argument. None gives it the module's process
        group.

    Raises
    ------
    ValueError
        For an optimizer without a group with `variance="given"`, or a module on a
        single rank.
    RuntimeError
        For a module that has a communication hook. In `optimizer.step()`, for gradients
        that were not averaged.

    Notes
    -----
    The difference of squares loses noise below about `1e-7` of the squared mean, or
    below 0.4% of it if the gradients are averaged in bfloat16. A mask with so little
    noise is open anyway.

    Examples
    --------
    With `python -m torch.distributed.run --nproc-per-node 2 train.py`, whose ranks each
    draw their own examples::

        ddp = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = PRM(model.parameters(), variance="given")
        source = Ranks(optimizer, ddp)
        for x, y in batches:
            loss_fn(ddp(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    """

    def __init__(
        self,
        optimizer: TakesVariances,
        ddp: DistributedDataParallel,
        hook: Hook | None = None,
        hook_state: object = None,
    ) -> None:
        if not isinstance(ddp, DistributedDataParallel):
            raise TypeError(f"ddp must be a DistributedDataParallel module, got {type(ddp).__name__}")
        self._ranks = dist.get_world_size(ddp.process_group)
        if self._ranks < 2:
            raise ValueError(f"Ranks needs at least 2 ranks, got {self._ranks}: use Microbatches or Examples")
        super().__init__(optimizer, ddp)
        self._hook, self._hook_state = hook or _plain_hook(), ddp.process_group if hook_state is None else hook_state
        self._reducing: list[tuple[dist.Work, Tensor, list[tuple[Tensor, Tensor]]]] = []
        try:
            # In a lambda, which has no annotations: torch compares those with types and
            # knows no strings.
            ddp.register_comm_hook(None, lambda state, bucket: self._reduce(bucket))
        except RuntimeError as error:
            self.remove()
            raise RuntimeError(
                "no communication hook can be registered with the module. If it has one, pass that to Ranks in place "
                "of registering it, as in Ranks(optimizer, ddp, hook=fp16_compress_hook)"
            ) from error

    @torch.no_grad()
    def _reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Start to reduce the bucket's squares, and let the hook average its gradients."""
        if self._handles:  # a communication hook stays when the source is removed
            assert self._ddp is not None  # noqa: S101
            buffer = as_real(bucket.buffer())
            squares = buffer.to(compute_dtype(buffer), copy=True).square_().div_(self._ranks)
            # Each parameter's part lies in the squares as its gradient does in the
            # bucket.
            parts = [
                (param, squares.as_strided(part.shape, part.stride(), part.storage_offset() - buffer.storage_offset()))
                for param, part in zip(bucket.parameters(), map(as_real, bucket.gradients()))
                if param in self._records
            ]
            work = dist.all_reduce(squares, group=self._ddp.process_group, async_op=True)
            self._reducing.append((work, squares, parts))
        future: torch.futures.Future[Tensor] = self._hook(self._hook_state, bucket)
        return future

    def _before_forward(self, ddp: DistributedDataParallel) -> None:
        super()._before_forward(ddp)
        if torch.is_grad_enabled():
            self._reducing = []  # of a backward pass that failed
            for record in self._records.values():
                if record.param.grad is None:
                    record.start()  # another rank's pass may reach it, but not this one's

    @torch.no_grad()
    def _measure(self) -> None:
        for work, _, parts in self._reducing:
            work.wait()
            for param, squares in parts:
                record = self._records[param]
                if param.grad is None:  # reached on no rank
                    continue
                mean = as_real(gradient(record)).to(squares.dtype)
                variance = squares.addcmul_(mean, mean, value=-1).clamp_(min=0).div_(self._ranks - 1)
                record.variance = variance if record.variance is None else record.variance.add_(variance)
                record.count = max(record.count, 1)
                self._reached.append(record)
        self._reducing = []
        super()._measure()

    def _unmeasured(self, record: Record) -> str:
        return (
            f"the gradient of {record.name} was not averaged over ranks: let the last backward pass before the step "
            "run through the DistributedDataParallel module and outside of its no_sync()"
        )


def _plain_hook() -> Hook:
    # Imported when needed: not every build of torch has it.
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    return allreduce_hook
