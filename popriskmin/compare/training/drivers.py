"""How each arm steps: its optimizer, built for a trial, and the matched step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from popriskmin.compare.task import Options, Params, Trial
from popriskmin.compare.training import other_optimizers
from popriskmin.compare.training.arms import Arm, needs_counts
from popriskmin.optimizer.prm import PRM

# Options of PRM that torch's AdamW and Adam have too; the matched arm takes them over.
SHARED = ("betas", "eps", "amsgrad", "maximize")


class Driver:
    """An optimizer and the way in which an arm steps it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, number: int) -> None:
        """Take step `number`, counted from 1."""
        self.optimizer.step()

    def train(self, mode: bool = True) -> None:
        """Switch an optimizer that evaluates with other weights, as schedule-free ones do."""
        switch = getattr(self.optimizer, "train" if mode else "eval", None)
        if callable(switch):
            switch()

    def factor(self, number: int) -> float | None:
        """Return PRM's mean `q` of the step just taken, or the number in its place."""
        return None


class PRMDriver(Driver):
    """PRM; the factor is its mean `q`."""

    optimizer: PRM

    def factor(self, number: int) -> float | None:
        """Return PRM's mean `q`."""
        stats = self.optimizer.get_mask_stats()
        return None if stats is None else stats["mean_q"]


class MatchedDriver(Driver):
    """AdamW with each step multiplied by the mean `q` that PRM had at that step."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, trace: Sequence[float], decoupled: bool, mask_decay: bool
    ) -> None:
        super().__init__(optimizer)
        self.trace = trace
        self.decoupled = decoupled
        self.mask_decay = mask_decay

    def step(self, number: int) -> None:
        """Take a step of AdamW, multiplied by the factor."""
        factors = [self.trace[number - 1]] * len(self.optimizer.param_groups)
        step_matched(self.optimizer, factors, decoupled=self.decoupled, mask_decay=self.mask_decay)

    def factor(self, number: int) -> float | None:
        """Return the factor of the step just taken."""
        return self.trace[number - 1]


def step_matched(
    optimizer: torch.optim.Optimizer, factors: Sequence[float], *, decoupled: bool = True, mask_decay: bool = False
) -> None:
    """Take one step of AdamW or Adam, multiplied by a factor for each parameter group.

    The weight decay is treated as PRM treats it: it is not multiplied, unless PRM masks its
    decay too. The groups' options are afterwards what they were.

    Parameters
    ----------
    optimizer
        An optimizer whose groups have "lr" and "weight_decay".
    factors
        PRM's mean `q` for each group.
    decoupled
        Whether the decay shrinks the weights, as AdamW's does; else it is in the gradient.
    mask_decay
        Whether the factor multiplies a decoupled decay too.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.ones(1))
    >>> w.grad = torch.ones(1)
    >>> step_matched(torch.optim.AdamW([w], lr=0.1, weight_decay=0.0), [0.5])
    >>> round(w.item(), 4)
    0.95
    """
    options = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group, (lr, decay), factor in zip(optimizer.param_groups, options, factors):
        if decoupled:
            stepped = [param for param in group["params"] if param.grad is not None]
            if stepped:
                with torch.no_grad():
                    torch._foreach_mul_(stepped, 1 - lr * decay * (factor if mask_decay else 1.0))
            group["weight_decay"] = 0.0
        group["lr"] = lr * factor
    optimizer.step()
    for group, (lr, decay) in zip(optimizer.param_groups, options):
        group["lr"], group["weight_decay"] = lr, decay


def make_driver(
    arm: Arm, trial: Trial, lr: float, weight_decay: float, common: Options, trace: Sequence[float] | None = None
) -> Driver:
    """Build the arm's optimizer for a trial.

    Parameters
    ----------
    lr, weight_decay
        One configuration of the grid.
    common
        The task's `optimizer_options`.
    trace
        For "adamw-matched", PRM's mean `q` of every step.
    """
    params = list(trial.model.named_parameters() if trial.parameters is None else trial.parameters)
    if arm.optimizer is not None:
        return Driver(other_optimizers.build(arm.optimizer, _unnamed(params), lr, weight_decay, common, arm.options))
    options = {"lr": lr, "weight_decay": weight_decay, **common, **arm.options}
    if arm.kind == "prm":
        if needs_counts(options):
            options = {"batch_size": trial.batch_size, "n_dataset": trial.n_dataset, **options}
        return PRMDriver(PRM(params, **options))
    decoupled = options.get("decoupled_weight_decay", True)
    build: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW if decoupled else torch.optim.Adam
    kept = {name: value for name, value in options.items() if name in ("lr", "weight_decay", *SHARED)}
    optimizer = build(_unnamed(params), **kept)
    if arm.kind == "adamw":
        return Driver(optimizer)
    if trace is None:
        raise ValueError(f"{arm.name} needs the factors of {arm.follows}")
    return MatchedDriver(optimizer, trace, decoupled, options.get("mask_decay", False))


def _unnamed(params: Params) -> Params:
    """Drop parameter names, which torch's optimizers take only since 2.6."""
    if params and isinstance(params[0], dict):
        return [{**group, "params": _unnamed(list(group["params"]))} for group in params]
    return [param[1] if isinstance(param, tuple) else param for param in params]
