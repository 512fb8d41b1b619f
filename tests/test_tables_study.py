"""The study of tables: networks side by side are trained as each alone, it resumes, and reports what was run."""

import json
import math
import pathlib
import sys

import lightgbm
import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import ElasticNet

from popriskmin import PRM, ShrinkageController
from popriskmin.compare.training import arms as compared
from popriskmin.compare.training.runner import factors
from popriskmin.compare.training.train import Configuration, run
from popriskmin.tasks import sparse, table
from popriskmin.tasks.sparse import Sparse
from popriskmin.tasks.table import Table

ROOT = pathlib.Path(__file__).parent.parent

sys.path.insert(0, str(ROOT / "experiments"))

import shrinkage_rules  # noqa: E402
import sparse_map  # noqa: E402
import tables  # noqa: E402
import tables_data  # noqa: E402
import tables_references  # noqa: E402
import tables_report  # noqa: E402
import tables_runs  # noqa: E402
import tables_shrinkage  # noqa: E402

SOFT = compared.Arm("prm mask=soft", "prm", {"mask": "soft"})
PAIRS = {
    "adamw": compared.ADAMW,
    "snr": compared.Arm("prm", "prm"),
    "soft": SOFT,
    "debias": compared.Arm("prm debias=True", "prm", {"debias": True}),
    "adamw-matched to soft": compared.Arm("matched", "adamw-matched", {"mask": "soft"}, follows="prm mask=soft"),
}


@pytest.mark.parametrize("data", ["wine", "diabetes"])
@pytest.mark.parametrize("name", list(PAIRS))
def test_networks_side_by_side_are_trained_as_each_alone(name, data):
    """Of two configurations and seeds each evaluation's figures, against `popriskmin compare`."""
    task, seeds = Table(data=data, probes=7, steps=20, hidden=9), [0, 3]
    found = tables._train(tables_runs.Stack(task, seeds), tables.ARMS[name], {})["configurations"]
    metric = next(iter(task.metrics))
    for (lr, decay), (i, seed) in zip([(1e-3, 1.0), (1e-2, 0.01)], enumerate(seeds)):
        configuration = Configuration(lr, decay, seed)
        trace = factors(run(task, SOFT, configuration)) if PAIRS[name].follows else None
        records = run(task, PAIRS[name], configuration, trace)
        evaluations = [record for record in records if record["kind"] == "evaluation"]
        best = min(evaluations, key=lambda record: record["validation"][metric])
        mine = found[f"{lr:g} {decay:g}"]
        assert mine["final"][1][0][i] == pytest.approx(evaluations[-1]["test"][metric], rel=1e-3)
        assert mine["best"][0][0][i] == pytest.approx(best["validation"][metric], rel=1e-3)
        assert mine["best"][1][0][i] == pytest.approx(best["test"][metric], rel=1e-3)
        assert mine["step"][i] == best["step"]


def test_the_open_share_is_that_of_the_optimizer():
    torch.manual_seed(0)
    parts = [[torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(4))] for _ in range(3)]
    optimizer = tables_runs.build(tables.ARMS["soft"], [{"params": part} for part in parts])
    for _ in range(5):
        for part in parts:
            for parameter in part:
                parameter.grad = 2 + torch.randn_like(parameter)
        optimizer.step()
    q, active = tables_runs.openness(optimizer, parts, 5)
    stats = optimizer.get_mask_stats(by="group")
    assert q.tolist() == pytest.approx([stats[i]["mean_q"] for i in range(3)], rel=1e-5)
    assert active.tolist() == pytest.approx([stats[i]["active_fraction"] for i in range(3)])
    assert 0 < q.mean() < 1


