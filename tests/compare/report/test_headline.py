"""The first sentence: right on every committed table, and where the network loses."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from compare.made_up import plan
from sklearn.datasets import make_classification

from popriskmin.compare import compare
from popriskmin.compare.report.analysis import Selection
from popriskmin.compare.report.headline import GUESS, Contender, _value, headline, verdicts
from popriskmin.compare.report.statements import Statement
from popriskmin.compare.report.statistics import Estimate, estimate
from popriskmin.compare.training.arms import Arm, make_arms
from popriskmin.tasks import table
from popriskmin.tasks.table import Table

RESULTS = Path(__file__).parents[3] / "docs" / "results"
COMPARISONS = [path for path in sorted(RESULTS.glob("*/results.json")) if '"selections"' in path.read_text()]
SEEDS = 5


def read(path):
    """Return what `headline` takes from a committed file, also from one of before statements had their p-values."""
    data = json.loads(path.read_text())
    names = {field.name for field in dataclasses.fields(Statement)}
    said = [Statement(**{k: v for k, v in one.items() if k in names}) for one in data.get("answer", ())]
    comparison = plan([Arm(**arm) for arm in data["arms"]], data["metrics"])
    selections = {
        figure: {
            arm: Selection(one["chosen"], {of: estimates(values) for of, values in (one["test"] or {}).items()})
            for arm, one in by_arm.items()
        }
        for figure, by_arm in data["selections"].items()
    }
    references = {name: estimates(values) for name, values in data.get("references", {}).items()}
    return comparison, selections, references, said


def estimates(by_metric):
    return {metric: Estimate(one["mean"], one["interval"], one["values"]) for metric, one in by_metric.items()}


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.parent.name)
def test_on_what_is_committed(path):
    comparison, selections, references, said = read(path)
    metric, direction = comparison.metric, comparison.direction
    means = {arm: one.test["best"][metric].mean for arm, one in selections["best"].items()}
    networks = {name: mean for name, mean in means.items() if not name.startswith("adamw-matched")}
    everything = networks | {name: found[metric].mean for name, found in references.items()}
    pick = min if direction == "min" else max
    best = pick(everything, key=everything.get)
    sentence = headline(comparison, selections, references, said)
    assert sentence.startswith(f"Best on this page is {best}, test {metric} ")
    assert ("no network beats it" in sentence) == (best not in networks)
    assert sentence.count(". ") == 0
    one = next((s for s in said if (s.figure, s.rival) == ("best", "adamw") and s.arm in sentence), None)
    if said:
        assert {"better": "takes the network from", "unclear": "not proven", "worse": "is worse", None: "nothing"}[
            one.verdict
        ] in sentence


def test_the_committed_tables_in_words():
    found = {name: headline(*read(RESULTS / name / "results.json")) for name in ("table", "table-wine")}
    assert found["table"] == (
        "Best on this page is adamw-l1-0.01, test loss 0.088, ahead of prm (0.0911, the difference not proven); tuned "
        "and stopped early, prm is ahead of adamw, not proven (0.0911 against 0.103)."
    )
    assert found["table-wine"] == (
        "Best on this page is boosted trees, test loss 0.0792, and no network beats it (prm shrinkage=2, the best of "
        "them: 0.0917, the difference not proven); tuned and stopped early, prm shrinkage=2 takes the network from "
        "0.845 with adamw to 0.0917 (p = 0.014)."
    )


def made_up(levels, references, verdict_p):
    """Return the arguments of `headline` for arms and references at these levels."""
    arms = make_arms()
    noise = 1e-3 * np.arange(SEEDS)
    test = {name: {"best": {"loss": estimate(list(level + noise))}} for name, level in levels.items()}
    selections = {"best": {arm.name: Selection(None, test.get(arm.name)) for arm in arms}}
    known = {name: {"loss": estimate(list(level + noise[::-1]))} for name, level in references.items()}
    apart = levels["prm"] - levels["adamw"]
    values = ("loss", "min", levels["prm"], levels["adamw"], apart, (apart, apart), SEEDS, verdict_p)
    return plan(arms, {"loss": "min"}), selections, known, [Statement("", "best", "prm", "adamw", *values)]


@pytest.mark.parametrize(
    ("levels", "references", "p", "expected"),
    [
        (
            {"adamw": 1.18, "prm": 0.69, "adamw-matched": 0.3},
            {GUESS: 0.67, "L1 linear": 0.56},
            0.012,
            "Best on this page is L1 linear, test loss 0.560, and no network beats it (prm, the best "
            "of them: 0.690); no "
            "network beats even the constant guess (0.670); tuned and stopped early, prm takes the network from 1.180 "
            "with adamw to 0.690 (p = 0.012).",
        ),
        (
            {"adamw": 0.8, "prm": 0.9, "adamw-matched": 0.8},
            {GUESS: 0.7, "forest": 0.75},
            0.06,
            "Best on this page is the constant guess, test loss 0.700, and no network beats it "
            "(adamw, the best of them: "
            "0.800); tuned and stopped early, prm is behind adamw, not proven (0.900 against 0.800).",
        ),
        (
            {"adamw": 0.5, "prm": 0.6, "adamw-matched": 0.1},
            {GUESS: 1.1, "forest": 0.4999},
            0.001,
            "Best on this page is forest, test loss 0.500, and no network beats it (adamw, the best "
            "of them: 0.500, the "
            "difference not proven); tuned and stopped early, prm is worse than adamw (0.600 against "
            "0.500, p = 0.001).",
        ),
        (
            {"adamw": 0.5, "prm": 0.2, "adamw-matched": 0.1},
            {GUESS: 1.1, "forest": 0.4},
            None,
            "Best on this page is prm, test loss 0.202, ahead of forest (0.402); 5 seeds prove "
            "nothing of PRM (tuned and "
            "stopped early, prm has 0.200, adamw 0.500).",
        ),
    ],
)
def test_where_the_network_loses(levels, references, p, expected):
    noise = 0.002  # the mean of what the seeds differ by
    shifted = {name: level - noise for name, level in levels.items()} if p is not None else levels
    known = {name: level - noise for name, level in references.items()} if p is not None else references
    arguments = made_up(shifted, known, p)
    (one,) = arguments[-1]
    said = [dataclasses.replace(one, value=levels["prm"], rival_value=levels["adamw"])]
    assert headline(*arguments[:-1], said) == expected


def test_a_lead_picked_from_many_needs_more_proof():
    values = [0.5, 0.51, 0.52, 0.5, 0.53]
    best = Contender("a", True, 0.5, [x - d for x, d in zip(values, (0.01, 0.03, 0.02, 0.0, 0.02))])  # p = 0.035
    other = Contender("b", True, 0.512, values)
    assert _value(best, other, [best, other]) == "0.512"
    assert _value(best, other, [best, other, other]) == "0.512, the difference not proven"


def test_of_nothing_there_is_nothing_to_say():
    assert headline(plan([], {"loss": "min"}), {"best": {}}, {}, []) == ""
    assert verdicts([]) == {}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("kind", ["linear", "noise", "few"])
def test_real_tables_on_which_the_network_loses(kind, tmp_path, monkeypatch):
    """Made of lines, of nothing, and of few rows: what the page says first is what its own table says."""
    monkeypatch.setattr(table, "TREES", 60)
    rng = np.random.default_rng(0)
    rows = 60 if kind == "few" else 240
    x, y = make_classification(rows, 20, n_informative=2, n_redundant=0, flip_y=0.2, random_state=0)
    y = rng.integers(0, 2, rows) if kind == "noise" else y
    file = tmp_path / "made.csv"
    lines = [",".join([*(f"x{i}" for i in range(20)), "y"])]
    lines += [",".join([*(f"{value:.4f}" for value in row), "ab"[label]]) for row, label in zip(x, y)]
    file.write_text("\n".join(lines) + "\n")
    task = Table(data=str(file), target="y", steps=60, hidden=16)
    found = compare(task, lr=0.3, weight_decay=0.01, seeds=5, arms={}, out=tmp_path / "out", progress=False)
    losses = {arm: row.test["best"]["loss"].mean for arm, row in found.selections["best"].items()}
    losses = {arm: loss for arm, loss in losses.items() if arm != "adamw-matched"}
    known = {name: metrics["loss"].mean for name, metrics in found.references.test.items()}
    best = min(losses | known, key=(losses | known).get)
    assert best in known
    assert f"Best on this page is {'the ' if best == GUESS else ''}{best}, test loss" in found.headline
    assert "no network beats it" in found.headline
    behind_the_guess = known[GUESS] < min(losses.values())
    assert (best == GUESS or "no network beats even the constant guess" in found.headline) == behind_the_guess
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index(found.headline.split(";")[0]) < page.index("<h2>Trained to the end")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["headline"] == found.headline
