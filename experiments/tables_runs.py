"""Many networks on one table, trained side by side: those of all seeds and of a whole grid, as if each were alone.

The networks of one seed read the same batches, so their first layers are one matrix product; every network is a
parameter group of its own, with its own learning rate and decay, in one optimizer. What comes out differs from
`popriskmin compare table` by rounding alone, which `tests/test_tables_study.py` checks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from shrinkage_variants import by_fan_in, within_noise
from torch import Tensor, nn

from popriskmin import PRM
from popriskmin.compare.training.drivers import step_matched
from popriskmin.compare.training.train import seed_everything
from popriskmin.diagnosis.shrinkage_controller import largest_square
from popriskmin.mask import Hyperparameters
from popriskmin.optimizer.mask_state import ParamState, recompute
from popriskmin.tasks.table import Table

functional = nn.functional

LOOKS = (0.1, 0.3, 1.0)  # shares of the steps after which it is noted how open the masks are
MOST = 3.0  # standard errors, of a shrinkage with a bound
SMALLEST = torch.finfo(torch.float32).tiny
CACHED = 50_000  # scalars that are worked on at a time, so that they stay in the cache


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train, and the grid it is tuned over.

    Attributes
    ----------
    kind
        "adamw", "sgd", "prm", or "matched": AdamW whose steps are multiplied by the mean q of the arm `follows`.
    options
        Of PRM.
    decays
        Values of `axis`, beside each of which stands every rate.
    axis
        What is tuned beside the rate: "decay", the weight decay; or, without a decay and on the first layer alone,
        "l1", the weight of the absolute values in the loss; "decoupled l1", by how much of a rate each weight is
        drawn to zero after a step; "shrinkage", PRM's; "shrinkage of all", PRM's on both layers; "bounded shrinkage"
        and "bounded shrinkage of all", the bound of `bind`; "fan-in shrinkage" and "fan-in shrinkage of all", the
        share of `by_fan_in`; "followed shrinkage", where `Follower` starts.
    average
        Whether an exponential average of the weights over about 50 steps is what is measured.
    holds
        Whether a weight at zero leaves it only where its running mean is beyond the shrinkage in standard errors of
        what that mean can see: `z * sqrt((c + k) * s^)`, with `k` the variance of the running mean.
    """

    name: str
    kind: str
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    decays: tuple[float, ...] = (0.01, 1.0)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    follows: str | None = None
    axis: str = "decay"
    average: bool = False
    holds: bool = False

    @property
    def grid(self) -> list[tuple[float, float]]:
        """All pairs of a learning rate and a value of the axis."""
        return list(itertools.product(self.rates, self.decays))


