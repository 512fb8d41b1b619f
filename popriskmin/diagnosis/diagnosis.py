"""Which layers the mask holds shut, why, and what to try; read off an optimizer's state."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch.optim import Optimizer

from popriskmin.diagnosis.evidence import Evidence, Sums, read
from popriskmin.diagnosis.noise import enough_steps, needed_ratio
from popriskmin.mask import Hyperparameters
from popriskmin.optimizer.unwrap import unwrapped_prm

# What is said of a mask that is shut without a fault in it, and of one that is not shut.
FINE = ("open", "warmup", "early", "noise", "slowed")
WIDTH = 100
MOST_LINES = 30  # of the table, and of the layers named in the sentences of one cause
MOST_REASONS = 5


class Row(NamedTuple):
    """What is said of one parameter tensor. Numbers are of the last step, and plain.

    Attributes
    ----------
    name
        As in `get_mask_stats(by="parameter")`: the parameter's name, or its place where the optimizer has no names.
    group
        The number of its parameter group.
    step
        The steps that it has taken; 0 for one that has had no gradient yet, of which no other number is known.
    parameter_count
        Scalars.
    mean_q, active_fraction, snr
        As in `get_mask_stats`.
    over_noise
        The squared mean gradient in units of the gradient's variance, `m^**2 / z`, averaged over the scalars that have
        gradients (each counted as 1 at most), and divided by what pure noise gives it,
        `popriskmin.mask.variance_of_mean`. 1 says noise; at 2 the mean holds as much signal as noise.
    gradient
        Root mean square of the gradient, from `v^`.
    zero_fraction
        Share of the scalars without a gradient, now or for about the last 100 steps. The cause is that of the others.
    decay_ratio
        Length of the weight decay's step over that of the masked gradient step; 0 where nothing decays.
    cause
        "open", "warmup", "early" (too few steps to say), "noise" and "slowed" are no faults; "weak", "epsilon",
        "strict", "decay", "dead" and "not finite" are.
    reason, advice
        In words; the advice is empty where there is none to give.
    """

    name: str | int
    group: int
    step: int
    parameter_count: int
    mean_q: float
    active_fraction: float
    snr: float
    over_noise: float
    gradient: float
    zero_fraction: float
    decay_ratio: float
    cause: str
    reason: str
    advice: str


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. Printed, it is a table of the layers and a few sentences.

    Attributes
    ----------
    rows
        One `Row` for each parameter tensor, in the optimizer's order.
    note
        Where there is nothing to say yet, why; where the figures are of a part of the model, of which; else empty.
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
        return "\n".join([*note, *_table(self.rows), "", *_sentences(self.rows)])


def diagnose(optimizer: Optimizer, threshold: float = 0.2) -> Diagnosis:
    """Say which layers the mask holds shut, and why, and what to try.

    The state is read and nothing changed. This waits for the device, and with sharded parameters for all ranks, each of
    which must ask. A layer is shut where the mean `q` of its scalars that have gradients is below `threshold`. Then the
    first of these is the cause:

    - **dead**: no gradient, for at least 99% of its scalars.
    - **epsilon**: without `mask_eps` its mean `q` would be twice as large or more.
    - **strict**: the plain mask (`mask="snr"`, `softness=1`, `boundary="batch"`) would be twice as open or more, and
      let it move: what is stricter is the group's own mask, softness or boundary.
    - **weak**: its mean gradient holds more signal than noise (`over_noise` is beyond
      `popriskmin.diagnosis.noise.needed_ratio`), and still it is held back against the other modules: their mean `q` is
      more than 3 times as large, or they are at their noise and this one is 3 times as far above it.
    - **decay**: the weight decay's step is more than half the masked gradient step, and more than twice what it is of
      the step without the mask, while `lr * weight_decay` times the steps so far is above 0.05. Not looked for in
      vectors and small tensors.
    - **slowed**: more signal than noise, as in the rest of the model; all move by smaller steps. No fault.
    - **noise**: about what pure noise gives. No fault: it is what the mask is for.

    **What cannot be seen.** A signal much weaker than the noise of the mean gradient, which hundreds of steps of an
    unmasked optimizer would add up, looks like noise. So does a true gradient that drifts within about ten steps: for
    any gradients that do not change on the whole, independent or not, `s^ = (v^ - m^**2) / beta1` on average, so the
    state has no third number that would tell drift from noise. `variance="given"` does not take one for the other.

    Parameters
    ----------
    optimizer
        A `PRM`, wrapped by a framework or not (`popriskmin.unwrap`), that has taken some dozens of steps. Before the
        first the diagnosis has no rows, and says so.
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
    >>> layer = torch.nn.Linear(64, 64)
    >>> optimizer = PRM(layer.named_parameters(), mask_eps=1e-8)
    >>> for _ in range(50):
    ...     for p in layer.parameters():
    ...         p.grad = 1e-6 * (1 + torch.randn(p.shape))
    ...     optimizer.step()
    >>> [(row.name, row.cause) for row in diagnose(optimizer).rows]
    [('weight', 'epsilon'), ('bias', 'epsilon')]
    """
    inside = unwrapped_prm(optimizer, "diagnose")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be a number in (0, 1], got {threshold!r}")
    found = read(inside.optimizer)
    if all(one.sums is None for one in found):
        return Diagnosis([], f"{inside.of_rank} {_NO_STEP}".strip())
    total = _Total()
    modules: dict[str | int, _Total] = collections.defaultdict(_Total)
    for one in found:
        total.add(one)
        modules[_module(one)].add(one)
    rows = [_row(one, _cause(one, total.less(modules[_module(one)]), threshold)) for one in found]
    return Diagnosis(rows, inside.of_rank)


class _Total:
    """Sums over tensors, for comparing one module with the others."""

    def __init__(self, live: float = 0.0, q: float = 0.0, over_noise: float = 0.0) -> None:
        self.live, self.q, self.over_noise = live, q, over_noise

    def add(self, one: Evidence) -> None:
        """Count a tensor in that is under a mask, and has been for long enough to judge by."""
        n, hyper = one.sums, one.hyper
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


def _cause(one: Evidence, rest: _Total, threshold: float) -> _Finding:
    """Find why a tensor moves as it does; the modules' `rest` is what it is compared with."""
    hyper, n = one.hyper, one.sums
    if n is None:
        return _Finding(
            "dead",
            "no gradient since the start",
            "not the mask's doing: it is not part of the graph of the loss, or behind a detach()",
        )
    if not all(map(math.isfinite, n)):
        return _Finding("not finite", "NaN or infinite state", "look for the step at which a gradient overflowed")
    if one.zero_fraction >= 0.99:
        return _Finding(
            "dead",
            f"{one.zero_fraction:.0%} of it had no gradient for some 100 steps",
            "not the mask's doing: look for units that are never active, or a loss that does not reach it",
        )
    if one.step <= hyper.warmup_steps:
        return _Finding("warmup", f"open until step {hyper.warmup_steps} (warmup_steps)")
    if hyper.mask == "none":
        return _Finding("open", "mask='none'")
    if one.step < enough_steps(hyper):
        return _Finding("early", f"too few steps to say; {enough_steps(hyper)} would do")
    return _under_mask(one, n, rest, threshold)


