"""What a reader is warned of."""

from compare.made_up import ARMS, made_up, plan

from popriskmin.compare.report.analysis import analyse
from popriskmin.compare.report.notes import by_arm, edges, warnings_of
from popriskmin.compare.report.run_summary import why_none


def test_a_metric_that_was_never_a_number_is_not_called_divergence():
    nan = float("nan")
    runs = [made_up(arm, seed, 0.1, [0.1, 0.5], [nan, nan] if arm.name == "prm" else [0.1, 0.5])
            for arm in ARMS for seed in range(5)]  # fmt: skip
    selections = analyse(plan(), runs)
    assert selections["final"]["prm"].chosen is None
    found = warnings_of(plan(), runs, selections)
    assert found == ["prm: no configuration had a finite final accuracy on validation and test data with every seed."]
    mine = [run for run in runs if run.job.arm.name == "prm"]
    assert why_none(mine, "best", "accuracy").startswith("no configuration had a finite best accuracy")


def test_an_arm_that_always_diverges():
    runs = [made_up(arm, seed, 0.1, [0.1, 0.5], [0.1, 0.5], status="diverged" if arm.name == "prm" else "finished")
            for arm in ARMS for seed in range(5)]  # fmt: skip
    found = warnings_of(plan(), runs, analyse(plan(), runs))
    assert found == ["prm: 5 of 5 runs diverged.", "prm: no configuration came to its end with every seed."]


def test_the_edge_of_the_grid_is_noted_for_every_figure_and_arm():
    # The end is best at the largest rate, the best step at one in the middle.
    runs = [made_up(arm, seed, lr, [0, 1 - abs(lr - 0.2), lr], [0, 0.5, lr])
            for arm in ARMS for seed in range(5) for lr in (0.1, 0.2, 0.3)]  # fmt: skip
    found = edges(plan(rates=[0.1, 0.2, 0.3]), analyse(plan(), runs))
    expected = [f"{arm.name}: the learning rate 0.3 is the largest of the grid; extend it (--lr)." for arm in ARMS]
    assert found["final"] == expected
    assert found["best"] == []
    assert by_arm(found)[0].startswith(
        "adamw: the learning rate 0.3 is the largest of the grid; extend it (--lr). (final"
    )
    assert edges(plan(rates=[0.1, 0.2, 0.3, 0.4]), analyse(plan(), runs))["final"] == []


def test_the_edge_of_the_weight_decays():
    runs = [made_up(arm, seed, 0.1, [0, d], [0, d], decay=d) for arm in ARMS for seed in range(5) for d in (0, 0.1, 1)]
    selections = analyse(plan(), runs)
    found = edges(plan(decays=[0, 0.1, 1]), selections)["final"]
    assert found[0] == "adamw: the weight decay 1 is the largest of the grid; extend it (--weight-decay)."
    assert edges(plan(decays=[0.1, 1]), selections)["final"] == []  # of two each is an edge
    runs = [
        made_up(arm, seed, 0.1, [0, -d], [0, -d], decay=d) for arm in ARMS for seed in range(5) for d in (0, 0.1, 1)
    ]
    assert edges(plan(decays=[0, 0.1, 1]), analyse(plan(), runs))["final"] == []  # there is none below 0


def test_few_seeds_and_unlike_starts():
    runs = [made_up(arm, seed, lr, [0, lr], [0, lr]) for arm in ARMS for seed in range(5) for lr in (0.1, 0.2, 0.3)]
    selections = analyse(plan(), runs)
    assert warnings_of(plan(), runs, selections) == []
    assert warnings_of(plan(seeds=range(2)), runs, selections)[0].startswith("With 2 seeds no verdict is given")
    odd = [*runs, made_up(ARMS[1], 0, 0.1, [0, 0.1], [0, 0.1], initial_weights="others")]
    assert warnings_of(plan(), odd, selections) == [
        "seed 0: the arms did not get the same initial weights; trial(seed) must depend on seed alone."
    ]
    cut_short = [*runs, made_up(ARMS[1], 0, 0.1, [0, 0.1], [0, 0.1], first_batches=["a0"])]
    assert warnings_of(plan(), cut_short, selections) == []
    odd = [*cut_short, made_up(ARMS[1], 1, 0.1, [0, 0.1], [0, 0.1], first_batches=["a1", "other"])]
    assert "seed 1: the arms did not get the same batches" in warnings_of(plan(), odd, selections)[0]
