"""The expected best of k configurations, against all draws there are."""

import itertools
import math

import numpy as np
import pytest
from compare.made_up import ARMS, made_up, plan
from hypothesis import given
from hypothesis import strategies as st

from popriskmin.compare.report.analysis import by_budget, expected_of_the_best


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
