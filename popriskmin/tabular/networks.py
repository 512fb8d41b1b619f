"""Networks with one hidden layer, side by side: all settings of a search on all parts of the data, as one model.

The weights of all networks lie in four tensors, whose first two dimensions count the
settings and the parts, so that a step is a few large products. The optimizer has a group
for each setting's first layer, where the shrinkage acts, and one for all else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from popriskmin.optimizer import PRM

functional = nn.functional

LOOKS = 40  # evaluations in a training that takes all its steps
CHOOSE_RATES = 0.25  # share of the steps after which each shrinkage goes on with its best learning rate
PATIENCE = 0.3  # share of the steps: a search ends where no shrinkage has improved for so long
WEIGHT_DECAY = 0.01
STATE = ("exp_avg", "exp_avg_sq", "exp_avg_var")


class Setting(NamedTuple):
    """How the networks of all parts are trained."""

    learning_rate: float
    shrinkage: float


class Part(NamedTuple):
    """Numbers of the rows that a network is trained on, and of those on which it is measured, which may be none."""

    training: np.ndarray
    held_out: np.ndarray


class Data(NamedTuple):
    """Inputs (rows, columns), float32; targets (rows,), classes as int64 or numbers as float32; weights of mean 1."""

    x: Tensor
    y: Tensor
    weight: Tensor
    outputs: int

    @property
    def classifies(self) -> bool:
        """Whether the targets are classes."""
        return not self.y.is_floating_point()

    def constant(self) -> Tensor:
        """Return the answers of a constant: logarithms of the classes' shares, or 0, the mean of a scaled target."""
        if not self.classifies:
            return torch.zeros(1, device=self.x.device)
        share = torch.zeros(self.outputs, device=self.x.device).index_add_(0, self.y, self.weight) + 1e-3
        return (share / share.sum()).log()

    def losses(self, answers: Tensor, rows: Tensor) -> Tensor:
        """Return the loss of each answer of shape (settings, parts, rows, outputs) to `rows` of shape (parts, rows)."""
        target = self.y[rows].expand(answers.shape[:3])
        if self.classifies:
            return functional.cross_entropy(answers.movedim(3, 1), target, reduction="none")
        return (answers[..., 0] - target).square()

    def slopes(self, answers: Tensor, rows: Tensor) -> Tensor:
        """Return the gradients of the weighted mean losses over `rows` by the answers, in their shape."""
        weight = (self.weight[rows] / rows.shape[1])[..., None]
        if self.classifies:
            return (answers.softmax(3) - functional.one_hot(self.y[rows], self.outputs)) * weight
        return 2 * (answers - self.y[rows][..., None]) * weight


@dataclasses.dataclass
class Trained:
    """What came of a training; settings in the order in which they were given.

    Attributes
    ----------
    settings
        Those that were trained to the end.
    weights
        First layer (settings, parts, hidden, columns), its biases, second layer (settings,
        parts, outputs, hidden), its biases: of each network those with which its held-out
        loss was lowest.
    curves
        For every setting, those left early included, the held-out loss of each part at
        each evaluation, of shape (evaluations, parts).
    steps
        The numbers of steps of the evaluations.
    interrupted
        Whether Ctrl-C ended it.
    """

    settings: list[Setting]
    weights: list[Tensor]
    curves: dict[Setting, Tensor]
    steps: list[int]
    interrupted: bool = False

    def loss(self, setting: Setting) -> float:
        """Return the lowest mean held-out loss over the parts."""
        return self.curves[setting].mean(1).min().item()

    def best_step(self, setting: Setting) -> int:
        """Return after how many steps the mean held-out loss was lowest."""
        return self.steps[int(self.curves[setting].mean(1).argmin())]

    def best(self) -> Setting:
        """Return the setting with the lowest mean held-out loss of those that were trained to the end."""
        return min(self.settings, key=self.loss)


