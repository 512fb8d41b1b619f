"""Statements on pairs of arms: which are made, their correction and their words."""

import numpy as np
import pytest
from compare.made_up import ARMS, METRICS, made_up, plan

from popriskmin.compare.report.analysis import Selection, analyse, best_rival, by_budget, rivals_of, untuned
from popriskmin.compare.report.statements import Statement, statements
from popriskmin.compare.training.arms import Arm, make_arms


def said(runs, arms=ARMS, metrics=METRICS):
    comparison = plan(arms, metrics)
    best_untuned = best_rival(arms, untuned(comparison, runs))
    return statements(comparison, analyse(comparison, runs), by_budget(comparison, runs), best_untuned, {})


def test_statements_of_the_default_page_and_their_correction():
    """Eight statements: a p-value of 0.01 alone is no clear difference among them, one of 0.004 is."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=5)
    noise = (noise - noise.mean()) / noise.std(ddof=1) / 5**0.5  # a mean of 0 with a standard error of 1/5
    for t_value, verdict in ((4.6, "unclear"), (9.0, "better")):
        runs = []
        for arm in ARMS:
            for seed in range(5):
                gain = 0.002 * (t_value / 5**0.5 * 5**0.5 / 5 + noise[seed]) if arm.name == "prm" else 0.0
                runs.append(made_up(arm, seed, 0.1, [0, 0.5], [0, 0.5 + gain]))
        found = said(runs)
        assert len(found) == 8
        assert [one.figure for one in found] == ["final"] * 2 + ["best"] * 2 + ["area"] * 2 + ["budget 1"] * 2
        low, high = found[0].interval
        assert 0 < low < high
        assert {one.verdict for one in found} == {verdict}


def test_fewer_than_five_seeds_get_no_verdict():
    runs = [
        made_up(arm, seed, 0.1, [0, 0.5], [0, 0.5 + 0.1 * (arm.name == "prm")]) for arm in ARMS for seed in range(4)
    ]
    found = said(runs)
    assert {one.verdict for one in found} == {None}
    assert found[0].sentence == (
        "prm and adamw: test accuracy 0.600 against 0.500 (higher is better), +0.1000 [+0.1000, +0.1000]; "
        "4 seeds are too few for a verdict, 5 would do"
    )


@pytest.mark.parametrize(
    ("difference", "direction", "p", "expected"),
    [
        (0.02, "max", 0.01, "a is better than b: test x 0.520 against 0.500 (higher is better), +0.0200, p = 0.01"),
        (-0.02, "max", 0.01, "a is worse than b: test x 0.480 against 0.500 (higher is better), -0.0200, p = 0.01"),
        (-0.02, "min", 1e-5, "a is better than b: test x 0.480 against 0.500 (lower is better), -0.0200, p < 0.001"),
        (0.02, "max", 0.05,
         "a is ahead of b, not proven: test x 0.520 against 0.500 (higher is better), +0.0200, p = 0.05"),
        (0.02, "min", 0.06,
         "a is behind b, not proven: test x 0.520 against 0.500 (lower is better), +0.0200, p = 0.06"),
        (0.0, "min", 1.0,
         "a is level with b: test x 0.500 against 0.500 (lower is better), +0.0000, p = 1"),
    ],
)  # fmt: skip
def test_sentences(difference, direction, p, expected):
    one = Statement("", "final", "a", "b", "x", direction, 0.5 + difference, 0.5, difference, None, 5, p)
    assert one.sentence == expected


def test_a_difference_that_is_rounding_is_not_shown_as_zero_or_less():
    one = Statement("", "final", "a", "b", "x", "max", 0.5, 0.5 + 2e-9, -2e-9, (-3e-9, -1e-9), 5, 0.01)
    assert "-2e-09 [-3e-09, -1e-09], p" in one.sentence
    same = Statement("", "final", "a", "b", "x", "max", 0.5, 0.5, 0.0, (0.0, 0.0), 5, 1.0)
    assert "+0.0000 [+0.0000, +0.0000], p = 1" in same.sentence


def test_differences_are_paired_by_seed():
    levels = {0: 0.5, 1: 0.7, 2: 0.9, 3: 0.6, 4: 0.8}
    runs = [made_up(arm, seed, 0.1, [0, x + gain], [0, x + gain])
            for arm, gain in zip(ARMS, (0, 0.01, 0.02)) for seed, x in levels.items()]  # fmt: skip
    against = analyse(plan(), runs)["final"]["prm"].against["adamw"]["final"]["accuracy"]
    # The seeds differ by far more than the arms, but every seed shows the same gain.
    assert against.mean == pytest.approx(0.01)
    assert against.interval == pytest.approx((0.01, 0.01))
    first = said(runs)[0]
    assert (first.arm, first.rival, first.figure, first.verdict) == ("prm", "adamw", "final", "better")
    assert first.sentence.startswith(
        "prm is better than adamw: test accuracy 0.710 against 0.700 (higher is better), +0.0100"
    )
    swapped = said(runs, metrics={"loss": "min", "accuracy": "max"})[0]
    assert swapped.sentence.startswith(
        "prm is better than adamw: test loss 0.290 against 0.300 (lower is better), -0.0100"
    )


def test_prm_is_compared_with_the_best_rival():
    """The one that is best on validation data, whatever the test says."""
    sgd, lion = Arm("sgd", "optimizer"), Arm("lion", "optimizer")
    arms = [*make_arms(), sgd, lion]
    level = {"adamw": (0.5, 0.9), "prm": (0.6, 0.6), "adamw-matched": (0.8, 0.8), "sgd": (0.7, 0.6), "lion": (0.6, 0.9)}
    runs = [made_up(arm, seed, 0.1, [0, level[arm.name][0]], [0, level[arm.name][1]])
            for arm in arms for seed in range(5)]  # fmt: skip
    selections = analyse(plan(arms), runs)
    assert list(selections["final"]["prm"].against) == ["adamw", "sgd", "adamw-matched"]
    assert rivals_of(sgd) == ["adamw"]
    rivals = {(one.figure, one.rival) for one in said(runs, arms)}
    assert {figure for figure, rival in rivals if rival == "sgd"} == {"final", "best", "area", "budget 1"}
    assert "lion" not in {rival for _, rival in rivals}


def test_the_best_rival_without_tuning_may_be_another_than_the_tuned_one():
    """SGD is best at one rate and lost at the other; lion is good at both, but for validation data alone."""
    sgd, lion = Arm("sgd", "optimizer"), Arm("lion", "optimizer")
    arms = [*make_arms(), sgd, lion]
    level = {"adamw": (0.5, 0.5), "prm": (0.6, 0.6), "adamw-matched": (0.6, 0.6), "sgd": (0.8, 0.1), "lion": (0.7, 0.7)}
    runs = [made_up(arm, seed, lr, [0, value], [0, 0.6 if arm is lion else value])
            for arm in arms for seed in range(5) for lr, value in zip((0.1, 0.2), level[arm.name])]  # fmt: skip
    found = {(one.figure, one.rival) for one in said(runs, arms)}
    assert ("final", "sgd") in found
    assert ("budget 1", "lion") in found
    assert not {("final", "lion"), ("budget 1", "sgd")} & found
    assert untuned(plan(arms, {"loss": "min", "accuracy": "max"}), runs)["lion"] == pytest.approx(-0.3)
    runs.append(made_up(lion, 5, 0.1, [0, 0.7], [0, 0.7], status="diverged"))
    assert untuned(plan(arms), runs)["lion"] == float("-inf")


def test_an_arm_that_always_diverges():
    runs = [made_up(arm, seed, 0.1, [0.1, 0.5], [0.1, 0.5], status="diverged" if arm.name == "prm" else "finished")
            for arm in ARMS for seed in range(5)]  # fmt: skip
    selections = analyse(plan(), runs)
    assert selections["final"]["prm"] == Selection(None, None, {})
    # Stopping early would have saved it.
    assert selections["best"]["prm"].test["best"]["accuracy"].mean == 0.5
    assert "final" not in selections["best"]["prm"].test
    assert {one.figure for one in said(runs)} == {"best"}