def _under_mask(one: Evidence, n: Sums, rest: _Total, threshold: float) -> _Finding:
    q = n.live_q / n.live
    coherent = one.over_noise >= needed_ratio(one.shape)
    scored = f"mean gradient {one.over_noise:.1f} times what noise gives"
    if q < threshold:
        found = _epsilon(one.hyper, n) or _strict(one.hyper, n, coherent, threshold, scored)
        if found is not None:
            return found
        if coherent and _held_back(q, one.over_noise, rest):
            return _Finding("weak", f"{scored}, mean q {q:.2g}, elsewhere {rest.q / rest.live:.2g}", _WEAK)
        if _decays(one):
            return _Finding("decay", f"decay is {one.decay_ratio():.3g} of the masked step, mean q {q:.2g}", _DECAY)
    if q >= threshold:
        return _Finding("open", f"mean q {q:.2g}")
    if coherent:
        return _Finding("slowed", scored, _SLOWED)
    return _Finding("noise", scored, _NOISE)


_WEAK = (
    "mask='none' for its group (popriskmin.param_groups), or min_q there, or a smaller softness, which "
    "popriskmin.SoftnessController finds; a larger batch; variance='given' if its gradient drifts"
)
_DECAY = "mask_decay=True, or less weight_decay, or what opens the mask"
_SLOWED = "none is needed; a larger lr makes up for it, or a smaller softness"
_NOISE = (
    "none is needed, unless the module must learn from a signal weaker than its noise, as a router may: then "
    "mask='none' for its group, min_q, a smaller softness or a larger batch"
)


