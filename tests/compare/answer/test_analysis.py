"""The figures, the choice of configurations, the intervals and the sentences, on numbers made up for it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from popriskmin.compare.answer.analysis import (
    analyse,
    choose,
    difference,
    interval,
    over_grid,
    read_run,
    sentence,
    warnings_of,
    why_none,
)
from popriskmin.compare.runs.arms import make_arms
from popriskmin.compare.runs.runner import Job
from popriskmin.compare.runs.train import Configuration

ARMS = make_arms()
METRICS = {"accuracy": "max", "loss": "min"}


def made_up(arm, seed, lr, validation, test, status="finished", decay=0.1, metrics=METRICS, **end):
    """Return a run with these accuracies at steps 0, 10, 20, ...; the loss is one less it."""
    records = []
    for i, (v, t) in enumerate(zip(validation, test)):
        pair = [{"accuracy": x, "loss": None if x is None else 1 - x} for x in (v, t)]
        records.append({"kind": "evaluation", "step": 10 * i, "validation": pair[0], "test": pair[1]})
    start = {"initial_weights": f"w{seed}", "first_batches": [f"a{seed}", f"b{seed}"]}
    records.append({"kind": "end", "status": status, **start, **end})
    return read_run(Job(arm, Configuration(lr, decay, seed)), records, metrics)


def test_the_three_figures():
    run = made_up(ARMS[0], 0, 0.1, validation=[0.1, 0.7, 0.6], test=[0.2, 0.8, 0.9])
    assert run.figures["final"]["accuracy"] == pytest.approx((0.6, 0.9))
    # The test value where validation was best, not the best test value.
    assert run.figures["best"]["accuracy"] == pytest.approx((0.7, 0.8))
    assert run.figures["best"]["loss"] == pytest.approx((0.3, 0.2))
    assert run.best_step == 10
    assert run.figures["area"]["accuracy"][1] == pytest.approx((0.5 * 0.2 + 0.8 + 0.5 * 0.9) / 2)


def test_a_metric_to_be_small():
    run = made_up(ARMS[0], 0, 0.1, [0.1, 0.7, 0.6], [0.2, 0.8, 0.9], metrics={"loss": "min", "accuracy": "max"})
    assert run.best_step == 10
    assert run.figures["best"]["loss"] == pytest.approx((0.3, 0.2))


def test_a_diverged_run_has_a_best_but_no_end():
    run = made_up(ARMS[0], 0, 0.1, [0.1, 0.7, None], [0.2, 0.8, None], status="diverged")
    assert run.figures["final"]["accuracy"] is None
    assert run.figures["area"]["accuracy"] is None
    assert run.figures["best"]["accuracy"] == pytest.approx((0.7, 0.8))
    assert made_up(ARMS[0], 0, 0.1, [], [], status="failed").figures["best"]["accuracy"] is None


def test_the_choice_sees_validation_alone():
    runs = [made_up(ARMS[0], seed, lr, [0, v], [0, t]) for seed in (0, 1) for lr, v, t in
            [(0.1, 0.5, 0.9), (0.2, 0.6, 0.1), (0.3, 0.4, 1.0)]]  # fmt: skip
    assert choose(runs, "final", METRICS) == (0.2, 0.1)
    assert choose(runs, "final", {"loss": "min", "accuracy": "max"}) == (0.2, 0.1)


def test_a_configuration_that_diverged_with_one_seed_has_no_end_but_may_have_the_best_stop():
    runs = [
        made_up(ARMS[0], 0, 0.1, [0, 0.9], [0, 0.9]),
        made_up(ARMS[0], 1, 0.1, [0, 0.9], [0, 0.9], status="diverged"),
        made_up(ARMS[0], 0, 0.2, [0, 0.3], [0, 0.3]),
        made_up(ARMS[0], 1, 0.2, [0, 0.3], [0, 0.3]),
    ]
    assert choose(runs, "final", METRICS) == (0.2, 0.1)
    assert choose(runs, "best", METRICS) == (0.1, 0.1)
    assert choose(runs[:2], "final", METRICS) is None


def test_a_metric_that_was_never_a_number_is_not_called_divergence():
    nan = float("nan")
    runs = [made_up(arm, seed, 0.1, [0.1, 0.5], [nan, nan] if arm.name == "prm" else [0.1, 0.5])
            for arm in ARMS for seed in range(5)]  # fmt: skip
    selections = analyse(runs, ARMS, METRICS)
    assert selections["final"]["prm"]["chosen"] is None
    found = warnings_of(runs, ARMS, selections, [0.1], range(5), METRICS)
    assert found == ["prm: no configuration had a finite final accuracy on validation and test data with every seed."]
    mine = [run for run in runs if run.job.arm.name == "prm"]
    assert why_none(mine, "best", "accuracy").startswith("no configuration had a finite best accuracy")


def test_each_figure_chooses_for_itself():
    """Fast and unstable against slow and steady: the comparison is of each at its best."""
    runs = [made_up(arm, seed, lr, curve, curve) for arm in ARMS for seed in range(3) for lr, curve in
            [(0.1, [0, 0.95, 0.5]), (0.01, [0, 0.6, 0.9])]]  # fmt: skip
    selections = analyse(runs, ARMS, METRICS)
    assert selections["best"]["prm"]["chosen"] == {"lr": 0.1, "weight_decay": 0.1}
    assert selections["final"]["prm"]["chosen"] == {"lr": 0.01, "weight_decay": 0.1}
    assert selections["final"]["prm"]["test"]["final"]["accuracy"]["mean"] == pytest.approx(0.9)
    assert selections["final"]["prm"]["test"]["best"]["accuracy"]["mean"] == pytest.approx(0.9)
    assert list(selections["final"]["prm"]["against"]) == ["adamw", "adamw-matched"]
    assert list(selections["final"]["adamw-matched"]["against"]) == ["adamw"]
    assert selections["final"]["adamw"]["against"] == {}


def test_differences_are_paired_by_seed():
    levels = {0: 0.5, 1: 0.7, 2: 0.9}
    runs = [made_up(arm, seed, 0.1, [0, x + gain], [0, x + gain])
            for arm, gain in zip(ARMS, (0, 0.01, 0.02)) for seed, x in levels.items()]  # fmt: skip
    against = analyse(runs, ARMS, METRICS)["final"]["prm"]["against"]["adamw"]["final"]["accuracy"]
    # The seeds differ by far more than the arms, but every seed shows the same gain.
    assert against["mean"] == pytest.approx(0.01)
    assert against["interval"] == pytest.approx((0.01, 0.01))
    assert "prm is better than adamw by 0.0100" in against["sentence"]
    loss = analyse(runs, ARMS, METRICS)["final"]["prm"]["against"]["adamw"]["final"]["loss"]
    assert loss["mean"] == pytest.approx(-0.01)
    assert "prm is better than adamw by 0.0100" in loss["sentence"]


def test_an_arm_that_always_diverges():
    runs = [made_up(arm, seed, 0.1, [0.1, 0.5], [0.1, 0.5], status="diverged" if arm.name == "prm" else "finished")
            for arm in ARMS for seed in range(5)]  # fmt: skip
    selections = analyse(runs, ARMS, METRICS)
    assert selections["final"]["prm"] == {"chosen": None, "test": None, "against": {}}
    # Stopping early would have saved it.
    assert selections["best"]["prm"]["test"]["best"]["accuracy"]["mean"] == 0.5
    assert "final" not in selections["best"]["prm"]["test"]
    found = warnings_of(runs, ARMS, selections, [0.1], range(5), METRICS)
    assert "prm: 5 of 5 runs diverged." in found
    assert "prm: no configuration came to its end with every seed." in found


@pytest.mark.parametrize(
    ("mean", "bounds", "direction", "expected"),
    [
        (0.02, (0.01, 0.03), "max", "a is better than b by 0.0200 [0.0100, 0.0300]"),
        (-0.02, (-0.03, -0.01), "max", "a is worse than b by 0.0200 [0.0100, 0.0300]"),
        (-0.02, (-0.03, -0.01), "min", "a is better than b by 0.0200 [0.0100, 0.0300]"),
        (0.02, (0.0, 0.03), "max", "no clear difference between a and b: +0.0200 [+0.0000, +0.0300]"),
        (0.0, (0.0, 0.0), "max", "no clear difference between a and b: +0.0000 [+0.0000, +0.0000]"),
    ],
)
def test_sentences(mean, bounds, direction, expected):
    assert sentence(mean, bounds, 5, direction, ("a", "b")) == expected


def test_too_few_seeds_say_nothing():
    assert interval([0.1, 0.2]) is None
    found = difference({0: 0.9, 1: 0.8}, {0: 0.1, 1: 0.1}, "max", ("a", "b"))
    assert found["sentence"] == "2 seeds are too few to tell a from b (+0.7500)"
    assert difference({0: 0.9}, {0: 0.1}, "max", ("a", "b"))["sentence"].startswith("1 seed is too few")


@given(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=12))
def test_the_interval_lies_within_the_values_and_holds_the_mean(values):
    low, high = interval(values, resamples=199)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= low <= high <= max(values) + slack
    assert interval(values, resamples=199) == (low, high)


def test_the_interval_covers_as_often_as_it_says():
    """For 5 and 10 normal values; the plain percentile interval would cover about 86% and 91%."""
    rng = np.random.default_rng(0)
    for n, least in ((5, 0.90), (10, 0.92)):
        hits = [low <= 0 <= high for low, high in (interval(list(rng.normal(size=n)), 499) for _ in range(400))]
        assert least < np.mean(hits) < 0.98


def test_over_the_grid():
    runs = [made_up(arm, seed, lr, [0, 0.5], [0, value + gain]) for arm, gain in zip(ARMS, (0, 0.1, 0.2))
            for seed in range(3) for lr, value in ((0.1, 0.2), (0.2, 0.4))]  # fmt: skip
    found = over_grid(runs, ARMS, METRICS)
    assert found["adamw"]["test"]["mean"] == pytest.approx(0.3)
    assert found["prm"]["against"]["adamw"]["mean"] == pytest.approx(0.1)
    assert found["prm"]["against"]["adamw-matched"]["mean"] == pytest.approx(-0.1)
    lost = [*runs, made_up(ARMS[1], 0, 0.3, [0, 0.5], [0, 0.5], status="diverged")]
    found = over_grid(lost, ARMS, METRICS)
    assert found["prm"] == {"test": None, "against": {}}
    assert not math.isnan(found["adamw-matched"]["against"]["adamw"]["mean"])


def test_warnings_name_the_edge_of_the_grid_and_unlike_starts():
    runs = [made_up(arm, seed, lr, [0, lr], [0, lr]) for arm in ARMS for seed in range(5) for lr in (0.1, 0.2, 0.3)]
    selections = analyse(runs, ARMS, METRICS)
    found = warnings_of(runs, ARMS, selections, [0.1, 0.2, 0.3], range(5), METRICS)
    assert found == [f"{arm.name}: the chosen learning rate 0.3 is the largest of the grid; extend it with --lr."
                     for arm in ARMS]  # fmt: skip
    assert warnings_of(runs, ARMS, selections, [0.1, 0.2, 0.3, 0.4], range(5), METRICS) == []
    assert warnings_of(runs, ARMS, selections, [0.1, 0.2, 0.3, 0.4], range(2), METRICS)[0].startswith("With 2 seeds")
    odd = [*runs, made_up(ARMS[1], 0, 0.1, [0, 0.1], [0, 0.1], initial_weights="others")]
    assert warnings_of(odd, ARMS, selections, [0.3], range(5), METRICS) == [
        "seed 0: the arms did not get the same initial weights; trial(seed) must depend on seed alone."
    ]
    cut_short = [*runs, made_up(ARMS[1], 0, 0.1, [0, 0.1], [0, 0.1], first_batches=["a0"])]
    assert warnings_of(cut_short, ARMS, selections, [0.3], range(5), METRICS) == []
    odd = [*cut_short, made_up(ARMS[1], 1, 0.1, [0, 0.1], [0, 0.1], first_batches=["a1", "other"])]
    assert (
        "seed 1: the arms did not get the same batches"
        in warnings_of(odd, ARMS, selections, [0.3], range(5), METRICS)[0]
    )


def test_many_arms_are_warned_of():
    arms = make_arms([{"mask": "soft"}])
    runs = [made_up(arm, seed, 0.1, [0, 0.5], [0, 0.5]) for arm in arms for seed in range(5)]
    found = warnings_of(runs, arms, analyse(runs, arms, METRICS), [0.1], range(5), METRICS)
    # prm against two, the matched arm against one, the further one against two; in each of three figures.
    assert found == ["Of 15 differences, expect about one in twenty to look clear by chance alone."]