@pytest.mark.parametrize("model", ["linear", "network"])
def test_models_of_the_sparse_task_side_by_side(model):
    task = Sparse(model=model, inputs=30, informative=3, examples=60, steps=30, hidden=5)
    found = tables_runs.train(sparse_map.SparseStack(task, [0, 1]), sparse_map.ARMS[2])[0]["configurations"]
    for seed in (0, 1):
        records = run(task, SOFT, Configuration(0.01, 0.1, seed))
        last = [record for record in records if record["kind"] == "evaluation"][-1]
        assert found["0.01 0.1"]["final"][1][0][seed] == pytest.approx(last["test"]["excess risk"], rel=1e-3)


def test_an_average_and_a_penalty_do_what_they_say():
    stack = tables_runs.Stack(Table(data="wine", probes=30, steps=60), [0])
    plain, averaged = (tables_runs.Arm("a", "adamw", (0.03,), (0.01,), average=average) for average in (False, True))
    one, other = (tables_runs.train(stack, arm)[0]["configurations"]["0.03 0.01"] for arm in (plain, averaged))
    assert one["final"] != other["final"]
    # The penalty's weight is in place of the decay: with weight 0 it is AdamW without decay.
    none = tables_runs.Arm("a", "adamw", (0.01,), (0.0,))
    penalized = tables_runs.Arm("a", "adamw", (0.01,), (0.0, 0.1), axis="l1")
    one, other = (tables_runs.train(stack, arm)[0]["configurations"] for arm in (none, penalized))
    assert one["0.01 0"] == other["0.01 0"] != other["0.01 0.1"]


def by_hand(name, classifies, training, validation, seed):
    """Return the learner of the last configuration of the test below, fitted."""
    if name == "boosted trees, tuned":
        kind = lightgbm.LGBMClassifier if classifies else lightgbm.LGBMRegressor
        model = kind(n_estimators=1000, learning_rate=0.12, num_leaves=4, min_child_samples=5, colsample_bytree=0.3,
                     random_state=seed, verbose=-1)  # fmt: skip
        return model.fit(*training, eval_set=[validation], callbacks=[lightgbm.early_stopping(50, verbose=False)])
    if name == "forest, tuned":
        kind = RandomForestClassifier if classifies else RandomForestRegressor
        return kind(100, max_features=0.1, min_samples_leaf=10, random_state=seed).fit(*training)
    ratio = 0.5 if name == "elastic net, tuned" else 1.0
    if not classifies:
        return ElasticNet(0.01, l1_ratio=ratio).fit(*training)
    return table.sparse_linear(0.01, True, len(training[1]), seed).set_params(l1_ratio=ratio).fit(*training)


@pytest.mark.filterwarnings("ignore")  # of the penalty's name, and of passes that did not suffice
@pytest.mark.parametrize("data", ["wine", "diabetes"])
@pytest.mark.parametrize("name", list(tables_references.LEARNERS))
def test_learners_are_tuned_as_arms_are(monkeypatch, name, data):
    """Of fifteen configurations each; the losses are those of a fit by hand, and read as an arm's."""
    assert len(tables_references.BOOSTED) == len(tables_references.FOREST) == len(tables_references.PENALTIES) == 15
    assert math.prod(map(len, tables_references.ELASTIC)) == 15
    monkeypatch.setattr(tables_references, "BOOSTED", tables_references.BOOSTED[-2:])
    monkeypatch.setattr(tables_references, "FOREST", ((1.0, 3), (0.1, 10)))
    monkeypatch.setattr(tables_references, "PENALTIES", (0.1, 0.01))
    monkeypatch.setattr(tables_references, "ELASTIC", ((0.5,), (0.1, 0.01)))
    task, classifies = Table(data=data, probes=7), data == "wine"
    row = tables_references.tuned(name, task, [0, 3])
    assert len(row["configurations"]) == 2
    found = list(row["configurations"].values())[-1]["best"]
    for place, seed in enumerate((0, 3)):
        prepared = task.prepare(seed)
        parts = [(x.numpy().astype(float), y.numpy()) for x, y in prepared[:3]]
        model = by_hand(name, classifies, *parts[:2], seed)
        for mine, part in zip(found, parts[1:]):
            expected = list(prepared.judge(model, *part).values())
            assert [metric[place] for metric in mine] == pytest.approx(expected, rel=0.01)
    kept = tables_report.reached({**row, "arm": name})
    assert kept["chosen"] in row["configurations"]
    assert kept["loss"] in [one["best"][1][0] for one in row["configurations"].values()]


