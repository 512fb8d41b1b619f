"""Training on validation data too, against stopping by it: which runs are made, and what is said of them."""

import dataclasses

import pytest
from compare.made_up import ARMS, made_up, plan

from popriskmin.compare.report.analysis import Selection, analyse, by_budget
from popriskmin.compare.report.run_summary import Choice
from popriskmin.compare.report.statements import statements
from popriskmin.compare.report.train_on_validation import JOINED, by_joined, jobs_of_joined, renamed

ADAMW, PRM, MATCHED = ARMS
SEEDS = range(5)
# By arm, of the run that is stopped at its second evaluation and that ends at its third.
CURVES = {"adamw": [0.1, 0.8, 0.6], "prm": [0.1, 0.7, 0.75], "adamw-matched": [0.1, 0.5, 0.4]}


def ordinary():
    return [
        made_up(arm, seed, lr, [x - lr for x in CURVES[arm.name]], [x - lr + 0.01 * seed for x in CURVES[arm.name]])
        for arm in ARMS
        for seed in SEEDS
        for lr in (0.01, 0.1)
    ]


def joined(final, arms=ARMS, status="finished"):
    return [
        made_up(arm, seed, 0.01, [0.1, 0.2], [0.1, final[arm.name] + 0.01 * seed], status)
        for arm in arms
        for seed in SEEDS
    ]


def test_which_runs_are_made():
    jobs = jobs_of_joined(plan(), analyse(plan(), ordinary()))
    assert {job.variant for job in jobs} == {JOINED}
    assert {(job.arm.name, job.configuration.lr) for job in jobs} == {(arm.name, 0.01) for arm in ARMS}
    assert len(jobs) == 15


def test_an_arm_that_follows_another_gets_its_run_at_the_same_place():
    selections = analyse(plan(), ordinary())
    selections["final"]["adamw-matched"] = Selection(Choice(0.1, 0.1))
    jobs = jobs_of_joined(plan(seeds=[0]), selections)
    places = [(job.arm.name, job.configuration.lr) for job in jobs]
    assert places == [("adamw", 0.01), ("prm", 0.01), ("prm", 0.1), ("adamw-matched", 0.1)]


def test_no_run_for_averages_and_for_arms_that_chose_nothing():
    arms = [*ARMS, ADAMW.of_averages]
    selections = analyse(plan(arms), [*ordinary(), *(as_averaged(run) for run in ordinary())])
    selections["final"]["adamw-matched"] = Selection(None)
    assert {job.arm.name for job in jobs_of_joined(plan(arms), selections)} == {"adamw", "prm"}


def as_averaged(run):
    return dataclasses.replace(run, job=dataclasses.replace(run.job, arm=run.job.arm.of_averages))


def test_what_each_arm_reached():
    runs = ordinary()
    final = joined({"adamw": 0.5, "prm": 0.9, "adamw-matched": 0.4})
    found = by_joined(plan(), final, runs, analyse(plan(), runs))
    assert list(found) == ["adamw", "prm", "adamw-matched"]
    prm = found["prm"]
    assert prm.chosen == Choice(0.01, 0.1)
    assert prm.test["accuracy"].mean == pytest.approx(0.92)
    assert prm.stopped["accuracy"].mean == pytest.approx(0.76)  # its best validation step is its last
    assert prm.against["stopped"]["accuracy"].mean == pytest.approx(0.16)
    assert prm.against["adamw"]["accuracy"].mean == pytest.approx(0.4)
    assert found["adamw"].stopped["accuracy"].mean == pytest.approx(0.81)
    assert set(found["adamw"].against) == {"stopped"}


def test_an_arm_that_diverged_is_left_out():
    runs, selections = ordinary(), analyse(plan(), ordinary())
    lost = joined({"prm": 0.9}, [PRM], "diverged") + joined({"adamw": 0.5}, [ADAMW])
    assert list(by_joined(plan(), lost, runs, selections)) == ["adamw"]


def test_statements_are_corrected_with_all_others():
    runs = ordinary()
    selections, budget = analyse(plan(), runs), by_budget(plan(), runs)
    table = by_joined(plan(), joined({"adamw": 0.5, "prm": 0.9, "adamw-matched": 0.4}), runs, selections)
    without, said = (statements(plan(), selections, budget, "adamw", found) for found in ({}, table))
    assert [(one.arm, one.rival) for one in said[len(without) :]] == [
        ("adamw joined", "adamw stopped"),
        ("prm joined", "prm stopped"),
        ("prm joined", "adamw joined"),
    ]
    assert said[-1].sentence.startswith("prm joined is better than adamw joined: test accuracy 0.920 against 0.520")
    assert said[-1].opening.startswith("Trained to the end on training and validation data joined")
    assert all(one.p <= other.p for one, other in zip(without, said))


def test_the_runs_get_names_of_their_own():
    assert renamed(joined({"prm": 0.9}, [PRM])[0]).job.arm.name == "prm joined"
