"""The study of one default, `experiments/one_default.py`, on tasks of a second."""

import json
import pathlib
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import one_default

    small = {
        "flow": one_default.Source("flow", {"scale": "test"}, True),
        "inr": one_default.Source("inr", {"scale": "test"}, False),
    }
    monkeypatch.setattr(one_default, "SOURCES", small)
    monkeypatch.setattr(one_default, "MASKS", [{"mask": "soft"}])
    monkeypatch.setattr(one_default, "RATES", (1e-2,))
    for name in small:
        task = type(one_default.parts_of(name)["adamw"].task)
        monkeypatch.setattr(task, "learning_rates", (1e-3, 1e-2) if name == "inr" else (1e-2,))
        monkeypatch.setattr(task, "weight_decays", (0.01,))
    return one_default


def call(study, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["one_default.py", *map(str, arguments)])
    study.main()


def test_runs_are_made_once_and_reported_by_halves(study, monkeypatch, tmp_path, capsys):
    runs, out = tmp_path / "runs", tmp_path / "out"
    call(study, monkeypatch, "run", "--runs", runs, "--tasks", "flow")
    call(study, monkeypatch, "report", "--runs", runs, "--out", out)
    assert "inr: runs of adamw are missing, so it is left out" in capsys.readouterr().out
    call(study, monkeypatch, "run", "--runs", runs)
    call(study, monkeypatch, "report", "--runs", runs, "--out", out)
    said, found = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    assert set(found["scores"]) == {"prm at 0.01", "prm mask=soft at 0.01"}
    for halves in found["scores"].values():
        assert halves["chosen on"]["tasks"] == halves["tested on"]["tasks"] == 1
    for one in found["tasks"]:
        assert len(one["adamw"]["values"]) == len(one["adamw tuned"]["values"]) == 5
        assert one["adamw tuned"]["lr"] in (1e-3, 1e-2)
        for name in found["scores"]:
            assert f"{np.mean(one['candidates'][name]['values']):.3f}" in said
    store = study.parts_of("flow")["prm"].read(runs)
    metric = "loss"
    mine = study.values_of(store, "prm", 1e-2, 0.01, metric)
    flow = next(one for one in found["tasks"] if one["task"] == "flow")
    assert list(mine.values()) == flow["candidates"]["prm at 0.01"]["values"]


def test_a_new_candidate_stands_beside_results_whose_runs_are_gone(study, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    call(study, monkeypatch, "run", "--runs", tmp_path / "old", "--tasks", "flow")
    call(study, monkeypatch, "report", "--runs", tmp_path / "old", "--out", out)
    before = json.loads((out / "results.json").read_text())["tasks"][0]
    monkeypatch.setattr(study, "MASKS", [*study.MASKS, {"shrinkage": 1.0}])
    call(study, monkeypatch, "report", "--runs", tmp_path / "new", "--out", tmp_path / "empty")
    assert "flow: runs of adamw are missing" in capsys.readouterr().out
    call(study, monkeypatch, "run", "--runs", tmp_path / "new", "--tasks", "flow", "--masks", "shrinkage")
    capsys.readouterr()
    call(study, monkeypatch, "report", "--runs", tmp_path / "new", "--out", out)
    after = json.loads((out / "results.json").read_text())["tasks"][0]
    added = after["candidates"].pop("prm shrinkage=1 at 0.01")
    assert after == before
    assert len(added["values"]) == 5
    assert added["values"] != before["candidates"]["prm at 0.01"]["values"]


def test_verdicts(study):
    base = dict(enumerate((1.0, 1.1, 0.9, 1.05, 0.95)))
    less = {seed: value - 0.5 for seed, value in base.items()}
    assert study.verdict(less, base, "min") == "better"
    assert study.verdict(less, base, "max") == "worse"
    assert study.verdict(dict(zip(base, reversed(base.values()))), base, "min") == "unclear"
    assert study.verdict({**less, 0: np.nan}, base, "min") == "worse"


def test_candidates_are_ranked_by_what_they_win_on_a_half(study):
    rows = [
        {"task": "a", "candidates": {"one": {"against adamw": "better", "against adamw tuned": "unclear"}}},
        {"task": "b", "candidates": {"one": {"against adamw": "worse", "against adamw tuned": "worse"}}},
        {"task": "c", "candidates": {"one": {"against adamw": "unclear", "against adamw tuned": "better"}}},
    ]
    found = study.score(rows, "one")
    assert study.rank(found) == (1 + 2, 1)
    assert found["worse than adamw"] == found["worse than adamw tuned"] == ["b"]
