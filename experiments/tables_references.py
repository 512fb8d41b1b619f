"""Learners that are no networks, tuned as an arm of the study is: fifteen configurations, one chosen for all seeds.

Boosted trees are LightGBM's (`pip install lightgbm`), with as many rounds as the validation data ask for, up to
`ROUNDS`; the others are scikit-learn's. The linear models of one ratio are fitted from the strongest penalty to the
weakest, each from the one before.
"""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from popriskmin.tasks.table import Table, sparse_linear

Part = tuple[np.ndarray, np.ndarray]
Fitted = Iterator[tuple[str, Any]]  # the name of a configuration, and a model that is read before the next is made

ROUNDS, PATIENCE = 1000, 50
SHAPES = ((31, 20, 1.0), (8, 5, 1.0), (31, 20, 0.3), (8, 5, 0.3), (4, 5, 0.3))
BOOSTED = tuple(itertools.product((0.03, 0.06, 0.12), SHAPES))
FOREST_TREES = 100
FOREST = tuple(itertools.product(("sqrt", 0.1, 0.25, 0.5, 1.0), (1, 3, 10)))
PENALTIES = tuple(np.geomspace(1.0, 1e-4, 15))  # on top of the mean loss of a row
ELASTIC = ((0.1, 0.5, 0.9), tuple(np.geomspace(0.3, 1e-3, 5)))


def boosted(training: Part, validation: Part, classifies: bool, seed: int) -> Fitted:
    """Yield boosted trees by learning rate, leaves of a tree, fewest rows of a leaf, and share of columns of a tree."""
    lightgbm = importlib.import_module("lightgbm")
    kind = lightgbm.LGBMClassifier if classifies else lightgbm.LGBMRegressor
    for rate, (leaves, fewest, share) in BOOSTED:
        model = kind(n_estimators=ROUNDS, learning_rate=rate, num_leaves=leaves, min_child_samples=fewest,
                     colsample_bytree=share, random_state=seed, n_jobs=1, verbose=-1)  # fmt: skip
        stop = lightgbm.early_stopping(PATIENCE, verbose=False)
        yield f"{rate:g} {leaves} {fewest} {share:g}", model.fit(*training, eval_set=[validation], callbacks=[stop])


def forests(training: Part, validation: Part, classifies: bool, seed: int) -> Fitted:
    """Yield random forests by the columns that a split may use and the fewest rows of a leaf."""
    kind = RandomForestClassifier if classifies else RandomForestRegressor
    for columns, fewest in FOREST:
        model = kind(FOREST_TREES, max_features=columns, min_samples_leaf=fewest, random_state=seed)
        yield f"{columns} {fewest}", model.fit(*training)


def linear(ratios: Sequence[float], penalties: Sequence[float], training: Part, classifies: bool, seed: int) -> Fitted:
    """Yield linear models by the share of L1 in the penalty and the penalty."""
    for ratio in ratios:
        model = None
        for penalty in penalties:
            wanted = sparse_linear(penalty, classifies, len(training[1]), seed, ratio).set_params(warm_start=True)
            model = wanted if model is None else model.set_params(**wanted.get_params())
            yield f"{ratio:g} {penalty:.2g}", model.fit(*training)


LEARNERS: dict[str, Callable[[Part, Part, bool, int], Fitted]] = {
    "boosted trees, tuned": boosted,
    "L1 linear model, tuned": lambda training, _, *how: linear((1.0,), PENALTIES, training, *how),
    "elastic net, tuned": lambda training, _, *how: linear(*ELASTIC, training, *how),
    "forest, tuned": forests,
}


def tuned(name: str, task: Table, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the losses of a learner's whole grid on validation and test data, in the form of an arm's."""
    found: dict[str, list[list[list[float]]]] = {}
    columns = []
    for seed in seeds:
        prepared = task.prepare(seed)
        training, validation, test = ((x.numpy().astype(np.float64), y.numpy()) for x, y in prepared[:3])
        columns.append(training[0].shape[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of models that ran out of passes, and of the penalty's name
            for configuration, model in LEARNERS[name](training, validation, prepared.classifies, seed):
                parts = found.setdefault(configuration, [[], []])
                for values, part in zip(parts, (validation, test)):
                    values.append([float(f"{value:.5g}") for value in prepared.judge(model, *part).values()])
    return {
        "rows": len(training[1]),
        "columns": columns,
        "configurations": {
            # By part, then by metric, then by seed.
            name: {"best": [[list(metric) for metric in zip(*part)] for part in parts]}
            for name, parts in found.items()
        },
    }