def _epsilon(hyper: Hyperparameters, n: Sums) -> _Finding | None:
    q, without = n.live_q / n.live, n.live_q_without_eps / n.live
    if without <= 2 * q:
        return None
    return _Finding(
        "epsilon",
        f"mask_eps={hyper.mask_eps:.3g} for gradients of {math.sqrt(n.v / n.live):.0e}: mean q {q:.2g}, without "
        f"{without:.2g}",
        "mask_eps=None, which is eps**2; and a smaller eps if that is still too large",
    )


def _strict(hyper: Hyperparameters, n: Sums, coherent: bool, threshold: float, scored: str) -> _Finding | None:
    q, plain = n.live_q / n.live, n.live_q_plain / n.live
    if plain <= 2 * q or not (coherent or plain >= threshold):
        return None
    knobs = []
    if hyper.mask != "snr":
        knobs.append((f"mask={hyper.mask!r}", "mask='snr'"))
    if hyper.softness > 1 and hyper.mask != "hard":
        knobs.append((f"softness={hyper.softness:g}", "a smaller softness"))
    if hyper.coefficient > 1:
        knobs.append((f"boundary coefficient {hyper.coefficient:.3g}", "boundary='batch'"))
    if not knobs:
        return None
    settings, cures = (", ".join(words) for words in zip(*knobs))
    return _Finding("strict", f"{scored}; {settings}: mean q {q:.2g}, of the plain mask {plain:.2g}", cures)


def _decays(one: Evidence) -> bool:
    """Return whether decay outweighs the step because of the mask, and to some effect."""
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


COLUMNS = ("tensors", "scalars", "mean q", "over noise", "gradient", "decay/step", "cause")


def _table(rows: Sequence[Row]) -> list[str]:
    """Return the table: tensors of one cause whose names differ in numbers alone share a line."""
    gathered: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        gathered.setdefault((_pattern(row.name), row.cause), []).append(row)
    lines = sorted(gathered.items(), key=lambda item: item[0][1] in FINE)  # faults first; the sort is stable
    text = [f"{'layer':32} {COLUMNS[0]:>7} {COLUMNS[1]:>10} {COLUMNS[2]:>7} {COLUMNS[3]:>10} {COLUMNS[4]:>8} "]
    text[0] += f"{COLUMNS[5]:>10} {COLUMNS[6]}"
    for (name, cause), members in lines[:MOST_LINES]:
        scalars = sum(row.parameter_count for row in members)

        def mean(column: str, members: list[Row] = members, scalars: int = scalars) -> float:
            return math.fsum(row.parameter_count * getattr(row, column) for row in members) / scalars

        shown = name if len(name) <= 32 else f"...{name[-29:]}"
        text.append(
            f"{shown:32} {len(members):7} {scalars:10} {mean('mean_q'):7.3f} {mean('over_noise'):10.1f} "
            f"{mean('gradient'):8.1e} {mean('decay_ratio'):10.2g} {cause}"
        )
    left = [row for _, members in lines[MOST_LINES:] for row in members]
    if left:
        causes = ", ".join(f"{count} {cause}" for cause, count in Counter(row.cause for row in left).items())
        text.append(f"... and {len(left)} further tensors: {causes}")
    return text


def _pattern(name: str | int) -> str:
    return re.sub(r"(?<![^.])\d+(?=\.|$)", "*", name) if isinstance(name, str) else f"parameter {name}"


def _sentences(rows: Sequence[Row]) -> list[str]:
    """Return for each cause that is there which layers, why and what to try; what is no fault comes last."""
    text: list[str] = []
    faults = [row for row in rows if row.cause not in FINE]
    for cause in dict.fromkeys(row.cause for row in faults):
        found = [row for row in faults if row.cause == cause]
        for reason_row in found[:MOST_REASONS]:
            text += _wrapped(f"{cause}: {reason_row.name}: {reason_row.reason}.")
        if len(found) > MOST_REASONS:
            text += _wrapped(f"{cause}: and {len(found) - MOST_REASONS} more.")
        text += _wrapped(f"Try {found[0].advice}." if cause != "dead" else f"This is {found[0].advice}.", "  ")
    if not faults:
        text.append("Nothing is wrong with the mask.")
    counts = Counter(row.cause for row in rows if row.cause in FINE)
    for cause, words in _WORDS.items():
        if counts[cause]:
            text += _wrapped(f"{cause}: {counts[cause]} {'tensor' if counts[cause] == 1 else 'tensors'}. {words}")
    return text


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


_WORDS = {
    "noise": f"Shut because their mean gradient is no more than noise would give; that is what the mask is for. "
    f"Advice: {_NOISE}.",
    "slowed": f"More signal than noise, and all move by smaller steps. Advice: {_SLOWED}.",
    "early": "Too few steps to say.",
}
