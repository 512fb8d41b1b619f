"""What a task names beside the optimizers: kept like runs, and shown with them."""

import dataclasses
import json
import re

import pytest
from tiny import Tiny

from popriskmin.compare import compare


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