class Stack:
    """The weights of all networks, one optimizer for all of them, and their steps."""

    def __init__(self, settings: Sequence[Setting], weights: list[Tensor], batch_size: int, n_dataset: int) -> None:
        self.settings = list(settings)
        self.weights = weights
        self.sizes = (batch_size, n_dataset)
        self.gradients = [torch.zeros_like(w) for w in weights]
        self.leaves = [[nn.Parameter(w[c]) for w in weights] for c in range(len(settings))]
        for c, leaves in enumerate(self.leaves):
            for leaf, gradient in zip(leaves, self.gradients):
                leaf.grad = gradient[c]
        groups: list[dict[str, object]] = []
        for (learning_rate, shrinkage), (first, *others) in zip(self.settings, self.leaves):
            groups.append({"params": [first], "lr": learning_rate, "shrinkage": shrinkage})
            groups.append({"params": others, "lr": learning_rate})
        self.optimizer = PRM(groups, weight_decay=WEIGHT_DECAY, batch_size=batch_size, n_dataset=n_dataset)

    def step(self, data: Data, rows: Tensor) -> None:
        """Train on `rows` of shape (parts, batch)."""
        gradients(self.weights, data, rows, out=self.gradients)
        self.optimizer.step()

    def only(self, places: Sequence[int]) -> Stack:
        """Return the networks of some settings, with the optimizer's state."""
        fewer = Stack([self.settings[c] for c in places], [w[list(places)] for w in self.weights], *self.sizes)
        for c, leaves in zip(places, fewer.leaves):
            for old, new in zip(self.leaves[c], leaves):
                fewer.optimizer.state[new] = dict(self.optimizer.state[old])
        return fewer