@pytest.fixture
def _short(monkeypatch):
    monkeypatch.setattr(tables_data, "STEPS", 10)
    monkeypatch.setattr(tables, "SEEDS", 3)
    forest = RandomForestClassifier(5, random_state=0)
    monkeypatch.setattr(table, "trees", lambda classifies, seed: {"forest": forest})


@pytest.mark.usefixtures("_short")
def test_the_study_resumes_and_reports(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--tables", "wine", "iris", "--probes", "0", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["tables.py", "run", *words, "--cache", str(tmp_path / "cache")])
    few = [arm for name, arm in tables.ARMS.items() if name in ("adamw", "snr", "soft", "adamw-matched to soft")]
    references_alone = []
    monkeypatch.setattr(tables, "THIRD", references_alone)
    monkeypatch.setattr(tables, "GROUPS", (few[:3], few[3:], references_alone))
    monkeypatch.setattr(tables_references, "LEARNERS", {})
    tables.main()
    made = {path.name: path.read_text() for path in out.glob("*.jsonl")}
    assert sorted(made) == ["iris.jsonl", "wine.jsonl"]
    assert all(text.count("\n") == 2 * 5 for text in made.values())
    # A kill in the middle of a line: it is made again, and nothing else is.
    path = out / "wine.jsonl"
    path.write_text(made["wine.jsonl"][:-40])
    capsys.readouterr()
    tables.main()
    made_again = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wine + ")]
    assert [line.split(":")[0] for line in made_again] == ["wine + 3, references"]
    # Further seeds do not mix with these.
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [*sys.argv, "--first-seed", "5"])
        with pytest.raises(SystemExit, match="out has the seeds from 0 on: those from 5 on need another --out"):
            tables.main()
    again = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    before = [json.loads(line) for line in made["wine.jsonl"].splitlines()]
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in before]

    # Packed lines are read as before and not made again; further ones go into plain files beside them.
    rows = tables.read(out)
    monkeypatch.setattr(sys, "argv", ["tables.py", "pack", "--out", str(out)])
    tables.main()
    assert [path.name for path in out.iterdir()] == ["runs.jsonl.gz"]
    assert tables.read(out) == rows
    once = (out / "runs.jsonl.gz").read_bytes()
    tables.append(out, rows[-1])
    assert tables.read(out) == [*rows, rows[-1]]
    tables.main()
    assert (out / "runs.jsonl.gz").read_bytes() == once
    monkeypatch.setattr(sys, "argv", ["tables.py", "run", *words, "--cache", str(tmp_path / "cache")])
    tables.main()
    assert "references:" not in capsys.readouterr().out
    assert list(out.glob("*.jsonl")) == []

    monkeypatch.setattr(sys, "argv", ["tables.py", "report", "--out", str(out)])
    tables.main()
    printed = capsys.readouterr().out
    assert "| wine, 89 x 13 |" in printed
    assert "| soft | 2 |" in printed
    found = json.loads((out / "results.json").read_text())
    assert found["rules"]["always soft"]["cases"] == [2, 2]
    reached = tables_report.gather(rows)["wine", 3]
    row = next(row for row in before if (row["probes"], row["arm"]) == (3, "soft"))
    best = min(row["configurations"].values(), key=lambda one: sum(one["best"][0][0]))
    assert reached["soft"]["loss"] == best["best"][1][0]
    for name in ("ratios", "rule", "masks"):
        assert (out / f"{name}.png").stat().st_size > 5000
        monkeypatch.setattr(tables_report, f"draw_{name}", lambda *given: None)  # each takes a second
    written = tmp_path / "page.md"
    written.write_text("before\n" + "\nold\n".join(tables_report.MARKS) + "\nafter\n")
    for _ in range(2):
        tables_report.write(tables.read(out), out, written)
        text = written.read_text()
        assert text.startswith("before\n<!--")
        assert text.endswith("-->\nafter\n")
        assert "old" not in text
        assert text.count("| wine, 89 x 13 |") == 1
    # What only one table has is shown, and counts in no summary and no rule.
    rows = tables.read(out)
    tables_report.write([*rows, *({**row, "probes": 9} for row in rows if row["table"] == "wine")], out, written)
    text = written.read_text()
    assert [text.count(f"| wine + {probes}, 89 x") for probes in (0, 3, 9)] == [1, 1, 1]
    assert "iris + " not in text
    assert text.count("| soft | 2 |") == 2
    assert json.loads((out / "results.json").read_text())["rules"]["always soft"]["cases"] == [2, 2]
    # The arms with a mask and the penalty, once they are there.
    assert "the penalty together" not in text
    more = [{**row, "arm": name} for row in rows if row["arm"] == "soft" for name in tables_report.TOGETHER]
    more += [{**row, "arm": tables_report.PENALTY} for row in rows if row["arm"] == "adamw"]
    tables_report.write([*rows, *more], out, written)
    text = written.read_text()
    assert text.count("### A mask and the penalty together") == 1
    assert text.count("\n| iris + 3 |") == 1
    assert all(f"| {name} | " in text for name in tables_report.TOGETHER)
    # A long table is a file that the page shows.
    monkeypatch.setattr(tables_report, "LONG", 2)
    tables_report.write(rows, out, written)
    text = written.read_text()
    assert "```{csv-table}\n:file: out/as-they-come-table.csv\n:header-rows: 1\n```" in text
    assert "| wine, 89 x 13 |" not in text
    assert '\n"wine, 89 x 13",' in (out / "as-they-come-table.csv").read_text()
    written.write_text("no marks")
    with pytest.raises(SystemExit, match="page.md needs the lines"):
        tables_report.write(tables.read(out), out, written)


