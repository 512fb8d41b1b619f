"""A few held-out examples, used well: judged example by example against the best point so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from popriskmin.risk.pace import Pace
from popriskmin.risk.verdict import IMPROVING, OVERFITTING, UNCLEAR
from popriskmin.risk.weights import copied, gathered, spread
from popriskmin.step.shards import is_sharded

# Share of the training time that looks may take, and steps from one to the next at least where they go by time: the
# closer looks are, the more of them err, and what training shakes weights about is taken for a rise.
SHARE = 0.05
FEWEST_STEPS = 16

# A look comes so many steps later than the one before, in parts of the steps taken: what happens at step 10,000 is
# slower than what happens at step 100, and neighbours shall differ by more than noise.
GROWTH = 0.05

# Weight of each neighbour in a smoothed look.
NEIGHBOUR = 0.25

# Of one look, and how many in a row have to say so. More of either costs more on the way to an alarm than it saves in
# false ones: chosen on six of the ten data sets of experiments/risk_rivals.py.
CONFIDENCE = 0.7
IN_A_ROW = 2


class Look(NamedTuple):
    """One evaluation: the step after which it was made, and the loss of each held-out example."""

    step: int
    losses: Tensor


class HeldOut:
    """Looks at held-out losses now and then, remembers where they were lowest, and says when they rise.

    Looks are smoothed over their neighbours, so that each is judged when the next one has come: `(1, 2, 1) / 4` of
    three. It is compared with the best one so far, example by example: how hard an example is drops out of the
    difference, and what remains scatters far less than the losses do. Where the mean difference favours the new
    one it becomes the best; where it speaks against it by more than the confidence asks of its standard error, in two
    looks in a row, the verdict is "overfitting".

    Parameters
    ----------
    losses
        Called without arguments and under `torch.no_grad()`; returns one loss per held-out example, shape (examples,),
        always of the same examples in the same order.
    confidence
        Of "improving", and of each of the two looks that "overfitting" takes, between 0.5 and 1.
    every
        Steps from one look to the next at least; None finds it by time, so that looks take 5% of it, and not below 16.
    model
        Whose weights are kept at the best look; two copies in memory. None keeps none.
    """

    def __init__(
        self, losses: Callable[[], Tensor], confidence: float, every: int | None = None, model: nn.Module | None = None
    ) -> None:
        self.losses = losses
        self.confidence = confidence
        self.model = model
        self._pace = Pace(SHARE) if every is None else None
        self.every = FEWEST_STEPS if every is None else every
        self.curve: list[tuple[int, float]] = []
        self.verdict: str | None = None
        self._against = 0  # the looks in a row that spoke against the best
        self._recent: list[Look] = []  # the last two, of which the later is not judged yet
        self._best: Look | None = None  # smoothed
        self._recent_weights: dict[str, Any] | None = None  # of the later of the two
        self._best_weights: dict[str, Any] | None = None

    def begin(self, params: Iterable[Tensor] = ()) -> None:
        """Look at the weights that training begins with, unless that was done or would change the training.

        `params` are those that the step is about to change. After an evaluation FSDP2 leaves the outermost module's
        parameters whole, and would train on them once more as they were before the step; asking the model for its
        state, which keeping weights does, parts them again.
        """
        own = set() if self.model is None else {id(param) for param in self.model.parameters()}
        harmless = all(id(param) in own for param in params if is_sharded(param))
        if not self.curve and harmless:
            self.look(0)

    def step_ended(self, step: int) -> None:
        """Look, if it is time."""
        if self._pace is not None:
            self._pace.step_ended()
            if self._pace.known:
                self.every, self._pace = max(FEWEST_STEPS, self._pace.every()), None
        last = self.curve[-1][0] if self.curve else -self.every
        if step < max(last + self.every, math.ceil(last * (1 + GROWTH))):
            return
        if self._pace is None:
            self.look(step)
        else:
            with self._pace.spending():
                self.look(step)

    @torch.no_grad()
    def look(self, step: int) -> None:
        """Evaluate the held-out losses of the weights after `step` steps, and judge the look before.

        Raises
        ------
        ValueError
            For losses that are not one floating-point number for each of at least two examples, as many as before.
        """
        losses = self.losses()
        if not (isinstance(losses, Tensor) and losses.dim() == 1 and losses.is_floating_point() and len(losses) > 1):
            given = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"held_out must return one loss for each of two or more examples, 1-d, got {given}")
        if self._recent and len(losses) != len(self._recent[-1].losses):
            raise ValueError(
                f"held_out must return the losses of the same examples each time, got {len(losses)}, before "
                f"{len(self._recent[-1].losses)}"
            )
        new = Look(step, losses.detach().to("cpu", torch.float64, copy=True))
        self.curve.append((step, new.losses.mean().item()))
        if self._recent:
            self._judge(Look(self._recent[-1].step, _smooth(*self._neighbours(), new.losses)))
        self._recent = [*self._recent[-1:], new]
        if self.model is not None:
            self._recent_weights = copied(self.model.state_dict())

    def _neighbours(self) -> tuple[Tensor, Tensor]:
        return self._recent[0].losses, self._recent[-1].losses

    def _judge(self, look: Look) -> None:
        if self._best is None:
            self._best, self._best_weights = look, self._recent_weights
            return
        gains = self._best.losses - look.losses
        gain = gains.mean().item()
        needed = NormalDist().inv_cdf(self.confidence) * gains.std().item() / math.sqrt(len(gains))
        self._against = self._against + 1 if gain < -needed else 0
        self.verdict = IMPROVING if gain > needed else OVERFITTING if self._against >= IN_A_ROW else UNCLEAR
        if gain > 0:
            self._best, self._best_weights = look, self._recent_weights

    def _last_is_best(self) -> bool:
        """Return whether the last look, which has no neighbour after it yet, is better than the best one judged."""
        if self._best is None:
            return True
        before, last = self._neighbours()
        return (self._best.losses - _smooth(before, last, last)).mean().item() > 0

    @property
    def best_step(self) -> int | None:
        """The step after which the smoothed loss was lowest so far; None before the first look."""
        if not self._recent:
            return None
        return self._recent[-1].step if self._last_is_best() or self._best is None else self._best.step

    def restore(self) -> int:
        """Load the weights of the best look into the model, and return its step.

        Raises
        ------
        RuntimeError
            Without a model whose weights were to be kept, or before the first look.
        """
        if self.model is None:
            raise RuntimeError("no weights were kept: give RiskMonitor the model, keep_best=model")
        step, weights = self.best_step, self._recent_weights if self._last_is_best() else self._best_weights
        if step is None or weights is None:
            raise RuntimeError("no weights were kept yet: the held-out examples have not been looked at")
        self.model.load_state_dict(weights)
        return step

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs; tensors and plain numbers, but for what the model's own state holds.

        Where the model is sharded over ranks its kept weights are gathered: every rank must call.
        """
        return {
            "every": self.every,
            "pace": self._pace is not None,
            "curve": torch.tensor(self.curve, dtype=torch.float64).reshape(-1, 2),
            "verdict": self.verdict,
            "against": self._against,
            "recent": [tuple(look) for look in self._recent],
            "best": None if self._best is None else tuple(self._best),
            "recent_weights": gathered(self._recent_weights),
            "best_weights": gathered(self._best_weights),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.every, self._pace = state_dict["every"], Pace(SHARE) if state_dict["pace"] else None
        self.curve = [(int(step), loss) for step, loss in state_dict["curve"].tolist()]
        self.verdict, self._against = state_dict["verdict"], state_dict["against"]
        self._recent = [Look(*look) for look in state_dict["recent"]]
        self._best = None if state_dict["best"] is None else Look(*state_dict["best"])
        self._recent_weights = spread(state_dict["recent_weights"], self.model)
        self._best_weights = spread(state_dict["best_weights"], self.model)


def _smooth(before: Tensor, losses: Tensor, after: Tensor) -> Tensor:
    return NEIGHBOUR * before + (1 - 2 * NEIGHBOUR) * losses + NEIGHBOUR * after
