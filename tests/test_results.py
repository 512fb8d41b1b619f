"""Every committed file of results is still read by the code that read it when it was written."""

import importlib
import json
import pathlib

import pytest
from tiny import Tiny

from popriskmin.compare import compare
from popriskmin.compare.execute import _replaced

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
FILES = {str(path.relative_to(RESULTS)): json.loads(path.read_text()) for path in sorted(RESULTS.rglob("*.json"))}
COMPARISONS = [name for name, content in FILES.items() if isinstance(content, dict) and "task_options" in content]
# Lists that a study goes on with: those of studies.Records.
RECORDS = [name for name, content in FILES.items() if isinstance(content, list)]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    return compare(Tiny(), lr=0.1, weight_decay=0.0, seeds=[99], out=folder, progress=False)


@pytest.fixture
def studies(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return importlib.import_module


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_is_known_as_another_before_it_is_replaced(name, other):
    found = FILES[name]
    note = _replaced(RESULTS / name, other)
    assert note is not None
    assert all(f"seed {seed}" in note for seed in found["seeds"])
    assert all(arm["name"] in note for arm in found["arms"] if arm["name"] not in ("adamw", "prm", "adamw-matched"))
    options = {name: value for name, value in found["task_options"].items() if value is not None}
    assert all(f"{name}={value}" in note for name, value in options.items() if name != "noise")


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_has_each_arms_figures_by_seed(name):
    found = FILES[name]
    for figure, arms in found["selections"].items():
        for arm in filter(None, arms.values()):
            assert arm["chosen"]["lr"] > 0
            at = figure if figure in arm["test"] else "final"
            for metric in found["metrics"]:
                assert len(arm["test"][at][metric]["values"]) == len(found["seeds"])


@pytest.mark.parametrize("name", RECORDS)
def test_a_study_goes_on_with_its_records(name, studies):
    records = studies("studies").Records(RESULTS / name)
    assert len(records) == len(FILES[name]) > 0
    assert records.find(**{key: value for key, value in records[-1].items() if isinstance(value, (str, int))})


def test_the_studies_of_several_tasks_print_their_tables(studies):
    shrinkage, default = studies("shrinkage"), studies("one_default")
    tasks = FILES["shrinkage/results.json"]["tasks"]
    assert len(shrinkage.table(tasks)) == 2 + sum(len(task["arms"]) for task in tasks)
    for task in tasks:
        if shrinkage.has_own(task["task"]):
            assert "adamw" in task["arms"]
            continue
        arms = shrinkage.committed(task["task"], task["metric"], RESULTS)
        assert {name: task["arms"][name] for name in arms} == arms
    found = FILES["default/results.json"]
    assert len(default.score_table(found["scores"])) == 2 + len(found["scores"])
    assert len(default.task_table(found["tasks"], list(found["scores"])[:4])) == 2 + len(found["tasks"])