def test_the_bound_of_the_study_is_the_controllers():
    counts = {"batch_size": 10, "n_dataset": 40}
    ours, theirs = (torch.nn.Parameter(torch.ones(6, 5)) for _ in range(2))
    bound = PRM([{"params": [ours], "shrinkage": tables_runs.MOST, "bound": 0.4}], **counts)
    controlled = PRM([theirs], shrinkage=tables_runs.MOST, **counts)
    ShrinkageController(controlled, share=0.4)
    for number in range(1, 20):
        ours.grad = theirs.grad = torch.randn(6, 5)
        bound.step()
        tables_runs.bind(bound, number)
        controlled.step()
        if number > 1:  # the controller waits for a variance of two gradients
            assert bound.param_groups[0]["shrinkage"] == pytest.approx(controlled.param_groups[0]["shrinkage"])
    assert 0 < bound.param_groups[0]["shrinkage"] < tables_runs.MOST


def test_the_committed_tables_of_shrinkage_are_those_of_the_runs(tmp_path):
    committed = ROOT / "docs/results/shrinkage"
    (tmp_path / "properties.csv").write_bytes((committed / "properties.csv").read_bytes())
    runs = ROOT / "docs/results/tables"
    tables_shrinkage.write(tables.read(runs), tables.read(runs / tables.MORE_SEEDS), tmp_path, tmp_path)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"tables.json", "tables-0.csv", "tables-500.csv", "rules.csv"} <= set(made)
    assert made == {name: (committed / name).read_bytes() for name in made}


