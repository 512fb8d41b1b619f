"""The task of a table: its parts, its probes, its metrics and its references, on real files and through the command."""

import json

import numpy as np
import pytest
import torch
from people import people, written
from sklearn.datasets import load_wine
from tasks.every import check_joined

from popriskmin import cli
from popriskmin.compare.loading import make_task
from popriskmin.compare.training.arms import ADAMW, make_arms
from popriskmin.compare.training.drivers import make_driver
from popriskmin.compare.training.train import Configuration, run
from popriskmin.tasks import table
from popriskmin.tasks.table import Table, passes


def test_the_parts_are_the_table():
    prepared = Table(data="wine").prepare(0)
    sizes = [len(y) for _, y in prepared[:3]]
    assert sizes == [89, 44, 45]
    labels = torch.cat([y for _, y in prepared[:3]])
    assert sorted(labels.tolist()) == sorted(load_wine().target)
    assert prepared.outputs == 3
    x = prepared.training[0]
    assert torch.allclose(x.mean(0), torch.zeros(13), atol=1e-5)


def test_probes_are_permuted_columns():
    plain, more = Table(data="wine").prepare(2), Table(data="wine", probes=40).prepare(2)
    joined = [torch.cat([x for x, _ in prepared[:3]]) for prepared in (plain, more)]
    assert joined[1].shape == (178, 53)
    assert torch.equal(joined[0], joined[1][:, :13])
    known = {tuple(sorted(column.tolist())) for column in joined[0].T}
    labels = torch.cat([y for _, y in more[:3]]).double()
    for probe in joined[1][:, 13:].T:
        assert tuple(sorted(probe.tolist())) in known
        assert not any(torch.equal(probe, column) for column in joined[0].T)
    real, probes = (
        [abs(np.corrcoef(column, labels)[0, 1]) for column in columns.T.numpy()]
        for columns in (joined[0], joined[1][:, 13:])
    )
    assert np.mean(real) > 3 * np.mean(probes)


def test_a_regression_is_in_units_of_the_target_s_variance():
    prepared = Table(data="diabetes").prepare(1)
    y = prepared.training[1]
    assert y.mean().item() == pytest.approx(0, abs=1e-6)
    assert y.std(unbiased=False).item() == pytest.approx(1)
    assert prepared.measure(torch.zeros(len(y), 1), y) == {"error": pytest.approx(1)}
    assert Table(data="diabetes").metrics == {"error": "min"}
    assert Table(data="wine").metrics == {"loss": "min", "accuracy": "max"}


def test_metrics_of_a_classification():
    prepared = Table(data="wine").prepare(0)
    y = torch.tensor([0, 1, 2, 2])
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.25, 0.25, 0.5]]))
    found = prepared.measure(logits, y)
    assert found["accuracy"] == 0.75
    assert found["loss"] == pytest.approx(-np.log([0.5, 0.8, 0.2, 0.5]).mean(), rel=1e-6)


@pytest.mark.parametrize("hidden", [0, 8])
def test_shrinkage_is_that_of_the_first_layer(hidden):
    task = Table(data="wine", probes=5, hidden=hidden, steps=40, batch_size=16)
    arm = make_arms(task.default_prm)[3]
    trial = task.trial(0)
    optimizer = make_driver(arm, trial, 0.03, 0.01, {}).optimizer
    shrinkages = {name: group["shrinkage"] for group in optimizer.param_groups for name in group["param_names"]}
    assert shrinkages == {name: 2.0 * (name == "0.weight") for name, _ in trial.model.named_parameters()}
    assert {group["n_dataset"] for group in optimizer.param_groups} == {89}
    assert {group["batch_size"] for group in optimizer.param_groups} == {16}
    for batch in trial.batches:
        optimizer.zero_grad()
        trial.loss(trial.model, batch).backward()
        optimizer.step()
    zeros = {name: (p == 0).float().mean().item() for name, p in trial.model.named_parameters()}
    assert zeros.pop("0.weight") > 0.2
    assert set(zeros.values()) == {0.0}


