"""The helpers of the studies: results survive a kill, and times are taken in turns."""

import json
import pathlib

import pytest


@pytest.fixture
def studies(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "experiments"))
    import studies

    return studies


def test_records_go_on_where_they_stopped(studies, tmp_path):
    path = tmp_path / "new" / "results.json"
    records = studies.Records(path)
    assert records == []
    records.append({"run": "a", "seed": 0, "loss": 1.5})
    records.append({"run": "a", "seed": 1, "loss": 2.5})
    records.save()
    assert [line.rstrip(",") for line in path.read_text().splitlines()] == ["[", *map(json.dumps, records), "]"]
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    again = studies.Records(path)
    assert again == records
    assert again.find(run="a", seed=1) == {"run": "a", "seed": 1, "loss": 2.5}
    assert again.find(run="b") is None


def test_a_save_that_fails_leaves_the_file(studies, tmp_path):
    records = studies.Records(tmp_path / "results.json")
    records.append({"seed": 0})
    records.save()
    records.append({"seed": object()})
    with pytest.raises(TypeError):
        records.save()
    assert studies.Records(tmp_path / "results.json") == [{"seed": 0}]


def test_the_ratio_is_that_of_neighbouring_calls(studies, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(studies.time, "perf_counter", lambda: now[0])
    calls = []

    def taking(name, seconds):
        def call():
            calls.append(name)
            now[0] += seconds

        return call

    assert studies.ratio_in_turns(taking("one", 3.0), taking("other", 2.0), repeats=3) == 1.5
    assert calls == ["one", "other"] * 4


def test_the_study_of_masked_reports_a_loss_like_a_gain(studies, tmp_path):
    pytest.importorskip("sklearn")
    import masked

    def arm(loss):
        test = {"best": {"loss": {"values": [loss + 0.01 * (i % 2) for i in range(5)]}}}
        return {"chosen": {"lr": 0.3}, "test": {**test, "final": test["best"]}}

    losses = {"sgd": 1.0, "masked sgd": 2.0, "muon": 1.0, "masked muon": 0.5}
    found = {name: arm(loss) for name, loss in losses.items()}
    folder = tmp_path / "runs/table"
    folder.mkdir(parents=True)
    (tmp_path / "figures").mkdir()
    results = {"task_options": {}, "metrics": {"loss": "min"}, "selections": {"best": found, "final": found}}
    (folder / "results.json").write_text(json.dumps(results))
    masked.report(tmp_path / "runs", tmp_path)
    rows = (tmp_path / "figures/extend-masked.csv").read_text().splitlines()
    assert len(rows) == 5
    assert rows[1].startswith('table,SGD,best step,loss,"1.004 (rate 0.3, the largest)"')
    assert rows[1].endswith('"+1.000 [+1.000, +1.000]",hurts')
    assert rows[3].endswith(',"-0.500 [-0.500, -0.500]",helps')
    assert json.loads((tmp_path / "masked/results.json").read_text())["table"]["arms"]["sgd"]["best step"]["lr"] == 0.3
