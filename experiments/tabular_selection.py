"""Whether `selected_` can be trusted: of the columns that matter, those found; of the selected, those that say nothing.

    python experiments/tabular_selection.py run       # resumes after a kill; --tables, --seeds for a part
    python experiments/tabular_selection.py report

On the task `sparse`, and on `many rows`, it is known which columns matter. On real tables with 500 columns that say
nothing, permuted copies of the table's own, it is only known which do not: of the others the number found is given.
In tables called `nothing` the target is permuted, and no column matters. Beside it stand the columns with a coefficient
in an L1 model tuned by cross-validation, those of a forest whose permutation importance on held-out rows is more than
twice its standard deviation, and LassoNet's, where it is installed. The rule of `selected_` was chosen on the seeds 10
and 11. Rows without cpu seconds are older.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LassoCV, LogisticRegressionCV
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from studies import Records

from popriskmin.tabular import PRMClassifier, PRMRegressor
from popriskmin.tabular.encoding import encode
from popriskmin.tasks.sparse import Sparse
from popriskmin.tasks.table_data import CLASSIFICATION, read_table

NOISE = 500
TABLES = {"sparse": {}, "wine": {"data": "wine"}, "breast_cancer": {"data": "breast_cancer"}} | {
    "diabetes": {"data": "diabetes"},
    "concrete": {"data": "modeldata/concrete", "target": "compressive_strength"},
}
TABLES |= {"many rows": {}, "nothing, diabetes": TABLES["diabetes"], "nothing, concrete": TABLES["concrete"]}
METHODS = ("prm", "L1 linear", "forest, permuted", "lassonet")
Problem = tuple[np.ndarray, np.ndarray, np.ndarray, bool]


def problem(table: str, seed: int) -> Problem:
    """Return inputs, target, which columns may matter, and whether the target has classes."""
    if table == "sparse":
        prepared = Sparse().prepare(seed)
        x, y = (part.numpy() for part in prepared.training.all())
        return x, y, prepared.coefficients.numpy() != 0, False
    if table == "many rows":
        drawn = np.random.default_rng(seed)
        x = drawn.normal(size=(10_000, 1000))
        return x, x[:, :10].sum(1) + drawn.normal(size=len(x)) > 0, np.arange(1000) < 10, True
    columns = read_table(**TABLES[table])
    x = encode(columns.inputs, np.arange(len(columns.target)))
    rng = np.random.default_rng(seed)
    noise = [rng.permutation(x[:, rng.integers(x.shape[1])]) for _ in range(NOISE)]
    y = columns.target.to_numpy()
    matters = np.arange(x.shape[1] + NOISE) < x.shape[1]
    if table.startswith("nothing"):
        y, matters = rng.permutation(y), np.zeros_like(matters)
    return np.column_stack([x, *noise]), y, matters, columns.kind == CLASSIFICATION


def selected(method: str, x: np.ndarray, y: np.ndarray, classifies: bool, seed: int) -> np.ndarray:
    """Return which columns a method selects."""
    if method == "prm":
        kind = PRMClassifier if classifies else PRMRegressor
        return kind(random_state=seed).fit(x, y).selected_
    if method == "L1 linear":
        x = StandardScaler().fit_transform(x)
        model: Any = LassoCV(cv=5)
        if classifies:
            solver = "liblinear" if len(np.unique(y)) == 2 else "saga"  # which is slow, but takes more classes
            model = LogisticRegressionCV(penalty="l1", solver=solver, scoring="neg_log_loss", cv=5, max_iter=300)
        return (np.atleast_2d(model.fit(x, y).coef_) != 0).any(0)
    if method == "lassonet":
        import lassonet

        x = StandardScaler().fit_transform(x)
        target = y if classifies else ((y - y.mean()) / y.std()).reshape(-1, 1)
        model = (lassonet.LassoNetClassifierCV if classifies else lassonet.LassoNetRegressorCV)(random_state=seed)
        return model.fit(x.astype(np.float32), target).best_selected_.numpy()
    training, held_out = train_test_split(np.arange(len(y)), stratify=y if classifies else None, random_state=seed)
    forest = (RandomForestClassifier if classifies else RandomForestRegressor)(random_state=seed)
    forest.fit(x[training], y[training])
    found = permutation_importance(forest, x[held_out], y[held_out], n_repeats=5, random_state=seed)
    return found.importances_mean > 2 * found.importances_std


def run(tables: list[str], methods: list[str], seeds: int, out: Path) -> None:
    """Make what is missing."""
    records = Records(out)
    for seed in range(seeds):
        for table in tables:
            for method in methods:
                absent = method == "lassonet" and importlib.util.find_spec("lassonet") is None
                if absent or records.find(table=table, seed=seed, method=method):
                    continue
                x, y, may_matter, classifies = problem(table, seed)
                start, cpu = time.perf_counter(), time.process_time()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    chosen = np.asarray(selected(method, x, y, classifies, seed), dtype=bool)
                seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
                place = {"table": table, "seed": seed, "method": method, "seconds": seconds, "cpu_seconds": cpu}
                counts = {"found": int(chosen[may_matter].sum()), "of": int(may_matter.sum())}
                records.append(place | counts | {"wrong": int(chosen[~may_matter].sum())})
                records.save()
                print(records[-1], flush=True)


def report(out: Path) -> None:
    """Print a table."""
    print("| table | method | seeds | found, mean | of | say nothing, of the selected |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    records = Records(out)
    for table in TABLES:
        for method in METHODS:
            mine = [row for row in records if (row["table"], row["method"]) == (table, method)]
            if mine:
                found, wrong = (sum(row[name] for row in mine) for name in ("found", "wrong"))
                chosen = found + wrong
                share = f"{wrong / chosen:.0%} ({wrong} of {chosen})" if chosen else "none selected"
                print(f"| {table} | {method} | {len(mine)} | {found / len(mine):.1f} | {mine[0]['of']} | {share} |")


def main() -> None:
    """Run what is missing, or report what is there."""
    parser = argparse.ArgumentParser(description="How far the selection of columns can be trusted.")
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES), metavar="TABLE")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/tabular/selection.json"))
    args = parser.parse_args()
    if args.action == "run":
        torch.set_num_threads(1)
        run(args.tables, args.methods, args.seeds, args.out)
    else:
        report(args.out)


if __name__ == "__main__":
    main()
