"""What a run reached, and which configuration is chosen."""

import dataclasses
import json
import re

import pytest
from compare.made_up import ARMS, METRICS, made_up
from tiny import Tiny

from popriskmin.compare import compare
from popriskmin.compare.report.run_summary import Choice, choose

pytestmark = pytest.mark.usefixtures("no_pictures_in_module")


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
    assert choose(runs, "final", METRICS)[0] == Choice(0.2, 0.1)
    assert choose(runs, "final", {"loss": "min", "accuracy": "max"})[0] == Choice(0.2, 0.1)


def test_a_configuration_that_diverged_with_one_seed_has_no_end_but_may_have_the_best_stop():
    runs = [
        made_up(ARMS[0], 0, 0.1, [0, 0.9], [0, 0.9]),
        made_up(ARMS[0], 1, 0.1, [0, 0.9], [0, 0.9], status="diverged"),
        made_up(ARMS[0], 0, 0.2, [0, 0.3], [0, 0.3]),
        made_up(ARMS[0], 1, 0.2, [0, 0.3], [0, 0.3]),
    ]
    assert choose(runs, "final", METRICS)[0] == Choice(0.2, 0.1)
    assert choose(runs, "best", METRICS)[0] == Choice(0.1, 0.1)
    assert choose(runs[:2], "final", METRICS)[0] is None


@dataclasses.dataclass
class Referred(Tiny):
    broken: str = ""

    def references(self, seed):
        if self.broken == "raise" and seed == 1:
            raise ArithmeticError("no forest here")
        if self.broken == "metric":
            return {"forest": {"fit": 1.0}}
        value = float("nan") if self.broken == "nan" and seed == 1 else 0.25 + seed
        return {"forest": {"error": value, "fit": 0.5}, "ceiling": {"error": 0.125, "fit": 0.75}}


QUICK = {"lr": [0.1], "seeds": 3, "progress": False}


def test_references_are_kept_and_shown(tmp_path, monkeypatch, capsys):
    results = compare(Referred(), out=tmp_path, **QUICK)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["references"]["forest"]["error"]["values"] == [0.25, 1.25, 2.25]
    assert written["references"]["ceiling"]["fit"]["mean"] == 0.75
    assert set(results.frame["arm"]) == {"adamw", "prm", "adamw-matched"}
    results.print()
    assert capsys.readouterr().out.count("forest") == 3
    page = (tmp_path / "report.html").read_text()
    assert page.count("<tr><td>ceiling</td>") == 6
    monkeypatch.setattr(Referred, "references", lambda self, seed: 1 / 0)  # the kept ones are read
    assert compare(Referred(), out=tmp_path, **QUICK).to_dict() == results.to_dict()


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("raise", "references: seed 1 failed: ArithmeticError: no forest here"),
        ("metric", r"seed 0 failed: ValueError: references\(seed\)\['forest'\] must return error, fit"),
        ("nan", "references: forest has no finite value of every metric with every seed"),
    ],
)
def test_references_that_fail_are_told(tmp_path, broken, message):
    results = compare(Referred(broken=broken), out=tmp_path, keep_going=True, **QUICK)
    assert re.search(message, "\n".join(results.warnings))
    assert "error" not in results.references.test.get("forest", {})
    assert results.selections["final"]["prm"].test is not None