class Stack:
    """Networks with one hidden layer on a table, for several seeds.

    Where a seed has fewer columns than another, zeros stand in for them.

    Attributes
    ----------
    x, y
        The training data, of shape (seeds, rows, columns) and (seeds, rows).
    held_out
        Validation and test data in these shapes.
    batches
        Numbers of rows, of shape (steps, seeds, batch).
    """

    def __init__(self, task: Table, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        prepared = [task.prepare(seed) for seed in seeds]
        self.classifies = prepared[0].classifies
        self.columns = [data.training[0].shape[1] for data in prepared]
        self.probes, self.batch_size = task.probes, task.batch_size
        self.x, self.y = self._joined([data.training for data in prepared])
        self.held_out = [self._joined([getattr(data, part) for data in prepared]) for part in ("validation", "test")]
        self.models, batches = [], []
        for seed in seeds:
            seed_everything(seed)
            trial = task.trial(seed)
            self.models.append(trial.model)
            batches.append(torch.stack(list(trial.batches)))
            self.evaluate_every = trial.evaluate_every
        self.batches = torch.stack(batches, 1)

    def _joined(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x = torch.stack([functional.pad(x, (0, max(self.columns) - x.shape[1])) for x, _ in pairs])
        return x, torch.stack([y for _, y in pairs])

    def weights(self, copies: int) -> list[Tensor]:
        """Return the initial weights and biases, of shape (seeds, copies, ...), those of the first layer first."""
        layers = []
        for kind in ("weight", "bias"):
            for layer in (0, 2):
                values = [getattr(model[layer], kind).detach() for model in self.models]
                if (kind, layer) == ("weight", 0):
                    values = [functional.pad(w, (0, max(self.columns) - w.shape[1])) for w in values]
                layers.append(torch.stack(values))
        return [w[:, None].repeat(1, copies, *[1] * (w.dim() - 1)) for w in layers]

    def real_share(self) -> Tensor:
        """Return, of shape (seeds, 1), which share of a network's scalars is no filling."""
        counts = [sum(p.numel() for p in model.parameters()) for model in self.models]
        hidden = self.models[0][0].out_features
        return torch.tensor([n / (n + hidden * (max(self.columns) - d)) for n, d in zip(counts, self.columns)])[:, None]

    def answers(self, weights: Sequence[Tensor], x: Tensor) -> Tensor:
        """Return answers of shape (seeds, copies, rows, outputs) to inputs of shape (seeds, rows, columns)."""
        first, second, bias_first, bias_second = weights
        seeds, copies, hidden, d = first.shape
        flat = torch.baddbmm(bias_first.reshape(seeds, 1, -1), x, first.reshape(seeds, -1, d).mT)
        inner = flat.unflatten(2, (copies, hidden)).transpose(1, 2).relu()
        return inner @ second.mT + bias_second[:, :, None]

    def losses(self, found: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of each network, of shape (seeds, copies)."""
        target = y[:, None].expand(found.shape[:3])
        if self.classifies:
            return functional.cross_entropy(found.movedim(3, 1), target, reduction="none").mean(2)
        return (found[..., 0] - target).square().mean(2)

    def measure(self, weights: Sequence[Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        """Return loss and, of a classification, accuracy of each network, of shape (metrics, seeds, copies)."""
        found = self.answers(weights, data[0])
        metrics = [self.losses(found, data[1])]
        if self.classifies:
            metrics.append((found.argmax(3) == data[1][:, None]).float().mean(2))
        return torch.stack(metrics)


def build(arm: Arm, groups: list[dict[str, Any]], counts: Mapping[str, int] | None = None) -> torch.optim.Optimizer:
    """Return the arm's optimizer for groups that have their rates and decays; shrinkage needs the counts."""
    if arm.kind == "prm":
        return PRM(groups, **arm.options, **(counts or {}))
    if arm.kind == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    return torch.optim.AdamW(groups, fused=True)


def train(
    stack: Stack, arm: Arm, factors: Tensor | None = None, keep_factors: bool = False
) -> tuple[dict[str, Any], Tensor | None]:
    """Train the networks of all seeds and the arm's whole grid.

    Parameters
    ----------
    factors
        For a matched arm, what multiplies each step, of shape (steps, seeds, configurations).
    keep_factors
        Whether to return PRM's mean q of every step in that shape.

    Returns
    -------
    The results, for each configuration and seed: validation and test metrics at the step with the best validation
    loss and at the last, and for PRM how open the masks were; and the factors.
    """
    grid = arm.grid
    weights = stack.weights(len(grid))
    steps = len(stack.batches)
    networks = list(itertools.product(range(len(stack.seeds)), range(len(grid))))
    parts = [[nn.Parameter(w[s, c]) for w in weights] for s, c in networks]
    groups = [group for (_, c), part in zip(networks, parts) for group in grouped(arm, part, *grid[c])]
    shrinks = "shrinkage" in arm.axis
    optimizer = build(arm, groups, {"batch_size": stack.batch_size, "n_dataset": stack.x.shape[1]} if shrinks else None)
    strength = torch.tensor([value for _, value in grid]) if arm.axis == "l1" else None
    drawn = torch.tensor([rate * value for rate, value in grid]) if arm.axis == "decoupled l1" else None
    share = stack.real_share()
    watch = Watch(stack, [w.clone() for w in weights] if arm.average else weights)
    looks = {max(1, round(steps * look)): look for look in LOOKS} if arm.kind == "prm" else {}
    opened, kept = {}, []
    follower = Follower(stack, optimizer) if arm.axis == "followed shrinkage" else None
    watch.look(0)
    for number, rows in enumerate(stack.batches, 1):
        leaves = [w.detach().requires_grad_() for w in weights]
        x = stack.x[torch.arange(len(rows))[:, None], rows]
        loss = stack.losses(stack.answers(leaves, x), stack.y.gather(1, rows))
        if strength is not None:
            loss = loss + strength * leaves[0].abs().flatten(2).sum(2)
        # Contiguous, because torch's fused AdamW reads a gradient in the order of memory.
        gradients = [gradient.contiguous() for gradient in torch.autograd.grad(loss.sum(), leaves)]
        for (s, c), part in zip(networks, parts):
            for parameter, gradient in zip(part, gradients):
                parameter.grad = gradient[s, c]
        was_zero = weights[0] == 0 if arm.holds else None
        if factors is None:
            optimizer.step()
        else:
            step_matched(optimizer, factors[number - 1].flatten().tolist())
        if arm.axis.startswith("bounded"):
            bind(optimizer, number)
        if follower is not None:
            follower.step(weights)
        if was_zero is not None:
            hold(optimizer, was_zero.flatten(0, 1), number)
        if drawn is not None:
            draw(weights[0], drawn[:, None, None])
        if arm.average:
            for mean, now in zip(watch.weights, weights):
                mean.lerp_(now, max(1 / 50, 1 / (number + 1)))
        if keep_factors or number in looks:
            q, active = (values.view(len(stack.seeds), -1) for values in openness(optimizer, parts, number))
            q, active = q / share, active / share
            if keep_factors:
                kept.append(q)
            if number in looks:
                opened[str(looks[number])] = _rounded(torch.stack([q.mean(0), active.mean(0)]))
        if number == steps or number % stack.evaluate_every == 0:
            watch.look(number)
    found = watch.results(grid) | ({"opened": opened} if opened else {})
    if shrinks or drawn is not None:
        found["zeros"] = zeros(stack, weights[0])
    if follower is not None:
        ends = torch.tensor([group["shrinkage"] for group in follower.groups])
        found["shrinkage at the end"] = _rounded(ends.view(len(stack.seeds), -1))
    return found, torch.stack(kept) if kept else None


def grouped(arm: Arm, part: Sequence[nn.Parameter], rate: float, value: float) -> list[dict[str, Any]]:
    """Return one network's parameter groups; the first layer stands apart where it alone is shrunk."""
    if arm.axis == "decay":
        return [{"params": list(part), "lr": rate, "weight_decay": value}]
    group = {"lr": rate, "weight_decay": 0.0}
    if arm.axis in ("shrinkage", "followed shrinkage"):
        return [group | {"params": [part[0]], "shrinkage": value}, group | {"params": list(part[1:])}]
    if arm.axis.startswith(("bounded", "fan-in")):
        layers = part[:2] if arm.axis.endswith("of all") else part[:1]  # a group each, so that each has its own
        others = group | {"params": list(part[len(layers) :])}
        if arm.axis.startswith("bounded"):
            own = [{"shrinkage": MOST, "bound": value} for _ in layers]
        else:
            own = [{"shrinkage": by_fan_in(value, layer)} for layer in layers]
        return [*(group | one | {"params": [layer]} for one, layer in zip(own, layers)), others]
    if arm.axis == "shrinkage of all":
        return [group | {"params": list(part), "shrinkage": value}]
    return [group | {"params": list(part)}]


@torch.no_grad()
def draw(weight: Tensor, by: Tensor) -> None:
    """Draw each weight to zero by so much, and no further."""
    weight.copy_(weight.sign() * (weight.abs() - by).clamp(min=0))


@torch.no_grad()
def bind(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Let no layer be pulled by more than a share of its largest mean gradient, both in standard errors.

    A group with a `bound` has one parameter. Its shrinkage in the next step is `MOST` or, where this is less, the bound
    times the largest `|m^| / sqrt(c * s^)` of the layer, so that the layer's strongest weights lie beyond it.
    """
    for group in optimizer.param_groups:
        if "bound" in group:
            (param,) = group["params"]
            one = ParamState(0, 0, param, optimizer.state[param], step, Hyperparameters.of_group(group))
            largest = largest_square(one)[0].sqrt().item()
            group["shrinkage"] = max(SMALLEST, min(MOST, group["bound"] * largest))  # 0 would need no counts


@torch.no_grad()
def hold(optimizer: torch.optim.Optimizer, was_zero: Tensor, step: int) -> None:
    """Put weights of the first layers back to zero that have left it on no more than the noise of the running mean."""
    for group, zero in zip(optimizer.param_groups[::2], was_zero):  # each network has two groups, see `grouped`
        if group["shrinkage"]:
            state = optimizer.state[group["params"][0]]
            held = zero & within_noise(state, step, Hyperparameters.of_group(group))
            group["params"][0].masked_fill_(held, 0.0)


class Follower:
    """Lets the shrinkage of each network's first layer follow a few held-out rows.

    A little more shrinkage moves the weights that are not zero towards it, in proportion to `sqrt(s) / sqrt(v)`. Where
    that lowers the loss of the held-out rows the shrinkage rises, else it falls, by Adam on its logarithm.
    """

    rows = 50  # of the validation data
    rate = 0.05
    least, most = 0.01, 5.0

    def __init__(self, stack: Stack, optimizer: torch.optim.Optimizer) -> None:
        self.stack = stack
        self.optimizer = optimizer
        self.groups = optimizer.param_groups[::2]  # each network has two, see `grouped`
        self.logs = nn.Parameter(torch.tensor([group["shrinkage"] for group in self.groups]).log())
        self.own = torch.optim.Adam([self.logs], lr=self.rate, betas=(0.9, 0.99))

    def step(self, weights: Sequence[Tensor]) -> None:
        """Set every shrinkage anew."""
        leaf = weights[0].detach().requires_grad_()
        x, y = (part[:, : self.rows] for part in self.stack.held_out[0])
        loss = self.stack.losses(self.stack.answers([leaf, *weights[1:]], x), y).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        states = [self.optimizer.state[group["params"][0]] for group in self.groups]
        noise, square = (torch.stack([one[name] for one in states]) for name in ("exp_avg_var", "exp_avg_sq"))
        pull = -leaf.detach().flatten(0, 1).sign() * noise.sqrt() / (square.sqrt() + SMALLEST)
        along = (gradient.flatten(0, 1) * pull).sum((1, 2))
        # A layer that has closed has nothing to pull, and is to open.
        self.logs.grad = torch.where((pull != 0).any(2).any(1), along / gradient.flatten(0, 1).norm(dim=(1, 2)), 1.0)
        self.own.step()
        with torch.no_grad():
            self.logs.clamp_(math.log(self.least), math.log(self.most))
        for group, value in zip(self.groups, self.logs.detach().exp().tolist()):
            group["shrinkage"] = value


def zeros(stack: Stack, first: Tensor) -> dict[str, Any]:
    """Return of each configuration, mean over the seeds, which shares of the first layer are exactly zero.

    These are shares of the weights, of the columns as they came, and of the columns that say nothing; a column is zero
    where all its weights are.
    """
    weights, real, probes = [], [], []
    for one, columns in zip(first == 0, stack.columns):
        here = one[..., :columns]
        whole = here.all(1)
        weights.append(here.float().mean((1, 2)))
        real.append(whole[:, : columns - stack.probes].float().mean(1))
        probes.append(whole[:, columns - stack.probes :].float().mean(1))
    found = {"weights": weights, "columns": real} | ({"columns that say nothing": probes} if stack.probes else {})
    return {name: _rounded(torch.stack(shares).mean(0)) for name, shares in found.items()}


@torch.no_grad()
def openness(optimizer: torch.optim.Optimizer, parts: Sequence[Sequence[Tensor]], step: int) -> tuple[Tensor, Tensor]:
    """Return each network's mean q after a step of PRM and the share of its scalars with more signal than noise.

    As `PRM.get_mask_stats(by="group")` would, but with the tensors of all networks in one.
    """
    hyper = Hyperparameters.of_group(optimizer.param_groups[0])
    q, active = torch.zeros(len(parts)), torch.zeros(len(parts))
    for alike in zip(*parts):
        several = max(1, CACHED // alike[0].numel())
        for start in range(0, len(parts), several):
            some = slice(start, start + several)
            states = [optimizer.state[part] for part in alike[some]]
            state = {name: torch.stack([one[name] for one in states]) for name in ("exp_avg", "exp_avg_var")}
            found = recompute(state, step, hyper)
            q[some] += found.q.reshape(len(states), -1).sum(1)
            active[some] += (found.signal > found.noise * hyper.coefficient).reshape(len(states), -1).sum(1)
    count = sum(part.numel() for part in parts[0])
    return q / count, active / count


class Watch:
    """Evaluates networks while they train, and keeps what stopping at the best validation loss would have given."""

    def __init__(self, stack: Stack, weights: list[Tensor]) -> None:
        self.stack = stack
        self.weights = weights
        self.best: Tensor | None = None  # (2, metrics, seeds, copies): validation and test
        self.last: Tensor
        self.step: Tensor

    @torch.no_grad()
    def look(self, number: int) -> None:
        """Measure now."""
        self.last = torch.stack([self.stack.measure(self.weights, data) for data in self.stack.held_out])
        if self.best is None:
            self.best, self.step = self.last.clone(), torch.zeros(self.last.shape[2:], dtype=torch.long)
            return
        better = self.last[0, 0] < self.best[0, 0]
        self.best = torch.where(better, self.last, self.best)
        self.step[better] = number

    def results(self, grid: Sequence[tuple[float, float]]) -> dict[str, Any]:
        """Return, for each configuration, lists over the seeds."""
        assert self.best is not None  # noqa: S101 - look() has been called
        found = {}
        for c, (rate, decay) in enumerate(grid):
            found[f"{rate:g} {decay:g}"] = {
                "best": _rounded(self.best[..., c]),
                "final": _rounded(self.last[..., c]),
                "step": self.step[:, c].tolist(),
            }
        return {"configurations": found}


def _rounded(values: Tensor) -> Any:
    """Return nested lists of numbers with five digits; None for what is not finite."""
    if values.dim() == 0:
        value = values.item()
        return float(f"{value:.5g}") if torch.isfinite(values) else None
    return [_rounded(value) for value in values]
