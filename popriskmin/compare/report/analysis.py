"""From the runs to the answer: what every arm chose and reached, and what may be said of each pair of arms."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from popriskmin.compare.report.run_summary import FIGURES, Run, choose, runs_of
from popriskmin.compare.report.statistics import FEWEST_SEEDS, LEVEL, difference, estimate, holm
from popriskmin.compare.training.arms import ADAMW, AVERAGED, Arm

OPENINGS = {
    "final": "Trained to the end",
    "best": "Stopped at the best validation step",
    "area": "Averaged over the training",
}
SAID_OF = OPENINGS | {
    "budget 1": "Trained to the end with one configuration, drawn at random from the grid",
    "joined": "Trained to the end on training and validation data joined, or stopped at the best validation step",
}

Values = dict[str, dict[str, dict[int, float]]]


def analyse(runs: Sequence[Run], arms: Sequence[Arm], metrics: Mapping[str, str]) -> dict[str, Any]:
    """Return, for each figure as the one that chooses, what every arm chose and reached.

    Everything in it is determined by the runs' settings: it has no times in it.
    """
    selections = {}
    for figure in FIGURES:
        found = {arm.name: choose(runs_of(runs, arm), figure, metrics) for arm in arms}
        chosen = {name: configuration for name, (configuration, _) in found.items()}
        best = best_rival(arms, {name: score for name, (_, score) in found.items()})
        values = {arm.name: _chosen_values(runs_of(runs, arm), chosen[arm.name], metrics) for arm in arms}
        selections[figure] = {arm.name: _summary(arm, chosen, values, metrics, best) for arm in arms}
    return selections


def best_rival(arms: Sequence[Arm], scores: Mapping[str, float]) -> str:
    """Return the optimizer that is neither PRM nor made after it and has the largest score on validation data."""
    others = [arm.name for arm in arms if arm.kind not in ("prm", "adamw-matched")]
    return max(others, key=lambda name: scores[name])


def _chosen_values(runs: Sequence[Run], chosen: tuple[float, float] | None, metrics: Mapping[str, str]) -> Values:
    """Return the test values by figure, metric and seed, of the chosen configuration.

    A figure that one of its runs does not have, because it diverged, has no values.
    """
    mine = [run for run in runs if chosen == (run.job.configuration.lr, run.job.configuration.weight_decay)]
    values: Values = {figure: {metric: {} for metric in metrics} for figure in FIGURES}
    for figure in FIGURES:
        for metric in metrics:
            pairs = {run.job.configuration.seed: run.figures[figure][metric] for run in mine}
            complete = {seed: pair[1] for seed, pair in pairs.items() if pair is not None}
            if len(complete) == len(pairs):
                values[figure][metric] = complete
    return values


def _summary(
    arm: Arm,
    chosen: Mapping[str, tuple[float, float] | None],
    values: Mapping[str, Values],
    metrics: Mapping[str, str],
    best: str,
) -> dict[str, Any]:
    mine = chosen[arm.name]
    if mine is None:
        return {"chosen": None, "test": None, "against": {}}
    test = {
        figure: {metric: estimate(list(values[arm.name][figure][metric].values())) for metric in metrics}
        for figure in FIGURES
        if all(values[arm.name][figure][metric] for metric in metrics)
    }
    against = {
        other: {
            figure: {
                metric: difference(values[arm.name][figure][metric], values[other][figure][metric])
                for metric in metrics
                if set(values[arm.name][figure][metric]) & set(values[other][figure][metric])
            }
            for figure in FIGURES
        }
        for other in rivals_of(arm, best)
        if chosen.get(other) is not None
    }
    return {"chosen": {"lr": mine[0], "weight_decay": mine[1]}, "test": test, "against": against}


def rivals_of(arm: Arm, best: str = ADAMW.name) -> list[str]:
    """Return whom an arm is compared with: AdamW; PRM also with the best rival and the AdamW of equal steps.

    Averaged weights are compared with those of AdamW, and with the arm's plain ones.
    """
    if arm.kind != "prm":
        return [] if arm == ADAMW else [ADAMW.name]
    base = ADAMW.of_averages.name if arm.averaged else ADAMW.name
    others = [] if best == base else [best]
    if arm.averaged:
        return [base, *others, arm.name.removesuffix(AVERAGED)]
    options = arm.name.removeprefix("prm")
    return [base, *others, f"adamw-matched{options}", *(["prm"] if options else [])]


@dataclasses.dataclass(frozen=True)
class Statement:
    """What is said of two arms.

    Attributes
    ----------
    opening
        What it is about, in words.
    figure
        "final", "best" or "area"; "budget 1" for what one configuration gives, drawn at random; "joined" for what
        training on the validation data too gives.
    value, rival_value
        Means over the seeds that both have, on test data.
    difference, interval
        Their difference, paired by seed, and its 95% interval.
    p
        How likely so large a difference is by chance, corrected for all statements (`holm`); None with fewer than 5
        seeds.
    verdict
        "better", "worse", "unclear", or None with fewer than 5 seeds.
    """

    opening: str
    figure: str
    arm: str
    rival: str
    metric: str
    direction: str
    value: float
    rival_value: float
    difference: float
    interval: tuple[float, float] | None
    seeds: int
    p: float | None = None

    @property
    def verdict(self) -> str | None:
        """What the difference shows."""
        if self.p is None:
            return None
        if self.p >= LEVEL:
            return "unclear"
        return "better" if (self.difference > 0) == (self.direction == "max") else "worse"

    @property
    def sentence(self) -> str:
        """The statement in words, with the metric, its direction and both values.

        Examples
        --------
        >>> Statement("", "final", "a", "b", "accuracy", "max", 0.934, 0.925, 0.009, (0.001, 0.017), 5, 0.03).sentence
        'a is better than b: test accuracy 0.934 against 0.925 (higher is better), +0.0090 [+0.0010, +0.0170], p = 0.03'
        """
        better = "higher" if self.direction == "max" else "lower"
        values = f"test {self.metric} {number(self.value)} against {number(self.rival_value)} ({better} is better)"
        # As many places behind the point for the difference and both ends of its interval, unless all would read 0.
        shown = max(map(abs, (self.difference, *(self.interval or ()))))
        small = max(abs(self.value), abs(self.rival_value)) < 0.0995 or 0 < shown < 0.00005
        style = "+.3g" if small else "+.4f"
        found = f"{values}, {self.difference:{style}}"
        if self.interval is not None:
            found += f" [{', '.join(format(end, style) for end in self.interval)}]"
        if self.p is None:
            lack = f"{self.seeds} seed{'s are' if self.seeds != 1 else ' is'} too few for a verdict"
            return f"{self.arm} and {self.rival}: {found}; {lack}, {FEWEST_SEEDS} would do"
        if self.verdict == "unclear":
            told = f"{self.side} {self.rival}, not proven" if self.difference else f"level with {self.rival}"
            return f"{self.arm} is {told}: {found}, {self.chance}"
        return f"{self.arm} is {self.verdict} than {self.rival}: {found}, {self.chance}"

    @property
    def side(self) -> str:
        """On which side of its rival the arm is, by the means."""
        return "ahead of" if (self.difference > 0) == (self.direction == "max") else "behind"

    @property
    def chance(self) -> str:
        """The p-value in words; empty where there is none."""
        if self.p is None:
            return ""
        # With a digit more near the level, so that no p of 0.05 is called clear.
        return "p < 0.001" if self.p < 0.001 else f"p = {self.p:.{3 if 0.04 < self.p < 0.06 else 2}g}"


def number(value: float) -> str:
    """Write a number with three places behind the point, or three digits where it is small.

    Examples
    --------
    >>> number(0.93426), number(0.000123), number(12.3456)
    ('0.934', '0.000123', '12.346')
    """
    return format(value, ".3f" if value == 0 or abs(value) >= 0.0995 else ".3g")


def statements(
    arms: Sequence[Arm],
    metrics: Mapping[str, str],
    selections: Mapping[str, Any],
    budget: Mapping[str, Any],
    best_untuned: str,
    joined: Mapping[str, Any],
) -> list[Statement]:
    """Return what is said of every PRM arm and each of its rivals, with p-values corrected for all of it.

    Parameters
    ----------
    selections
        As of `analyse`.
    budget
        As of `by_budget`.
    best_untuned
        The best rival of an arm with one configuration, drawn at random.
    joined
        As of `by_joined`; empty without runs on joined data.
    """
    prm = [arm.name for arm in arms if arm.kind == "prm"]
    rivals = {arm.name: rivals_of(arm, best_untuned) for arm in arms if arm.kind == "prm"}
    said = [*_tuned(prm, metrics, selections), *_untuned(rivals, metrics, budget), *_joined(prm, metrics, joined)]
    return [dataclasses.replace(one, p=p) for one, p in zip(said, holm([one.p for one in said]))]


def _statement(
    figure: str,
    arm: str,
    rival: str,
    metrics: Mapping[str, str],
    values: tuple[Mapping[str, Any], Mapping[str, Any]],
    apart: Mapping[str, Any],
) -> Statement:
    """Return a statement of two means and their paired difference, whose p is not corrected yet."""
    metric, direction = next(iter(metrics.items()))
    return Statement(
        opening=SAID_OF[figure],
        figure=figure,
        arm=arm,
        rival=rival,
        metric=metric,
        direction=direction,
        value=values[0]["mean"],
        rival_value=values[1]["mean"],
        difference=apart["mean"],
        interval=apart["interval"],
        seeds=len(apart["values"]),
        p=apart["p"],
    )


def _tuned(prm: Sequence[str], metrics: Mapping[str, str], selections: Mapping[str, Any]) -> Iterator[Statement]:
    metric = next(iter(metrics))
    for figure in OPENINGS:
        for arm in prm:
            for rival, by_figure in selections[figure][arm]["against"].items():
                if metric in by_figure[figure]:
                    one, other = (selections[figure][name]["test"][figure][metric] for name in (arm, rival))
                    yield _statement(figure, arm, rival, metrics, (one, other), by_figure[figure][metric])


def _untuned(
    rivals: Mapping[str, Sequence[str]], metrics: Mapping[str, str], budget: Mapping[str, Any]
) -> Iterator[Statement]:
    for arm, others in rivals.items():
        for rival in (name for name in others if name in budget):
            one, other = budget[arm][0]["test"], budget[rival][0]["test"]
            if one is not None and other is not None:
                apart = difference(*(dict(zip(found["seeds"], found["values"])) for found in (one, other)))
                yield _statement("budget 1", arm, rival, metrics, (one, other), apart)


def _joined(prm: Sequence[str], metrics: Mapping[str, str], joined: Mapping[str, Any]) -> Iterator[Statement]:
    metric = next(iter(metrics))
    for arm in (name for name in (ADAMW.name, *prm) if name in joined):
        mine, against = joined[arm]["test"][metric], joined[arm]["against"]
        pair = (mine, joined[arm]["stopped"][metric])
        yield _statement("joined", f"{arm} joined", f"{arm} stopped", metrics, pair, against["stopped"][metric])
        if ADAMW.name in against:
            rival, pair = f"{ADAMW.name} joined", (mine, joined[ADAMW.name]["test"][metric])
            yield _statement("joined", f"{arm} joined", rival, metrics, pair, against[ADAMW.name][metric])
