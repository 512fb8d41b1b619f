"""The first sentence of an answer, safe to repeat by itself, and the three verdicts below."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from popriskmin.compare.comparison import Comparison
from popriskmin.compare.report.analysis import Selections
from popriskmin.compare.report.statements import Statement
from popriskmin.compare.report.statistics import LEVEL, Estimate, p_value
from popriskmin.compare.text import number
from popriskmin.compare.training.arms import ADAMW

GUESS = "constant guess"  # the reference that has seen no input
FIGURE = "best"  # all of it is about networks that stopped at their best validation step
NOT_PROVEN = "not proven"
CONTROL = "adamw-matched"


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer at its chosen configuration, or a reference, with its test metric."""

    name: str
    is_network: bool
    mean: float
    values: Sequence[float]

    def __str__(self) -> str:
        """Return the name, with an article where it is no proper name."""
        return f"the {self.name}" if self.name == GUESS else self.name


def headline(
    comparison: Comparison,
    selections: Selections,
    references: Mapping[str, Mapping[str, Estimate]],
    said: Sequence[Statement],
) -> str:
    """Return the best of all on the page, and what PRM does for the network.

    Parameters
    ----------
    selections, references, said
        As `Results` has them.

    Returns
    -------
    str
        One sentence; empty where no network has a value.
    """
    contenders = _contenders(comparison, selections, references)
    ranked = sorted(contenders, key=lambda one: -comparison.sign * one.mean)
    if not any(one.is_network for one in ranked):
        return ""
    parts = [_best(ranked, comparison.metric, comparison.sign), _prm(said)]
    return f"{'; '.join(part for part in parts if part)}."


def _contenders(
    comparison: Comparison, selections: Selections, references: Mapping[str, Mapping[str, Estimate]]
) -> Iterator[Contender]:
    """Yield what a reader may use; the matched AdamW is a control and not among it."""
    metric = comparison.metric
    for arm in comparison.arms:
        test = selections[FIGURE][arm.name].test or {}
        if arm.kind != CONTROL and FIGURE in test and metric in test[FIGURE]:
            yield Contender(arm.name, True, test[FIGURE][metric].mean, test[FIGURE][metric].values)
    for name, by_metric in references.items():
        if metric in by_metric:
            yield Contender(name, False, by_metric[metric].mean, by_metric[metric].values)


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
    """Return the other's value, and whether the lead of the best may be chance.

    It is the best of several, so the p-value is multiplied by the number of pairs with it
    (Bonferroni).
    """
    apart = [one - two for one, two in zip(best.values, other.values)]
    p = p_value(apart) if len(best.values) == len(other.values) else None
    proven = p is not None and p * (len(ranked) - 1) < LEVEL
    return number(other.mean) if proven else f"{number(other.mean)}, the difference {NOT_PROVEN}"


def leading_prm(said: Sequence[Statement]) -> Statement | None:
    """Return the statement on AdamW and the best PRM arm, both stopped early.

    Averaged weights do not count.
    """
    against_adamw = [
        one for one in said if one.figure == FIGURE and one.rival == ADAMW.name and " averaged" not in one.arm
    ]
    if not against_adamw:
        return None
    return max(against_adamw, key=lambda one: one.value if one.direction == "max" else -one.value)


def _prm(said: Sequence[Statement]) -> str:
    """Say what PRM does for the network."""
    one = leading_prm(said)
    if one is None:
        return ""
    value, other = number(one.value), number(one.rival_value)
    early = "tuned and stopped early"
    if one.verdict is None:
        few = f"{one.seeds} seed{'s prove' if one.seeds != 1 else ' proves'}"
        return f"{few} nothing of PRM ({early}, {one.arm} has {value}, {one.rival} {other})"
    if one.verdict == "better":
        return f"{early}, {one.arm} takes the network from {other} with {one.rival} to {value} ({one.chance})"
    if one.verdict == "worse":
        return f"{early}, {one.arm} is worse than {one.rival} ({value} against {other}, {one.chance})"
    if one.difference == 0:
        return f"{early}, {one.arm} does what {one.rival} does ({value})"
    return f"{early}, {one.arm} is {one.side} {one.rival}, {NOT_PROVEN} ({value} against {other})"


def verdicts(said: Sequence[Statement]) -> dict[str, str]:
    """Return three sentences on PRM, by what it is compared with.

    That is AdamW, the best other optimizer or else the end of the training, and the control.
    They are about the PRM arm of the first sentence, or about the default one where that
    alone has a control.
    """
    first = leading_prm(said)
    if first is None:
        return {}
    stopped = [one for one in said if one.figure == FIGURE]
    same_arm = [one for one in stopped if one.arm == first.arm]
    chosen = {"Against AdamW, both stopped early": first}
    others = [one for one in same_arm if one.rival != ADAMW.name and not one.rival.startswith(("prm", CONTROL))]
    ends = [one for one in said if (one.figure, one.arm, one.rival) == ("final", first.arm, ADAMW.name)]
    if others:
        chosen["Against the best other optimizer, both stopped early"] = others[0]
    elif ends:
        chosen["Against AdamW, both trained to the end"] = ends[0]
    controls = [one for one in (*same_arm, *stopped) if one.rival.startswith(CONTROL) and " averaged" not in one.arm]
    if controls:
        chosen["Against the control, AdamW with steps of PRM's size, which nobody deploys"] = controls[0]
    return {label: one.sentence for label, one in chosen.items()}
