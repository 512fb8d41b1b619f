"""What every arm chose and reached, and what is said of each pair."""

import itertools
import math

import numpy as np
import pytest
from compare.made_up import ARMS, made_up, plan
from hypothesis import given
from hypothesis import strategies as st

from popriskmin.compare.report.analysis import analyse, best_rival, by_budget, expected_of_the_best, rivals_of
from popriskmin.compare.report.run_summary import Choice
from popriskmin.compare.training.arms import make_arms


def test_each_figure_chooses_for_itself():
    """Fast and unstable against slow and steady: the comparison is of each at its best."""
    runs = [made_up(arm, seed, lr, curve, curve) for arm in ARMS for seed in range(3) for lr, curve in
            [(0.1, [0, 0.95, 0.5]), (0.01, [0, 0.6, 0.9])]]  # fmt: skip
    selections = analyse(plan(), runs)
    assert selections["best"]["prm"].chosen == Choice(0.1, 0.1)
    assert selections["final"]["prm"].chosen == Choice(0.01, 0.1)
    assert selections["final"]["prm"].test["final"]["accuracy"].mean == pytest.approx(0.9)
    assert selections["final"]["prm"].test["best"]["accuracy"].mean == pytest.approx(0.9)
    assert list(selections["final"]["prm"].against) == ["adamw", "adamw-matched"]
    assert list(selections["final"]["adamw-matched"].against) == ["adamw"]
    assert selections["final"]["adamw"].against == {}


def test_averaged_weights_are_compared_with_those_of_adamw_and_with_the_plain_ones():
    arms = make_arms([{"mask": "soft"}])
    prm = next(arm for arm in arms if arm.name == "prm mask=soft")
    assert rivals_of(prm.of_averages) == ["adamw averaged", "adamw", "prm mask=soft"]
    assert rivals_of(prm.of_averages, "adamw averaged") == ["adamw averaged", "prm mask=soft"]
    assert rivals_of(prm, "adamw averaged") == [
        "adamw", "adamw averaged", "adamw-matched mask=soft", "prm",
    ]  # fmt: skip
    assert rivals_of(arms[0]) == []
    assert rivals_of(arms[0].of_averages) == ["adamw"]


def test_averaged_weights_of_adamw_are_a_rival_and_those_of_prm_and_the_matched_arm_are_none():
    arms = [*ARMS, *(arm.of_averages for arm in ARMS)]
    scores = {arm.name: float(i) for i, arm in enumerate(arms)}
    assert best_rival(arms, scores) == "adamw averaged"


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(-1, 1)), min_size=1, max_size=7, unique_by=lambda p: p[0]))
def test_it_is_the_mean_over_all_draws(pairs):
    for k, expected in enumerate(expected_of_the_best(pairs), 1):
        draws = [max(drawn)[1] for drawn in itertools.combinations(pairs, k)]
        assert expected == pytest.approx(np.mean(draws), abs=1e-9)


def test_one_is_the_mean_over_the_grid_and_all_are_the_choice():
    runs = [made_up(arm, seed, lr, [0, v], [0, t + gain]) for arm, gain in zip(ARMS, (0, 0.1, 0.2)) for seed in range(3)
            for lr, v, t in ((0.1, 0.3, 0.2), (0.2, 0.5, 0.4), (0.3, 0.4, 0.9))]  # fmt: skip
    found = by_budget(plan(), runs)
    assert [row.k for row in found["adamw"]] == [1, 2, 3]
    assert found["adamw"][0].test.mean == pytest.approx(0.5)
    assert found["adamw"][2].test.mean == pytest.approx(0.4)
    assert found["prm"][2].test.values == pytest.approx([0.5] * 3)
    assert found["prm"][0].test.seeds == [0, 1, 2]
    lower = by_budget(plan(metrics={"loss": "min", "accuracy": "max"}), runs)
    assert lower["adamw"][2].test.mean == pytest.approx(0.6)


def test_what_diverged_is_chosen_last_and_has_no_value():
    runs = [made_up(ARMS[0], seed, lr, [0, v], [0, v], status="diverged" if lr == 0.3 else "finished")
            for seed in range(3) for lr, v in ((0.1, 0.3), (0.2, 0.5), (0.3, 0.9))]  # fmt: skip
    one, two, three = by_budget(plan(ARMS[:1]), runs)["adamw"]
    assert one.test is None  # which may be the one that diverged
    assert two.test.mean == pytest.approx((0.3 + 0.5 + 0.5) / 3)
    assert three.test.mean == pytest.approx(0.5)
    assert not math.isnan(two.test.mean)
