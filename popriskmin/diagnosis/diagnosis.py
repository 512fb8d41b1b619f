"""Which layers the mask holds shut, and why, judged from an optimizer's state."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple, cast

from torch.optim import Optimizer

from popriskmin.diagnosis.evidence import ROUNDING, ROUNDING_IN_MODULE, Evidence, Sums, read
from popriskmin.diagnosis.noise import enough_steps, needed_ratio
from popriskmin.diagnosis.rows import FINE, NOISE, SLOWED, Row, sentences, table
from popriskmin.mask import Hyperparameters, mask_name
from popriskmin.optimizer.stats import PART_OF_FSDP1
from popriskmin.optimizer.unwrap import Unwrapped, unwrapped_prm
from popriskmin.step.shards import of_one_rank


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`. Printed, it is a table of the layers and sentences.

    Attributes
    ----------
    rows
        One `Row` for each parameter tensor, in the optimizer's order.
    note
        Why there are no rows yet, or which part of the model the rows are about; empty
        otherwise.
    """

    rows: list[Row]
    note: str = ""

    @property
    def problems(self) -> list[Row]:
        """The rows whose cause is a fault."""
        return [row for row in self.rows if row.cause not in FINE]

    def __str__(self) -> str:
        if not self.rows:
            return self.note
        note = [self.note, ""] if self.note else []
        return "\n".join([*note, *table(self.rows), "", *sentences(self.rows)])


def diagnose(optimizer: Optimizer | Iterable[Optimizer], threshold: float = 0.2) -> Diagnosis:
    """Return which layers the mask holds shut, why, and what to try.

    It reads the state and changes nothing. This waits for the device, and with sharded
    parameters for all ranks, each of which must call. A layer is shut if the mean `q`
    of its scalars that have gradients is below `threshold`. The cause is the first of
    these that holds:

    - **closed**: `shrinkage` holds all its weights that have gradients at exactly 0, so
      nothing flows through it. Layers behind it are then dead.
    - **dead**: at least 99% of its scalars have no gradient, or only one that rounding
      makes, as the bias before a normalization layer.
    - **rounded**: its scalars have 16 bits, and of those that the mask lets move most
      had a last step of less than half a unit in the last place, so that rounding leaves
      them where they are. `PRM` without `stochastic_rounding` alone is judged by it.
    - **epsilon**: without `mask_eps` its mean `q` would be at least twice as large.
    - **strict**: the plain mask (`mask="snr"`, `softness=1`, `boundary="batch"`) would
      be at least twice as open, and would let it move. The group's own mask, softness
      or boundary is stricter.
    - **weak**: its mean gradient holds more signal than noise (`over_noise` exceeds
      `popriskmin.diagnosis.noise.needed_ratio`), and yet the other modules move more.
      Their mean `q` is more than 3 times as large, or they are at their noise and this
      layer is 3 times as far above it.
    - **decay**: the weight decay's step is more than half the masked gradient step, and
      the mask more than doubles this ratio, and `lr * weight_decay` times the steps so
      far is above 0.05. Vectors and small tensors are not judged by it.
    - **slowed**: it has more signal than noise, as the rest of the model; all move by
      smaller steps. No fault.
    - **noise**: its mean gradient is about as large as pure noise makes it. No fault:
      the mask is meant to hold noise back.

    **Limits.** Two kinds of signal look like noise. One is a signal much weaker than
    the noise of the mean gradient, which hundreds of unmasked steps would add up. The
    other is a true gradient that drifts within about ten steps. For gradients with a
    steady distribution, independent or not, `s^ = (v^ - m^**2) / beta1` on average, so
    the state has no third number that would tell drift from noise. With
    `variance="given"` the two are told apart.

    Parameters
    ----------
    optimizer
        A `PRM`, wrapped by a framework or not (`popriskmin.unwrap`), after some dozens
        of steps. Before the first step the diagnosis has no rows, and says so. Several
        are possible too, as when each parameter has its own and steps in the backward
        pass. Modules are then compared over all of them, and groups and parameters
        without a name are numbered over all.
    threshold
        The mean `q` below which a layer counts as shut, in (0, 1].

    Raises
    ------
    TypeError
        For another optimizer.
    ValueError
        For a threshold out of range.

    Examples
    --------
    >>> import torch
    >>> from popriskmin import PRM
    >>> layer = torch.nn.Linear(64, 64)
    >>> optimizer = PRM(layer.named_parameters(), mask_eps=1e-8)
    >>> for _ in range(50):
    ...     for p in layer.parameters():
    ...         p.grad = 1e-6 * (1 + torch.randn(p.shape))
    ...     optimizer.step()
    >>> [(row.name, row.cause) for row in diagnose(optimizer).rows]
    [('weight', 'epsilon'), ('bias', 'epsilon')]
    """
    insides = _insides(optimizer)
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be a number in (0, 1], got {threshold!r}")
    tensors = read([inside.optimizer for inside in insides])
    notes = [inside.of_rank for inside in insides if inside.of_rank]
    if of_one_rank(p for inside in insides for group in inside.optimizer.param_groups for p in group["params"]):
        notes.append(f"{PART_OF_FSDP1}.")
    note = " ".join(dict.fromkeys(notes))
    if all(one.sums is None for one in tensors):
        return Diagnosis([], f"{note} {_NO_STEP}".strip())
    total = _Total()
    modules: dict[str | int, _Total] = collections.defaultdict(_Total)
    for one in tensors:
        total.add(one)
        modules[_module(one)].add(one)
    rows = [_row(one, _cause(one, total, modules[_module(one)], threshold)) for one in tensors]
    return Diagnosis(rows, note)


