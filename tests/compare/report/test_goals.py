"""When a run was first at a goal, and which configuration was there soonest."""

import pytest
from compare.made_up import ARMS, made_up, plan
from hypothesis import given
from hypothesis import strategies as st

from popriskmin.compare.report.goals import Arrival, by_goal, first_step, median
from popriskmin.compare.report.run_summary import Choice


@given(st.lists(st.floats(0, 1), max_size=20), st.floats(0, 1))
def test_the_first_step_is_at_the_goal_and_none_before_is(values, goal):
    steps = list(range(0, 10 * len(values), 10))
    found = first_step(steps, values, goal, "max")
    there = [step for step, value in zip(steps, values) if value >= goal]
    assert found == (there[0] if there else None)
    assert first_step(steps, [-v for v in values], -goal, "min") == found


def test_a_value_that_is_no_number_is_not_at_the_goal():
    assert first_step([0, 10], [float("nan"), 0.9], 0.5, "max") == 10


@pytest.mark.parametrize(
    ("steps", "expected"), [([10, 30], 20), ([10, None], None), ([10, 20, None], 20), ([], None), ([5], 5)]
)
def test_the_median_counts_what_was_never_there_as_late(steps, expected):
    assert median(steps) == expected


def test_the_configuration_is_chosen_on_validation_and_reported_on_test():
    runs = [made_up(ARMS[0], seed, lr, v, t) for seed in range(3) for lr, v, t in
            ((0.1, [0, 0.96, 0.96], [0, 0.5, 0.96]), (0.2, [0, 0.5, 0.99], [0, 0.99, 0.99]))]  # fmt: skip
    found = by_goal(plan(ARMS[:1], goals={"accuracy": 0.95}), runs)["accuracy"]
    assert found.goal == 0.95
    row = found.arms["adamw"]
    assert row.chosen == Choice(0.1, 0.1)
    assert (row.steps, row.median, row.length) == ([20, 20, 20], 20.0, 20)
    never = by_goal(plan(ARMS[:1], goals={"loss": 1e-6}), runs)["loss"].arms["adamw"]
    assert (never.steps, never.median) == ([None, None, None], None)
    assert (row.validated, row.on_test, never.validated, never.on_test) == (True, None, False, None)


def test_where_none_is_there_on_validation_data_nothing_chooses_and_the_test_data_is_told_of():
    runs = [made_up(ARMS[0], seed, lr, [0, 0.5, 0.5], [0, 0.5, t]) for seed in range(3) for lr, t in
            ((0.1, 0.5), (0.2, 0.96 if seed else 0.5))]  # fmt: skip
    row = by_goal(plan(ARMS[:1], goals={"accuracy": 0.95}), runs)["accuracy"].arms["adamw"]
    assert (row.chosen.lr, row.steps, row.validated) == (0.1, [None, None, None], False)
    assert row.on_test == Arrival(Choice(0.2, 0.1), [None, 20, 20], 20.0)
