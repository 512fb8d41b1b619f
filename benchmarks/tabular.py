"""Time, memory and loss of `PRMClassifier` and `PRMRegressor` at their defaults, beside other learners at theirs.

    pip install lassonet pytabkit lightgbm           # those that are missing are left out, and said so
    python benchmarks/tabular.py run                 # resumes after a kill; --tables, --methods, --seeds for a part
    python benchmarks/tabular.py speed               # 500 x 500 and 10,000 x 1,000, of PRM alone
    python benchmarks/tabular.py report

Three quarters of a table's rows, at most 1,000, are for training, the rest for the test; the tables with columns that
say nothing have the rows of their study. Each fit is a process of its own, so that its memory is its own; seconds are
those of `fit` and `predict`, and a process ends after so many of the processor's as `--limit` says. The loss is the
cross entropy in nats, of a number the squared error over the variance among the training rows.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.append(str(Path(__file__).parent.parent / "experiments"))
from studies import Records

# Written down before anything was trained on them with these estimators. The odd ones were looked at while the
# estimators were made, the even ones are set aside for the last run. All but the narrow ones have more columns than
# rows for training, once categories are columns, where need be by taking few rows.
WIDE: dict[str, dict[str, Any]] = {
    "pd_speech": {"data": "modeldata/pd_speech", "target": "class"},
    "permeability_qsar": {"data": "modeldata/permeability_qsar", "target": "permeability"},
    "hepatic_injury_qsar": {"data": "modeldata/hepatic_injury_qsar", "target": "class"},
    "tissue": {"data": "dslabs/tissue_gene_expression", "target": "y"},
    "ad_data": {"data": "modeldata/ad_data", "target": "Class", "rows": 140},
    "pbmc68k": {"made": "pbmc68k"},
    "fine_foods": {"made": "fine_foods", "rows": 500},
    "meats": {"data": "modeldata/meats", "target": "fat", "drop": "water,protein", "rows": 120},
    "hepatic, few rows": {"data": "modeldata/hepatic_injury_qsar", "target": "class", "rows": 120},
    "caravan, few rows": {"data": "ISLR/Caravan", "target": "Purchase", "rows": 110},
}
NARROW: dict[str, dict[str, Any]] = {
    "wine": {"data": "wine"},
    "breast_cancer": {"data": "breast_cancer"},
    "diabetes": {"data": "diabetes"},
    "cells": {"data": "modeldata/cells", "target": "class", "drop": "case"},
    "concrete": {"data": "modeldata/concrete", "target": "compressive_strength"},
    "credit_data": {"data": "modeldata/credit_data", "target": "Status"},
}
# Tables of `experiments/tables.py` with columns that say nothing; its rows for validation are for training here.
PROBED: dict[str, dict[str, Any]] = {
    f"{name} + 500": {"study": name, "probes": 500}
    for name in ("breast_cancer", "wine", "cells", "diabetes", "hitters", "iris", "concrete", "leaf_id_flavia")
}
TABLES = WIDE | NARROW | PROBED
SET_ASIDE = [*list(WIDE)[1::2], *list(NARROW)[1::2]]
METHODS = ("prm", "boosted trees", "lightgbm", "L1 linear", "tabm", "realmlp", "lassonet")
TITLES = {"prm": "PRM", "lightgbm": "LightGBM", "tabm": "TabM", "realmlp": "RealMLP", "lassonet": "LassoNet"}
NEEDS = {"lightgbm": "lightgbm", "realmlp": "pytabkit", "tabm": "pytabkit", "lassonet": "lassonet"}
MOST_ROWS = 1000  # for training
SIZES = ((500, 500), (10_000, 1000))
Losses = dict[tuple[str, str], dict[int, float]]  # by table and method, then by seed


def model_of(method: str, classes: int, seed: int) -> Any:
    """Return a learner at its defaults; `classes` is 0 where the target is a number."""
    classifies = classes > 0
    if method == "prm":
        from popriskmin.tabular import PRMClassifier, PRMRegressor

        return (PRMClassifier if classifies else PRMRegressor)(random_state=seed)
    if method == "boosted trees":
        from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

        return (HistGradientBoostingClassifier if classifies else HistGradientBoostingRegressor)(random_state=seed)
    if method == "L1 linear":
        from sklearn.linear_model import LassoCV, LogisticRegressionCV

        if classifies:
            solver = "liblinear" if classes == 2 else "saga"  # which is slow, but takes more classes
            return LogisticRegressionCV(
                penalty="l1", solver=solver, scoring="neg_log_loss", cv=5, max_iter=300, random_state=seed
            )
        return LassoCV(cv=5, random_state=seed)
    if method == "lightgbm":
        import lightgbm

        return (lightgbm.LGBMClassifier if classifies else lightgbm.LGBMRegressor)(random_state=seed, verbose=-1)
    if method == "lassonet":
        import lassonet

        return (lassonet.LassoNetClassifierCV if classifies else lassonet.LassoNetRegressorCV)(random_state=seed)
    import pytabkit

    kind = ("RealMLP_TD_" if method == "realmlp" else "TabM_D_") + ("Classifier" if classifies else "Regressor")
    return getattr(pytabkit, kind)(random_state=seed, device="cpu", verbosity=0)


def divide(table: str, seed: int) -> tuple[Any, ...]:
    """Return inputs and target for training and test, and whether they are classes."""
    from sklearn.model_selection import train_test_split

    from popriskmin.tasks.table_data import CLASSIFICATION, read_table

    options = dict(TABLES[table])
    if study := options.pop("study", None):
        from tables_data import make_task

        prepared = make_task(study, options["probes"], Path("runs/tables")).prepare(seed)
        training, validation, test = ([part.numpy() for part in pair] for pair in prepared[:3])
        x, y = (np.concatenate(parts) for parts in zip(training, validation))
        return pd.DataFrame(x), y, pd.DataFrame(test[0]), test[1], prepared.classifies
    rows = options.pop("rows", round(MOST_ROWS / 0.75))
    if made := options.pop("made", None):
        from tables_data import make_task

        columns = make_task(made, 0, Path("runs/tables")).columns
    else:
        columns = read_table(**options)
    x, y = columns.inputs, columns.target.to_numpy()
    classifies = columns.kind == CLASSIFICATION
    number = np.arange(len(y))
    if rows < len(y):
        number, _ = train_test_split(number, train_size=rows, stratify=y if classifies else None, random_state=seed)
    parts = train_test_split(
        number, test_size=0.25, stratify=y[number] if classifies else None, random_state=seed + 1000
    )
    (training, test) = parts
    return x.iloc[training], y[training], x.iloc[test], y[test], classifies


def fit(table: str, seed: int, method: str) -> dict[str, Any]:
    """Train and measure once."""
    from popriskmin.tabular.encoding import Encoder

    warnings.simplefilter("ignore")
    x, y, x_test, y_test, classifies = divide(table, seed)
    encoder = Encoder().fit(x)
    numbers = [encoder.transform(part).astype(np.float32) for part in (x, x_test)]
    shape = [len(y), numbers[0].shape[1]]
    if method != "prm":
        x, x_test = numbers
    model = model_of(method, len(np.unique(y)) if classifies else 0, seed)
    target = y if classifies else (y - y.mean()) / y.std()
    start, cpu = time.perf_counter(), time.process_time()
    if method == "lassonet" and not classifies:
        target = target.astype(np.float32).reshape(-1, 1)
    model.fit(x, target)
    if classifies:
        p = np.clip(np.asarray(model.predict_proba(x_test), dtype=np.float64), 1e-7, 1)
        loss = -np.log(p[np.arange(len(y_test)), y_test]).mean()
    else:
        answer = np.asarray(model.predict(x_test), dtype=np.float64).reshape(-1)
        loss = np.square(answer - (y_test - y.mean()) / y.std()).mean()
    seconds, cpu = (round(now - then, 2) for now, then in ((time.perf_counter(), start), (time.process_time(), cpu)))
    found = {"loss": float(loss), "seconds": seconds, "cpu_seconds": cpu, "gigabytes": round(_peak(), 2)}
    found["shape"] = shape
    if method == "prm":
        found |= {"shrinkage": model.shrinkage_, "selected": int(model.selected_.sum())}
    return found


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def speed(rows: int, columns: int) -> dict[str, Any]:
    """Time PRMClassifier on two classes that depend on ten of the columns."""
    import torch

    from popriskmin.tabular import PRMClassifier

    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, columns))
    y = x[:, :10].sum(1) + rng.normal(size=rows) > 0
    start, cpu = time.perf_counter(), time.process_time()
    model = PRMClassifier(random_state=0).fit(x, y)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "rows": rows,
        "columns": columns,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "gigabytes": round(_peak(), 2),
        "selected": int(model.selected_.sum()),
        "of_ten": int(model.selected_[:10].sum()),
    }


def run(args: argparse.Namespace) -> None:
    """Make what is missing, a process for each."""
    records = Records(args.out / "results.json")
    for method in args.methods:
        if method in NEEDS and importlib.util.find_spec(NEEDS[method]) is None:
            print(f"{method} is left out: pip install {NEEDS[method]}", flush=True)
    for seed in range(args.seeds):
        for table in args.tables:
            for method in args.methods:
                absent = method in NEEDS and importlib.util.find_spec(NEEDS[method]) is None
                there = records.find(table=table, seed=seed, method=method)
                if there is not None and there.get("limit", args.limit) < args.limit:
                    records.remove(there)  # it was stopped, and may take longer now
                    there = None
                if absent or there is not None:
                    continue
                found = _child(["one", "--tables", table, "--seeds", str(seed), "--methods", method], args)
                records.append({"table": table, "seed": seed, "method": method, "threads": args.threads} | found)
                records.save()
                print(records[-1], flush=True)


def _child(words: list[str], args: argparse.Namespace) -> dict[str, Any]:
    words = [*words, "--limit", str(args.limit)]
    environment = os.environ | {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(  # noqa: S603 - this file, with words of its own
        [sys.executable, __file__, *words], capture_output=True, text=True, env=environment
    )
    if done.returncode == -signal.SIGXCPU:
        return {"error": f"took more than {args.limit} s of cpu", "limit": args.limit}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else str(done.returncode)}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def report(folder: Path) -> None:
    """Write and print the mean losses, and how PRM stands to each of the others."""
    rows = [row for row in Records(folder / "results.json") if "loss" in row]
    found: Losses = {}
    for row in rows:
        found.setdefault((row["table"], row["method"]), {})[row["seed"]] = row["loss"]
    shapes = {row["table"]: " x ".join(map(str, row["shape"])) for row in reversed(rows)}  # of the first seed
    methods = [method for method in METHODS if any(at[1] == method for at in found)]
    with (folder / "how-it-compares.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["table", "shape", *(TITLES.get(method, method) for method in methods)])
        writer.writerows([table, shapes[table], *cells(table, methods, found)] for table in TABLES if table in shapes)
    print((folder / "how-it-compares.csv").read_text())
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        print(f"{method}: {np.mean([row['cpu_seconds'] for row in mine]):.3g} s of cpu, mean of {len(mine)} fits")
        if method != "prm":
            print(f"  {against(method, found)}")


def cells(table: str, methods: Sequence[str], found: Losses) -> Iterator[str]:
    """Yield the mean loss of each method, the lowest of those with most seeds in bold, others with theirs."""
    mine = {method: list(found[table, method].values()) for method in methods if (table, method) in found}
    means = {method: np.mean(values) for method, values in mine.items()}
    most = max(map(len, mine.values()))
    lowest = min(means[method] for method, values in mine.items() if len(values) == most)
    for method in methods:
        if method not in mine:
            yield ""
        elif len(mine[method]) < most:
            yield f"{means[method]:.3g} ({len(mine[method])})"
        else:
            yield f"**{means[method]:.3g}**" if means[method] == lowest else f"{means[method]:.3g}"


def against(rival: str, found: Losses) -> str:
    """Return how PRM stands to another method, on the wide tables and on those with columns that say nothing."""
    found_by = {"wide tables": WIDE, "tables with 500 columns that say nothing": PROBED}
    return "; ".join(part for name, tables in found_by.items() for part in standing(rival, name, list(tables), found))


def standing(rival: str, title: str, tables: Sequence[str], found: Losses) -> list[str]:
    """Return the mean losses of PRM and another method and the verdicts, by the seeds that both have."""
    from one_default import verdict  # not above, where every process that is measured would load it

    from popriskmin.compare.report.statistics import FEWEST_SEEDS

    means, verdicts = {}, []
    for table in tables:
        ours, theirs = found.get((table, "prm"), {}), found.get((table, rival), {})
        both = ours.keys() & theirs.keys()
        if both:
            means[table] = [np.mean([losses[seed] for seed in both]) for losses in (ours, theirs)]
        if len(both) >= FEWEST_SEEDS:
            verdicts.append(verdict(ours, theirs, "min"))
    said = []
    for name, some in ((title, list(means)), ("of them set aside", [one for one in means if one in SET_ASIDE])):
        if some:
            prm, other = np.mean([means[one] for one in some], axis=0)
            said.append(f"{len(some)} {name}: mean loss of prm {prm:.3f}, of {rival} {other:.3f}")
    if verdicts:
        counts = ", ".join(f"{word} on {verdicts.count(word)}" for word in ("better", "unclear", "worse"))
        said.append(f"of {len(verdicts)} with {FEWEST_SEEDS} seeds prm is clearly {counts}")
    return said


def main() -> None:
    """Run what is missing, or report what is there."""
    parser = argparse.ArgumentParser(description="PRM's estimators beside others, each at its defaults.")
    parser.add_argument("action", choices=("run", "speed", "report", "one"))
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES), metavar="TABLE")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=5, help="how many; of one, which")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, default=300, help="seconds of the processor that a fit may take")
    parser.add_argument("--out", type=Path, default=Path("docs/results/tabular"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.action == "one":
        resource.setrlimit(resource.RLIMIT_CPU, (args.limit, args.limit + 10))
        print(json.dumps(fit(args.tables[0], args.seeds, args.methods[0])))
    elif args.action == "run":
        run(args)
    elif args.action == "speed":
        records = Records(args.out / "speed.json")
        for size in SIZES:
            records.append(speed(*size))
            records.save()
            print(records[-1], flush=True)
    else:
        report(args.out)


if __name__ == "__main__":
    main()
