"""The sentence that an answer begins with, safe to repeat by itself, and the three verdicts after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from popriskmin.compare.report.analysis import Statement, number
from popriskmin.compare.report.statistics import LEVEL, p_value
from popriskmin.compare.training.arms import ADAMW, Arm

GUESS = "constant guess"  # the reference that has seen no input
FIGURE = "best"  # all of it is told of networks that stopped at their best validation step
NOT_PROVEN = "not proven"
CONTROL = "adamw-matched"


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer at its chosen configuration, or a reference, with its test metric by seed."""

    name: str
    is_network: bool
    mean: float
    values: Sequence[float]

    def __str__(self) -> str:
        """Return the name, with an article where it is no proper name."""
        return f"the {self.name}" if self.name == GUESS else self.name


def headline(
    metrics: Mapping[str, str],
    arms: Sequence[Arm],
    selections: Mapping[str, Any],
    references: Mapping[str, Mapping[str, Any]],
    said: Sequence[Statement],
) -> str:
    """Return which of everything on the page is best, whether any network beats it, and what PRM does for the network.

    Parameters
    ----------
    selections, references, said
        As `Results` has them.

    Returns
    -------
    str
        One sentence; empty where no network has a value.
    """
    metric, direction = next(iter(metrics.items()))
    sign = 1 if direction == "max" else -1
    ranked = sorted(_contenders(metric, arms, selections, references), key=lambda one: -sign * one.mean)
    networks = [one for one in ranked if one.is_network]
    if not networks:
        return ""
    parts = [_best(ranked, metric, sign), _prm(said)]
    return f"{'; '.join(part for part in parts if part)}."


def _contenders(
    metric: str,
    arms: Sequence[Arm],
    selections: Mapping[str, Any],
    references: Mapping[str, Mapping[str, Any]],
) -> Iterator[Contender]:
    """Yield what somebody might use; the matched AdamW is a control and not among it."""
    for arm in arms:
        test = selections[FIGURE][arm.name]["test"] or {}
        if arm.kind != "adamw-matched" and FIGURE in test and metric in test[FIGURE]:
            yield Contender(arm.name, True, test[FIGURE][metric]["mean"], test[FIGURE][metric]["values"])
    for name, found in references.items():
        if metric in found:
            yield Contender(name, False, found[metric]["mean"], found[metric]["values"])


def _best(ranked: Sequence[Contender], metric: str, sign: int) -> str:
    """Say which is best, and of a reference that no network beats it."""
    best, *others = ranked
    network = next(one for one in ranked if one.is_network)
    text = f"Best on this page is {best}, test {metric} {number(best.mean)}"
    if not best.is_network:
        text += f", and no network beats it ({network.name}, the best of them: {_value(best, network, ranked)})"
    elif others:
        text += f", ahead of {others[0]} ({_value(best, others[0], ranked)})"
    guess = next((one for one in ranked if one.name == GUESS), None)
    if guess is not None and guess is not best and sign * guess.mean >= sign * network.mean:
        text += f"; no network beats even the {GUESS} ({number(guess.mean)})"
    return text


def _value(best: Contender, other: Contender, ranked: Sequence[Contender]) -> str:
    """Return the other's value, and whether the best is ahead of it by chance.

    It was picked as the best of several, so the p-value is multiplied by the number of pairs with it (Bonferroni).
    """
    apart = [one - two for one, two in zip(best.values, other.values)]
    p = p_value(apart) if len(best.values) == len(other.values) else None
    proven = p is not None and p * (len(ranked) - 1) < LEVEL
    return number(other.mean) if proven else f"{number(other.mean)}, the difference {NOT_PROVEN}"


def leading_prm(said: Sequence[Statement]) -> Statement | None:
    """Return the statement on AdamW and the PRM arm with the best value, both stopped; averaged weights left out."""
    mine = [one for one in said if one.figure == FIGURE and one.rival == ADAMW.name and " averaged" not in one.arm]
    if not mine:
        return None
    return max(mine, key=lambda one: one.value if one.direction == "max" else -one.value)


def _prm(said: Sequence[Statement]) -> str:
    """Say what PRM does for the network."""
    one = leading_prm(said)
    if one is None:
        return ""
    mine, other = number(one.value), number(one.rival_value)
    early = "tuned and stopped early"
    if one.verdict is None:
        few = f"{one.seeds} seed{'s prove' if one.seeds != 1 else ' proves'}"
        return f"{few} nothing of PRM ({early}, {one.arm} has {mine}, {one.rival} {other})"
    if one.verdict == "better":
        return f"{early}, {one.arm} takes the network from {other} with {one.rival} to {mine} ({one.chance})"
    if one.verdict == "worse":
        return f"{early}, {one.arm} is worse than {one.rival} ({mine} against {other}, {one.chance})"
    if one.difference == 0:
        return f"{early}, {one.arm} does what {one.rival} does ({mine})"
    return f"{early}, {one.arm} is {one.side} {one.rival}, {NOT_PROVEN} ({mine} against {other})"


def verdicts(said: Sequence[Statement]) -> dict[str, str]:
    """Return three sentences, by what they compare PRM with: AdamW, the best other optimizer or the end, the control.

    They are about the PRM arm of the first sentence; about the default one where that alone has a control.
    """
    first = leading_prm(said)
    if first is None:
        return {}
    stopped = [one for one in said if one.figure == FIGURE]
    mine = [one for one in stopped if one.arm == first.arm]
    found = {"Against AdamW, both stopped early": first}
    others = [one for one in mine if one.rival != ADAMW.name and not one.rival.startswith(("prm", CONTROL))]
    ends = [one for one in said if (one.figure, one.arm, one.rival) == ("final", first.arm, ADAMW.name)]
    if others:
        found["Against the best other optimizer, both stopped early"] = others[0]
    elif ends:
        found["Against AdamW, both trained to the end"] = ends[0]
    controls = [one for one in (*mine, *stopped) if one.rival.startswith(CONTROL) and " averaged" not in one.arm]
    if controls:
        found["Against the control, AdamW with steps of PRM's size, which nobody deploys"] = controls[0]
    return {label: one.sentence for label, one in found.items()}
