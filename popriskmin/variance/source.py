"""The base of all sources: it watches gradients arrive and gives their variances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from popriskmin.mask import PRMGroup
from popriskmin.optimizer.checkpoint_probe import makes_state_alone
from popriskmin.optimizer.closure import Arguments, with_gradients
from popriskmin.optimizer.groups import parameter_names
from popriskmin.optimizer.unwrap import described, unwrapped
from popriskmin.step.lists import as_real, compute_dtype, sum_dtype
from popriskmin.step.shards import is_sharded

Hook = Callable[..., Any]


class TakesVariances(Protocol):
    """An optimizer that takes variances, as `PRM` does with `variance="given"`."""

    param_groups: list[PRMGroup]

    def set_variances(self, variances: Mapping[Tensor, Tensor]) -> None:
        """Take the variance of each parameter's gradient, for the next step."""

    def register_step_pre_hook(self, hook: Hook) -> RemovableHandle:
        """Call `hook(optimizer, args, kwargs)` before each step.

        A tuple that it returns replaces the arguments.
        """


@dataclass(eq=False)
class Record:
    """What is known of a parameter's gradient since it was last cleared."""

    param: Tensor
    name: str
    count: int = 0  # how often something was added to it
    taken: bool = False  # whether a step has been taken with it
    # Real and of the gradient's shape, at the scale of the last backward pass.
    variance: Tensor | None = None
    synced: bool = False  # whether the last backward pass averaged it over ranks
    norm: Tensor | None = None  # of the gradient after the last backward pass
    seen: tuple[int, int] | None = None  # its address then, and the writes to it so far

    def start(self) -> None:
        """Forget what was gathered before."""
        self.count, self.taken, self.synced = 0, False, False
        self.variance, self.norm, self.seen = None, None, None


# Optimizers that have a source; a second one would overwrite what the first has handed
# over.
_TAKEN: WeakSet[TakesVariances] = WeakSet()


