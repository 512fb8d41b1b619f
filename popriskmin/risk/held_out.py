"""Held-out examples: looks at their losses, each judged against the best look."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from popriskmin.risk.samples import Pace
from popriskmin.step.shards import is_sharded, whole

IMPROVING, OVERFITTING, UNCLEAR = "improving", "overfitting", "unclear"

# Share of the training time that looks may take, and the fewest steps between two looks
# that are paced by time. The closer looks are, the more of them err: the shaking of the
# weights by training is then taken for a rise.
SHARE = 0.05
FEWEST_STEPS = 16

# Looks are at least this part of the steps taken apart: a change at step 10,000 is
# slower than one at step 100, and neighbouring looks should differ by more than noise.
GROWTH = 0.05

# Weight of each neighbour in a smoothed look.
NEIGHBOUR = 0.25

# The confidence of one look, and the looks in a row that an alarm takes. More of either
# delays an alarm by more than it saves in false ones. Chosen on six of the ten data
# sets of experiments/risk_rivals.py.
CONFIDENCE = 0.7
IN_A_ROW = 2

Weights = Mapping[str, Any]


class Look(NamedTuple):
    """One evaluation: the step that it followed, and the loss of each example."""

    step: int
    losses: Tensor


class HeldOut:
    """Looks at held-out losses, remembers the lowest, and says when they rise.

    A look is smoothed over its two neighbours with the weights `(1, 2, 1) / 4`, so it
    is judged when the next one is there. It is compared with the best look so far,
    example by example: the difficulty of an example drops out of the difference, which
    scatters far less than the losses do. If the mean difference favours the new look,
    that becomes the best. If it speaks against the new look by more than the confidence
    asks of its standard error, in two looks in a row, the verdict is "overfitting".

    Parameters
    ----------
    losses
        Called without arguments under `torch.no_grad()`. It returns one loss for each
        held-out example, shape (examples,), of the same examples in the same order.
    confidence
        Of "improving", and of each of the two looks that "overfitting" takes; between
        0.5 and 1.
    every
        The fewest steps between two looks. None finds a number, not below 16, that
        keeps looks to 5% of the training time.
    model
        The model whose best weights are kept; None keeps none.
    """

    def __init__(
        self,
        losses: Callable[[], Tensor],
        confidence: float,
        every: int | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.losses = losses
        self.confidence = confidence
        self.model = model
        self._pace = Pace(SHARE) if every is None else None
        self.every = FEWEST_STEPS if every is None else every
        self.curve: list[tuple[int, float]] = []
        self.verdict: str | None = None
        self._against = 0  # the looks in a row that spoke against the best
        self._recent: list[Look] = []  # the last two; the later one is not judged yet
        self._best: Look | None = None  # smoothed
        self._recent_weights: Weights | None = None  # of the later of the two
        self._best_weights: Weights | None = None

    def begin(self, params: Iterable[Tensor] = ()) -> None:
        """Look at the first weights, unless this would change the training.

        `params` are those that the step is about to change. After an evaluation FSDP2
        leaves the outermost module's parameters whole, and would train on them as they
        were before the step. Asking the model for its state, which keeping weights
        does, shards them again.
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
        """Evaluate the held-out losses after `step` steps, and judge the look before.

        Raises
        ------
        ValueError
            For losses that are not one floating-point number for each of two or more
            examples, as many as before.
        """
        losses = self.losses()
        is_row = isinstance(losses, Tensor) and losses.dim() == 1 and losses.is_floating_point()
        if not is_row or len(losses) < 2:
            given = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"held_out must return one loss for each of two or more examples, 1-d, got {given}")
        if self._recent and len(losses) != len(self._recent[-1].losses):
            raise ValueError(
                "held_out must return the losses of the same examples each time, got "
                f"{len(losses)}, before {len(self._recent[-1].losses)}"
            )
        new = Look(step, losses.detach().to("cpu", torch.float64, copy=True))
        self.curve.append((step, new.losses.mean().item()))
        if self._recent:
            smoothed = _smooth(*self._neighbours(), new.losses)
            self._judge(Look(self._recent[-1].step, smoothed))
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
        stderr = gains.std().item() / math.sqrt(len(gains))
        needed = NormalDist().inv_cdf(self.confidence) * stderr
        self._against = self._against + 1 if gain < -needed else 0
        if gain > needed:
            self.verdict = IMPROVING
        else:
            self.verdict = OVERFITTING if self._against >= IN_A_ROW else UNCLEAR
        if gain > 0:
            self._best, self._best_weights = look, self._recent_weights

    def _last_is_best(self) -> bool:
        """Return whether the last look, without a later neighbour yet, is the best."""
        if self._best is None:
            return True
        before, last = self._neighbours()
        return (self._best.losses - _smooth(before, last, last)).mean().item() > 0

    @property
    def best_step(self) -> int | None:
        """The step of the lowest smoothed loss so far; None before the first look."""
        if not self._recent:
            return None
        if self._last_is_best() or self._best is None:
            return self._recent[-1].step
        return self._best.step

    def restore(self) -> int:
        """Load the weights of the best look into the model, and return its step.

        Raises
        ------
        RuntimeError
            Without a model whose weights are kept, or before the first look.
        """
        if self.model is None:
            raise RuntimeError("no weights were kept: give RiskMonitor the model, keep_best=model")
        step = self.best_step
        weights = self._recent_weights if self._last_is_best() else self._best_weights
        if step is None or weights is None:
            raise RuntimeError("no weights were kept yet: the held-out examples have not been looked at")
        self.model.load_state_dict(weights)
        return step

    def state_dict(self) -> dict[str, object]:
        """Return what a checkpoint needs: tensors, numbers, and the model's own state.

        If the model is sharded over ranks its kept weights are gathered, and every rank
        must call.
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


def copied(weights: Weights | None) -> dict[str, Any] | None:
    """Return a copy of a model's state that training does not change.

    Of tensors that are sharded over ranks it holds this rank's parts.
    """
    if weights is None:
        return None
    return {name: x.detach().clone() if isinstance(x, Tensor) else copy.deepcopy(x) for name, x in weights.items()}


def gathered(weights: Weights | None) -> Weights | None:
    """Return the weights with sharded tensors whole, on the CPU; all ranks must call."""
    if weights is None:
        return None
    return {name: whole(x).cpu() if isinstance(x, Tensor) and is_sharded(x) else x for name, x in weights.items()}


def spread(weights: Weights | None, model: nn.Module | None) -> Weights | None:
    """Return a copy of whole weights that is sharded over ranks as the model is.

    Nothing is sent: each rank takes its parts of the weights that it was given.
    """
    kept = copied(weights)
    if kept is None or model is None:
        return kept
    for name, own in model.state_dict().items():
        if name in kept and isinstance(own, Tensor) and is_sharded(own) and not is_sharded(kept[name]):
            kept[name] = _sharded(kept[name], own)
    return kept


def _sharded(tensor: Tensor, like: Any) -> Tensor:
    # Imported when needed: not every build of torch has it, and it is public since 2.5.
    from torch.distributed.tensor import distribute_tensor

    on_device = tensor.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)