def answers(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return answers of shape (settings, parts, rows, outputs) to inputs of shape (parts, rows, columns)."""
    first, first_bias, second, second_bias = weights
    hidden = (x @ first.mT + first_bias[:, :, None]).relu()
    return hidden @ second.mT + second_bias[:, :, None]


@torch.no_grad()
def gradients(weights: Sequence[Tensor], data: Data, rows: Tensor, out: Sequence[Tensor]) -> None:
    """Write the gradients of each network's mean loss on `rows` of shape (parts, batch) into `out`.

    Written out because autograd lays the first layer's gradient out transposed, and allocates
    it anew in each step: both together cost more than the products.
    """
    of_first, of_first_bias, of_second, of_second_bias = (gradient.flatten(0, 1) for gradient in out)
    first, first_bias, second, second_bias = (w.flatten(0, 1) for w in weights)
    x = data.x[rows].expand(len(weights[0]), -1, -1, -1).flatten(0, 1)
    hidden = torch.baddbmm(first_bias[:, None], x, first.mT).relu_()
    answered = torch.baddbmm(second_bias[:, None], hidden, second.mT)
    error = data.slopes(answered.view(*out[0].shape[:2], *answered.shape[1:]), rows).flatten(0, 1)
    torch.bmm(error.mT, hidden, out=of_second)
    torch.sum(error, 1, out=of_second_bias)
    behind = torch.bmm(error, second).mul_(hidden > 0)
    torch.bmm(behind.mT, x, out=of_first)
    torch.sum(behind, 1, out=of_first_bias)


def initial(data: Data, settings: int, parts: int, hidden: int, generator: torch.Generator) -> list[Tensor]:
    """Return the weights at the start, those of a part alike in all settings.

    The first layer is torch's own for `nn.Linear`. The second starts at 0 and at the answers
    of a constant, so that a network is at first what one without columns would be.
    """
    columns, outputs = data.x.shape[1], data.outputs
    bound = max(1, columns) ** -0.5
    shapes = [(parts, hidden, columns), (parts, hidden)]
    weights = [(torch.rand(shape, generator=generator) * 2 - 1) * bound for shape in shapes]
    weights += [torch.zeros(parts, outputs, hidden), data.constant().cpu().expand(parts, outputs)]
    return [w.to(data.x.device)[None].repeat(settings, *[1] * w.dim()) for w in weights]


def batches(parts: Sequence[Part], batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield numbers of rows of shape (parts, batch), without end, each part's from shuffled passes over it."""
    passes = min(len(part.training) for part in parts) // batch_size
    training = [torch.as_tensor(part.training) for part in parts]
    while True:
        order = [rows[torch.randperm(len(rows), generator=generator)[: passes * batch_size]] for rows in training]
        yield from torch.split(torch.stack(order), batch_size, 1)


class Held(NamedTuple):
    """Numbers and weights of the held-out rows of each part, (parts, rows): row 0 with weight 0 fills what is short."""

    rows: Tensor
    weight: Tensor


def held_out(data: Data, parts: Sequence[Part]) -> Held:
    """Return the held-out rows of all parts side by side."""
    longest = max(len(part.held_out) for part in parts)
    rows = torch.zeros(len(parts), longest, dtype=torch.long)
    inside = torch.zeros(len(parts), longest)
    for s, part in enumerate(parts):
        rows[s, : len(part.held_out)] = torch.as_tensor(part.held_out)
        inside[s, : len(part.held_out)] = 1
    rows = rows.to(data.x.device)
    return Held(rows, inside.to(data.x.device) * data.weight[rows])


class Watch:
    """Evaluates networks while they train, and keeps each at its best."""

    def __init__(self, data: Data, parts: Sequence[Part], stack: Stack) -> None:
        self.data = data
        self.rows, weight = held_out(data, parts)
        self.weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
        self.measures = self.rows.shape[1] > 0
        self.curves: dict[Setting, list[Tensor]] = {setting: [] for setting in stack.settings}
        self.steps: list[int] = []
        self.best = [w.clone() for w in stack.weights]
        self.lowest = torch.full(stack.weights[0].shape[:2], torch.inf, device=data.x.device)

    @torch.no_grad()
    def look(self, stack: Stack, step: int) -> None:
        """Evaluate now."""
        self.steps.append(step)
        if not self.measures:
            self.best = stack.weights
            return
        losses = self.data.losses(answers(stack.weights, self.data.x[self.rows]), self.rows)
        loss = (losses * self.weight).sum(2).nan_to_num(torch.inf)
        for setting, one in zip(stack.settings, loss):
            self.curves[setting].append(one.cpu())
        better = loss < self.lowest
        self.lowest = torch.where(better, loss, self.lowest)
        for best, now in zip(self.best, stack.weights):
            best.copy_(torch.where(better.view(*better.shape, *[1] * (now.dim() - 2)), now, best))

    def mean(self, setting: Setting) -> Tensor:
        """Return the mean held-out loss over the parts at each evaluation."""
        return torch.stack(self.curves[setting]).mean(1)

    def only(self, places: list[int]) -> None:
        """Go on with some of the settings."""
        self.best = [w[places] for w in self.best]
        self.lowest = self.lowest[places]

    def results(self, stack: Stack, interrupted: bool) -> Trained:
        """Return what there is."""
        curves = {setting: torch.stack(curve) for setting, curve in self.curves.items() if curve}
        return Trained(stack.settings, self.best, curves, self.steps, interrupted)


def train(
    data: Data,
    settings: Sequence[Setting],
    parts: Sequence[Part],
    hidden: int,
    batch_size: int,
    steps: int,
    generator: torch.Generator,
    progress: Callable[[float], None] = lambda share: None,
) -> Trained:
    """Train a network for each setting and part.

    After a quarter of the steps each shrinkage goes on with its best learning rate alone.
    Where rows are held out, the training ends early once no setting improves. Ctrl-C ends it
    too, and what there is by then is returned.
    """
    rows = min(len(part.training) for part in parts)
    batch_size = max(1, min(batch_size, rows // 2))
    stack = Stack(
        settings,
        initial(data, len(settings), len(parts), hidden, generator),
        batch_size,
        max(rows, batch_size + 1),  # of a single row there is no variance
    )
    watch = Watch(data, parts, stack)
    every = max(1, steps // LOOKS)
    chosen_at = round(steps * CHOOSE_RATES) // every * every
    interrupted = False
    watch.look(stack, 0)
    try:
        for step, numbers in enumerate(batches(parts, batch_size, generator), 1):
            stack.step(data, numbers.to(data.x.device))
            if step % every == 0 or step == steps:
                watch.look(stack, step)
                progress(step / steps)
                if step == chosen_at and watch.measures:
                    places = _best_rates(stack, watch)
                    stack = stack.only(places)
                    watch.only(places)
            if step == steps or (step % every == 0 and step > chosen_at and _is_done(stack, watch, steps)):
                break
    except KeyboardInterrupt:
        interrupted = True
    return watch.results(stack, interrupted)


def _best_rates(stack: Stack, watch: Watch) -> list[int]:
    places: dict[float, int] = {}
    for c in sorted(range(len(stack.settings)), key=lambda c: watch.mean(stack.settings[c]).min().item()):
        places.setdefault(stack.settings[c].shrinkage, c)
    return sorted(places.values())


def _is_done(stack: Stack, watch: Watch, steps: int) -> bool:
    if not watch.measures:
        return False
    latest = max(watch.steps[int(watch.mean(setting).argmin())] for setting in stack.settings)
    return watch.steps[-1] - latest > PATIENCE * steps