class Source:
    """Watch the gradients of groups with `variance="given"`, and give their variances.

    A hook on each parameter's gradient accumulator sees every gradient that is about to
    be added to `p.grad`, after the parameter's own hooks. It does not see those of
    `torch.autograd.grad`. The norms of the gradients are kept at the end of a backward
    pass. The change of a norm until the step is the factor of clipping, or of a loss
    scaler's unscaling. The variance is multiplied by the square of this factor.

    A gradient that was cleared (in either way of `zero_grad`) starts anew, with or
    without a step before.

    Parameters
    ----------
    optimizer
        It has at least one group with `variance="given"`, whose parameters require
        gradients. It may be wrapped by a framework (`popriskmin.unwrap`).
    ddp
        The DistributedDataParallel module that the parameters are trained in, if any.
    """

    def __init__(self, optimizer: TakesVariances, ddp: DistributedDataParallel | None = None) -> None:
        inside = unwrapped(optimizer)
        optimizer = inside.optimizer
        if optimizer in _TAKEN:
            raise RuntimeError("this optimizer has a source of variances already: call its remove() first")
        groups = optimizer.param_groups
        given = [group.get("variance") == "given" for group in groups]
        if not any(given):
            raise ValueError(
                f"{type(self).__name__} needs an optimizer with a parameter group with variance='given', got "
                f"{described(inside)} without one: build it as PRM(..., variance='given')"
            )
        self._optimizer = optimizer
        self._ddp = ddp
        self._records = {
            param: Record(param, f"parameter {name}")
            for group, names, wanted in zip(groups, parameter_names(groups), given)
            for param, name in zip(group["params"], names)
            if wanted
        }
        for record in self._records.values():
            if is_sharded(record.param):
                raise ValueError(f"{record.name} is sharded over ranks, which {type(self).__name__} does not support")
        self._reached: list[Record] = []  # since gradients were last measured
        self._syncs = False  # whether this backward pass averages over ranks
        self._task = -1  # the backward pass at whose end they will be
        # Kept, because a freed gradient accumulator is made anew without its hooks.
        self._nodes: dict[Tensor, tuple[torch.autograd.graph.Node, RemovableHandle]] = {}
        self._handles: list[RemovableHandle] = [optimizer.register_step_pre_hook(self._before_step)]
        for record in self._records.values():
            if record.param.requires_grad:
                self._watch(record)
        if ddp is not None:
            self._handles.append(ddp.register_forward_pre_hook(lambda module, _: self._before_forward(module)))
        _TAKEN.add(optimizer)

    def remove(self) -> None:
        """Detach from the optimizer; another source may then take over."""
        for handle in (*self._handles, *(handle for _, handle in self._nodes.values())):
            handle.remove()
        self._handles, self._nodes, self._records, self._reached = [], {}, {}, []
        _TAKEN.discard(self._optimizer)

    def _let_go(self) -> None:
        """Forget parameters that the optimizer no longer has: a node holds its own."""
        present = {param for group in self._optimizer.param_groups for param in group["params"]}
        if self._records.keys() <= present:
            return
        for param in self._records.keys() - present:
            del self._records[param]
            if param in self._nodes:
                self._nodes.pop(param)[1].remove()
        self._reached = [record for record in self._reached if record.param in present]

    def _watch(self, record: Record) -> None:
        with torch.enable_grad():
            view: Any = record.param.expand_as(record.param)
        node = view.grad_fn.next_functions[0][0]
        handle = node.register_prehook(lambda grads: self._before_accumulation(record, grads[0]))
        self._nodes[record.param] = node, handle

    @torch.no_grad()
    def _before_accumulation(self, record: Record, grad: Tensor) -> None:
        """See a gradient that is about to be added to what the parameter has."""
        if grad.is_sparse:
            raise RuntimeError(f"{record.name} has a sparse gradient, whose variance is not measured; use sparse=False")
        self._open(record)
        self._see(record, grad)
        record.count += 1
        self._reached.append(record)
        # Each parameter asks. A pass that runs within this one, as that of a
        # checkpointed segment, counts as a new one.
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            self._begin_pass()
            Variable._execution_engine.queue_callback(self._after_backward)

    def _open(self, record: Record) -> None:
        """Start anew if the gradient was cleared; raise if it was changed otherwise."""
        grad = record.param.grad
        if grad is None:
            record.start()
        elif record.taken or record.seen != _identity(grad):
            # Cleared in place, or changed: this waits for the device, as nothing else
            # here does.
            if not bool(as_real(grad).any()):
                record.start()
            elif record.taken:
                raise RuntimeError(
                    f"the gradient of {record.name} was not cleared after the last step: call optimizer.zero_grad()"
                )
            elif record.norm is None or not torch.equal(record.norm, norms([grad])[0]):
                raise RuntimeError(
                    f"the gradient of {record.name} was changed while it was accumulated, by something else than a "
                    "complete backward pass: clip or unscale it only after the last one, and call "
                    "optimizer.zero_grad() after one that failed"
                )

    def _see(self, record: Record, grad: Tensor) -> None:
        """Take in a gradient that is about to be added, after `record.count` others."""

    def _begin_pass(self) -> None:
        """Know of a new backward pass, or of one that runs within another."""

    def _before_forward(self, ddp: DistributedDataParallel) -> None:
        """Note whether the backward pass that follows will average over ranks."""
        if torch.is_grad_enabled():
            self._syncs = bool(ddp.require_backward_grad_sync)

    def _after_backward(self) -> None:
        # DistributedDataParallel finishes its averages in such a callback too, which is
        # queued after this one.
        if self._ddp is None:
            self._measure()
        else:
            Variable._execution_engine.queue_callback(self._measure)

    @torch.no_grad()
    def _measure(self) -> None:
        """Keep the norms of the gradients that the backward pass has reached."""
        records = list({id(record): record for record in self._reached if record.param.grad is not None}.values())
        self._reached, self._task = [], -1
        grads = [gradient(record) for record in records]
        for record, grad, norm in zip(records, grads, norms(grads)):
            record.norm, record.seen, record.synced = norm, _identity(grad), self._syncs

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Hand over the variances as soon as the gradients are there."""
        if makes_state_alone(optimizer):
            return None  # a distributed checkpoint has begun to load; there is no gradient
        return with_gradients(args, kwargs, self._hand_over)

    @torch.no_grad()
    def _hand_over(self) -> None:
        self._let_go()
        records = []
        for record in self._records.values():
            if record.param.grad is None:
                record.start()
                continue
            records.append(record)
            if record.taken:
                self._open(record)  # it may have been cleared in place since
            if record.count == 0 and bool(as_real(gradient(record)).any()):
                raise RuntimeError(self._unseen(record))
        variances = self._variances(records, _factors(records))
        for record in records:
            record.variance, record.taken = None, True
        self._optimizer.set_variances(
            {
                record.param: torch.view_as_complex(variance) if record.param.is_complex() else variance
                for record, variance in zip(records, variances)
            }
        )

    def _unseen(self, record: Record) -> str:
        return (
            f"{record.name} has a gradient that {type(self).__name__} has not seen arrive: build the source after the "
            "model has its device and dtype and its parameters require gradients, and before the first backward pass"
        )

    def _variances(self, records: list[Record], factors: list[Tensor]) -> list[Tensor]:
        """Return the variances of these gradients, real, multiplied by the factors."""
        variances: list[Tensor] = []
        for record, factor in zip(records, factors):
            if record.variance is not None:
                variances.append(record.variance.mul_(factor))
            elif record.count > 0:
                raise RuntimeError(self._unmeasured(record))
            else:
                variances.append(zeros_for(record))
        return variances

    def _unmeasured(self, record: Record) -> str:
        """Say what is missing for a gradient that has no variance."""
        raise NotImplementedError


def gradient(record: Record) -> Tensor:
    """Return the gradient of a parameter that has one."""
    grad = record.param.grad
    assert grad is not None  # noqa: S101 - the caller has looked
    return grad


def zeros_for(record: Record) -> Tensor:
    """Return zeros for the variance of a gradient: real, in float32 or wider."""
    grad = as_real(gradient(record))
    return torch.zeros_like(grad, dtype=compute_dtype(grad))


def _identity(grad: Tensor) -> tuple[int, int]:
    return grad.data_ptr(), grad._version


def norms(grads: Iterable[Tensor]) -> list[Tensor]:
    """Return the 2-norm of each: shape `()`, on its device, in float32 or wider."""
    real = [as_real(grad.detach()) for grad in grads]
    wide = [g for g in real if g.dtype in (torch.float32, torch.float64)]
    fast = iter(torch._foreach_norm(wide) if wide else [])
    return [
        next(fast) if g.dtype in (torch.float32, torch.float64) else torch.linalg.vector_norm(g, dtype=torch.float32)
        for g in real
    ]


def _factors(records: list[Record]) -> list[Tensor]:
    """Return the squared factors on the gradients since their measurement; shape `()`.

    A gradient of zeros does not tell its factor and gets that of all gradients
    together.
    """
    now = norms(gradient(record) for record in records)
    factors = [torch.ones_like(norm) for norm in now]
    by_device: dict[torch.device, list[int]] = {}
    for i, record in enumerate(records):
        if record.norm is not None:
            by_device.setdefault(record.norm.device, []).append(i)
    for device, indices in by_device.items():
        wide = sum_dtype(device)
        new = torch.stack([now[i].to(wide) for i in indices])
        old = torch.stack([norm.to(wide) for i in indices if (norm := records[i].norm) is not None])
        ratio = torch.where(old > 0, new / old, torch.linalg.vector_norm(new) / torch.linalg.vector_norm(old))
        # Norms that overflow, or all gradients zero: nothing is known, and nothing is
        # changed.
        ratio = torch.where(ratio.isfinite(), ratio, torch.ones_like(ratio))
        for i, factor in zip(indices, ratio.square().unbind()):
            factors[i] = factor
    return factors