def test_seeds_are_joined():
    """A configuration is chosen over all of them."""

    def line(validation, test):
        pairs = zip("ab", validation, test)
        found = {name: {when: [[v], [t]] for when in ("best", "final")} for name, v, t in pairs}
        return {"table": "wine", "probes": 0, "arm": "adamw", "rows": 9, "columns": [3], "configurations": found}

    joined = tables_shrinkage.over_seeds(line([[1.0], [2.0]], [[5.0], [6.0]]), line([[9.0], [2.0]], [[7.0], [8.0]]))
    found = tables_report.reached(joined)
    assert (found["chosen"], found["validation"], found["columns"]) == ("b", [2.0, 2.0], [3, 3])
    assert found["loss"] == [6.0, 8.0]


def test_a_rule_is_chosen_on_one_half_of_the_tables_and_tested_on_the_other():
    """z = 2 is better where there are many columns; the tables of the other half know better still."""
    cells, known = {}, {}
    for i, (name, source) in enumerate(tables_data.SOURCES.items()):
        many = i % 4 < 2
        known[name, 0] = {shrinkage_rules.COLUMNS: 2.0 if many else 0.5, shrinkage_rules.SHARE: 0.0}
        low, high = (0.4, 0.9) if source.chosen_on else (0.2, 1.6)
        losses = {"adamw": 1.0, "0": high if many else low, "2": low if many else high, "chosen": low}
        cells[name, 0] = {arm: {"loss": [loss]} for arm, loss in losses.items()}
    lines = {line["rule"]: line for line in shrinkage_rules.judged(cells, known, ["0", "2"], "chosen")}
    rule = lines["z = 2 where the columns per training row is above 1.2, else 0"]
    assert (rule["chosen on"], rule["tested on"], rule["worst tested"]) == ("0.400", "0.200", "0.20")
    assert (lines["z = 0"]["chosen on"], lines["z = 0"]["tested on"]) == ("0.600", "0.566")
    assert lines["z by validation data"]["tested on"] == "0.200"
    x = np.array([[0.0, 0, 1, 5], [1, 2, 0, 5], [2, 4, 1, 5]])
    assert shrinkage_rules.measured(x) == {shrinkage_rules.COLUMNS: 4 / 3, shrinkage_rules.SHARE: 2 / 3}


def test_the_map_resumes_and_draws(monkeypatch, tmp_path):
    monkeypatch.setattr(sparse_map, "INPUTS", 20)
    monkeypatch.setattr(sparse_map, "STEPS", 8)
    monkeypatch.setattr(sparse_map, "SHARES", (0.1, 1.0))
    monkeypatch.setattr(sparse_map, "PER_INPUT", (2.0,))
    monkeypatch.setattr(sparse_map, "NOISES", (1.0,))
    monkeypatch.setattr(sys, "argv", ["sparse_map.py", "--out", str(tmp_path)])
    sparse_map.main()
    first = (tmp_path / "map.json").read_text()
    points = json.loads(first)
    assert [point["share"] for point in points] == [0.1, 1.0]
    points[1].pop("soft")
    (tmp_path / "map.json").write_text(json.dumps(points))
    sparse_map.main()
    assert json.loads((tmp_path / "map.json").read_text()) == json.loads(first)
    assert (tmp_path / "map.png").stat().st_size > 5000


def test_the_default_of_the_sparse_task(monkeypatch, tmp_path):
    monkeypatch.setitem(sparse.SCALES, "default", {"inputs": 20, "informative": 2, "examples": 40, "steps": 5})
    monkeypatch.setattr(sys, "argv", ["sparse_map.py", "--default", "--out", str(tmp_path)])
    sparse_map.main()
    text = (tmp_path / "default.json").read_text()
    found = json.loads(text)
    names = [arm.name for arm in sparse_map.DEFAULT_ARMS]
    assert [one["arm"] for one in found if one["model"] == "network"] == names
    assert [one["arm"] for one in found if one["model"] == "linear"][: len(names)] == names
    assert {"Lasso", "ridge"} < {one["arm"] for one in found}
    (tmp_path / "default.json").write_text(json.dumps(found[:-2]))
    sparse_map.main()
    assert json.loads((tmp_path / "default.json").read_text()) == found