def _insides(optimizer: Optimizer | Iterable[Optimizer]) -> list[Unwrapped]:
    """Return the PRM inside each of what was given: one optimizer, or several."""
    one = hasattr(optimizer, "param_groups") or not isinstance(optimizer, Iterable)
    insides = [unwrapped_prm(each, "diagnose") for each in ([optimizer] if one else cast(Iterable[object], optimizer))]
    if not insides:
        raise ValueError("diagnose needs at least one optimizer, got none")
    return insides


class _Total:
    """Sums over tensors, for comparing one module with the others."""

    def __init__(self, live: float = 0.0, q: float = 0.0, over_noise: float = 0.0) -> None:
        self.live, self.q, self.over_noise = live, q, over_noise
        self.gradient_sq = 0.0  # mean over the tensor with the largest
        self.closed: list[str] = []  # the names of the tensors that shrinkage has closed

    def add(self, one: Evidence) -> None:
        """Count a tensor in, if it has been under a mask for long enough to judge."""
        n, hyper = one.sums, one.hyper
        if one.closed:
            self.closed.append(str(one.name))
        if n is not None and n.v > self.gradient_sq * one.scalars:
            self.gradient_sq = n.v / one.scalars
        if n is None or hyper.mask == "none" or one.step <= hyper.warmup_steps or one.step < enough_steps(hyper):
            return
        if n.live > 0 and math.isfinite(n.live_q) and math.isfinite(one.over_noise):
            self.live += n.live
            self.q += n.live_q
            self.over_noise += n.live * one.over_noise

    def less(self, other: _Total) -> _Total:
        """Return the sums without those of another, which are among them."""
        return _Total(self.live - other.live, self.q - other.q, self.over_noise - other.over_noise)


def _module(one: Evidence) -> str | int:
    return one.name.rpartition(".")[0] if isinstance(one.name, str) else one.name


_NO_STEP = "No parameter (with any elements) has taken a step yet: call diagnose after some dozens of optimizer.step()."


class _Finding(NamedTuple):
    cause: str
    reason: str
    advice: str = ""


def _cause(one: Evidence, total: _Total, module: _Total, threshold: float) -> _Finding:
    """Return why a tensor moves as it does, compared with its module and the rest."""
    hyper, n = one.hyper, one.sums
    if n is None:
        return _Finding(
            "dead",
            "no gradient since the start",
            "not the mask's doing: it is not part of the graph of the loss, or behind a detach()",
        )
    if not all(map(math.isfinite, n)):
        return _Finding("not finite", "NaN or infinite state", "to find the step at which a gradient overflowed")
    if one.closed:
        return _closed(one)
    if one.zero_fraction >= 0.99:
        return _Finding(
            "dead",
            f"{one.zero_fraction:.0%} of it had no gradient for some 100 steps",
            f"not the mask's doing: its gradient may come through {', '.join(total.closed)}, closed by shrinkage"
            if total.closed
            else "not the mask's doing: look for units that are never active, or a loss that does not reach it",
        )
    if _rounding(one, n, total, module):
        return _Finding(
            "dead",
            f"its gradient of {math.sqrt(n.v / one.scalars):.0e} is what rounding leaves of 0, beside "
            f"{math.sqrt(module.gradient_sq):.0e} in the same module",
            "not the mask's doing: a bias before a normalization layer does not reach the loss; bias=False saves it",
        )
    if n.live_lost > 0.5 * n.live_let_move:
        share = n.live_lost / n.live_let_move
        return _Finding("rounded", f"the last step of {share:.0%} of what the mask lets move is rounded away", _ROUNDED)
    if one.step <= hyper.warmup_steps:
        return _Finding("warmup", f"open until step {hyper.warmup_steps} (warmup_steps)")
    if hyper.mask == "none":
        return _Finding("open", "mask='none'")
    if one.step < enough_steps(hyper):
        return _Finding("early", f"too few steps to say; {enough_steps(hyper)} would do")
    return _under_mask(one, n, total.less(module), threshold)


def _closed(one: Evidence) -> _Finding:
    return _Finding(
        "closed",
        f"all its weights that have gradients are exactly 0, shrinkage={one.hyper.shrinkage:g}",
        "shrinkage=0.0 for its group (popriskmin.param_groups), as the last layers may need it, a smaller "
        "shrinkage, or popriskmin.ShrinkageController; in a first layer it says that no input matters",
    )