@pytest.mark.parametrize("hidden", [0, 8])
def test_a_seed_gives_the_same_trial_and_another_seed_another(hidden):
    def parts(seed):
        torch.manual_seed(seed)
        trial = Table(data="wine", probes=5, hidden=hidden, steps=7).trial(seed)
        return [trial.model[0].weight, torch.stack(trial.batches)], trial.test(trial.model)

    (first, metrics), (again, same), (other, different) = parts(3), parts(3), parts(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert metrics == same
    assert not torch.equal(first[1], other[1])
    if hidden:
        assert not torch.equal(first[0], other[0])
        assert metrics != different
    else:
        assert not first[0].any()
        assert metrics["loss"] == pytest.approx(np.log(3))


def test_passes_go_through_all_rows():
    batches = passes(20, 6, 7, 0)
    assert [len(batch) for batch in batches] == [6] * 7
    for start in (0, 3):
        assert len(set(torch.cat(batches[start : start + 3]).tolist())) == 18
    assert [len(batch) for batch in passes(5, 6, 3, 0)] == [5, 5, 5]


def test_a_table_with_everything_is_learnt(tmp_path):
    """Numbers, categories, yes and no, and holes: what the target depends on is found, on rows held out."""
    frame = people(400)
    rng = np.random.default_rng(1)
    frame["left"] = np.where((frame["town"] == "Ulm") ^ (rng.random(400) < 0.05), "yes", "no")
    frame["owed"] = 100 * frame["member"] + frame["age"] + rng.normal(0, 5, 400)
    path = written(frame, tmp_path)
    for options, figure, bound in (
        ({"target": "left", "drop": "owed"}, "loss", 0.35),
        ({"target": "owed", "drop": "left"}, "error", 0.1),
    ):
        task = Table(data=path, steps=200, **options)
        records = run(task, ADAMW, Configuration(lr=0.01, weight_decay=0.01, seed=0))
        assert records[-1]["status"] == "finished", records[-1]
        tested = [record["test"][figure] for record in records if record["kind"] == "evaluation"]
        assert min(tested) < bound < 0.5 * tested[0], options


def test_the_mask_finds_the_columns_among_probes():
    """Wine with 500 probes at one learning rate: AdamW's network is lost in them, the soft mask's is not."""
    task = Table(data="wine", probes=500, steps=150)
    (_, _, _, soft) = make_arms([{"mask": "soft"}])
    best = {}
    for name, arm in (("adamw", ADAMW), ("soft", soft)):
        records = run(task, arm, Configuration(lr=0.01, weight_decay=1.0, seed=0))
        evaluations = [record for record in records if record["kind"] == "evaluation"]
        best[name] = min(evaluations, key=lambda record: record["validation"]["loss"])["test"]["loss"]
    assert best["soft"] < 0.7 * best["adamw"]


@pytest.mark.parametrize("data", ["wine", "diabetes"])
def test_references(data):
    task = Table(data=data, probes=20)
    found = task.references(0)
    assert list(found) == ["constant guess", "L1 linear", "forest", "boosted trees"]
    assert all(set(metrics) == set(task.metrics) for metrics in found.values())
    figure = next(iter(task.metrics))
    chance = np.log(3) if data == "wine" else 1.0
    guess = found.pop("constant guess")[figure]
    assert guess == pytest.approx(chance, rel=0.15)
    assert all(0 < metrics[figure] < guess for metrics in found.values())
    assert task.references(0) == {"constant guess": task.references(0)["constant guess"], **found}


@pytest.mark.parametrize(
    "options",
    [{"probes": -1}, {"hidden": -1}, {"steps": 0}, {"batch_size": 0}, {"rows": -1}, {"rows": 39}, {"kind": "both"}],
)
def test_bad_options(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=rf"{name} must be .*, got '?{value}"):
        Table(**options)


@pytest.mark.usefixtures("no_pictures")
def test_the_command_on_a_file(tmp_path, monkeypatch):
    written(people(), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "trees", lambda classifies, seed: {})
    words = ["--steps", "5", "--lr", "0.01", "--weight-decay", "0.01", "--seeds", "1", "--out", "found"]
    assert cli.main(["compare", "table", "--data", "people.csv", "--target", "left", *words]) == 0
    results = json.loads((tmp_path / "found" / "results.json").read_text())
    assert results["task_options"]["data"] == "people.csv"
    assert list(results["metrics"]) == ["loss", "accuracy"]
    # Before anything is trained, and as a sentence.
    with pytest.raises(ValueError, match=r"people.csv has no column 'lef'; did you mean left\?$"):
        make_task(Table, {"data": str(tmp_path / "people.csv"), "target": "lef"})


def test_an_edited_file_makes_new_runs(tmp_path):
    from popriskmin.compare.training.fingerprint import source_digest

    path = tmp_path / "mine.csv"
    path.write_text("x,y\n" + "\n".join(f"{i},{i % 2}" for i in range(60)))
    task = Table(data=str(path), target="y", kind="classification")
    assert task.files == [str(path)]
    before = source_digest(task)
    path.write_text(path.read_text() + "\n60,1")
    assert source_digest(task) != before
    assert Table(data="wine").files == []


def test_training_and_validation_data_joined():
    check_joined(Table(data="wine", probes=5, steps=40))