def _under_mask(one: Evidence, n: Sums, rest: _Total, threshold: float) -> _Finding:
    q = n.live_q / n.live
    coherent = one.over_noise >= needed_ratio(one.shape)
    scored = f"mean gradient {one.over_noise:.1f} times what noise gives"
    if q < threshold:
        of_options = _epsilon(one.hyper, n) or _strict(one.hyper, n, coherent, threshold, scored)
        if of_options is not None:
            return of_options
        if coherent and _held_back(q, one.over_noise, rest):
            return _Finding("weak", f"{scored}, mean q {q:.2g}, elsewhere {rest.q / rest.live:.2g}", _weak(one.hyper))
        if _decays(one):
            return _Finding("decay", f"decay is {one.decay_ratio():.3g} of the masked step, mean q {q:.2g}", _DECAY)
    if q >= threshold:
        return _Finding("open", f"mean q {q:.2g}")
    if coherent:
        return _Finding("slowed", scored, SLOWED)
    return _Finding("noise", scored, NOISE)


def _rounding(one: Evidence, n: Sums, total: _Total, module: _Total) -> bool:
    """Return whether the gradient is so small, against others, that it is rounding."""
    mean = n.v / one.scalars
    small = mean < ROUNDING * total.gradient_sq and mean < ROUNDING_IN_MODULE * module.gradient_sq
    return small and not one.over_noise >= needed_ratio(one.shape)


def _weak(hyper: Hyperparameters) -> str:
    drifts = "" if hyper.given else "; variance='given' if its gradient drifts"
    return (
        "mask='none' for its group (popriskmin.param_groups), or min_q there, or a smaller softness, which "
        f"popriskmin.SoftnessController finds; a larger batch{drifts}"
    )


_ROUNDED = "stochastic_rounding=True, or float32 parameters, under autocast where 16 bits are to compute"

_DECAY = "mask_decay=True, or less weight_decay, or what opens the mask"


def _epsilon(hyper: Hyperparameters, n: Sums) -> _Finding | None:
    q, without = n.live_q / n.live, n.live_q_without_eps / n.live
    if without <= 2 * q:
        return None
    return _Finding(
        "epsilon",
        f"mask_eps={hyper.mask_eps:.3g} for gradients of {math.sqrt(n.v / n.live):.0e}: mean q {q:.2g}, without "
        f"{without:.2g}",
        f"a smaller eps: mask_eps is eps**2, of eps={hyper.eps:g}"
        if hyper.mask_eps == hyper.eps**2
        else "mask_eps=None, which is eps**2; and a smaller eps if that is still too large",
    )


def _strict(hyper: Hyperparameters, n: Sums, coherent: bool, threshold: float, scored: str) -> _Finding | None:
    q, plain = n.live_q / n.live, n.live_q_plain / n.live
    if plain <= 2 * q or not (coherent or plain >= threshold):
        return None
    knobs = []
    if hyper.mask != "snr":
        knobs.append((f"mask={mask_name(hyper.mask)!r}", "mask='snr'"))
    if hyper.softness > 1 and hyper.mask != "hard":
        knobs.append((f"softness={hyper.softness:g}", "a smaller softness"))
    if hyper.coefficient > 1:
        knobs.append((f"boundary coefficient {hyper.coefficient:.3g}", "boundary='batch'"))
    if not knobs:
        return None
    settings, cures = (", ".join(words) for words in zip(*knobs))
    return _Finding("strict", f"{scored}; {settings}: mean q {q:.2g}, of the plain mask {plain:.2g}", cures)


def _decays(one: Evidence) -> bool:
    """Return whether decay outweighs the step because of the mask, with an effect."""
    shrunk = float(one.hyper.lr) * one.hyper.weight_decay * one.step
    # The step of a few numbers is small by chance now and then.
    many = needed_ratio(one.shape) < 3
    return many and shrunk > 0.05 and one.decay_ratio() > max(0.5, 2 * one.decay_ratio(masked=False))


def _held_back(q: float, score: float, rest: _Total) -> bool:
    if rest.live <= 0:
        return False
    other = rest.over_noise / rest.live
    return rest.q / rest.live > 3 * q or (other < 1.5 and score > 3 * max(other, 1.0))


def _row(one: Evidence, finding: _Finding) -> Row:
    n, nan = one.sums, math.nan
    if n is None:
        return Row(one.name, one.group, 0, one.scalars, nan, nan, nan, nan, nan, 1.0, nan, *finding)
    return Row(
        name=one.name,
        group=one.group,
        step=one.step,
        parameter_count=one.scalars,
        mean_q=n.q / one.scalars,
        active_fraction=n.active / one.scalars,
        snr=n.signal / n.noise if n.noise > 0 else (math.inf if n.signal > 0 else nan),
        over_noise=one.over_noise,
        gradient=math.sqrt(n.v / one.scalars) if n.v >= 0 else nan,
        zero_fraction=one.zero_fraction,
        decay_ratio=one.decay_ratio(),
        cause=finding.cause,
        reason=finding.reason,
        advice=finding.advice,
    )
