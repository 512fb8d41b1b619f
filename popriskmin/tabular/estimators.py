"""`PRMClassifier` and `PRMRegressor`: networks for tables that leave out the columns which the data do not support."""

from __future__ import annotations

import numbers
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold, ShuffleSplit, StratifiedKFold, StratifiedShuffleSplit, check_cv
from sklearn.utils import check_consistent_length, check_random_state, column_or_1d, compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, _check_y, check_is_fitted, validate_data

from popriskmin.tabular.encoding import Encoder, check_column
from popriskmin.tabular.networks import Data, Part, Setting, Trained, train
from popriskmin.tabular.selection import Evidence, evidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike
    from sklearn.model_selection import BaseCrossValidator
    from sklearn.utils import Tags

SHRINKAGES = (0.0, 1.0, 1.5, 2.0, 3.0)
FOLDS, FEW_ROWS = 5, 1000  # up to so many rows are divided into folds, more into one part for training and one held out
HELD_OUT = 0.2


class _PRMEstimator(BaseEstimator):  # type: ignore[misc]
    """What both estimators have in common."""

    def __init__(
        self,
        *,
        shrinkage: float | str | Sequence[float] = "auto",
        learning_rates: Sequence[float] = (1e-2, 3e-2),
        hidden: int = 64,
        max_steps: int = 1000,
        batch_size: int | str = "auto",
        cv: int | str | BaseCrossValidator = "auto",
        n_networks: int = 5,
        refit: bool = False,
        device: str = "auto",
        verbose: int = 0,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.shrinkage = shrinkage
        self.learning_rates = learning_rates
        self.hidden = hidden
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.cv = cv
        self.n_networks = n_networks
        self.refit = refit
        self.device = device
        self.verbose = verbose
        self.random_state = random_state

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.non_deterministic = False
        return tags

    # Fitting.

    def _fit(self, frame: pd.DataFrame, y: np.ndarray, weight: np.ndarray, outputs: int) -> None:
        """Search, average and select; `y` holds codes of classes as int64 or scaled numbers as float32."""
        settings = self._settings()
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        generator = torch.Generator().manual_seed(seed)
        device = self._device()
        self._encoder = Encoder().fit(frame)
        x = self._encoder.transform(frame).astype(np.float32)
        data = Data(
            torch.as_tensor(x, device=device),
            torch.as_tensor(y, device=device),
            torch.as_tensor((weight / max(weight.mean(), 1e-300)).astype(np.float32), device=device),
            outputs,
        )
        parts = self._parts(x, y, weight, seed)
        size = self.batch_size if self.batch_size != "auto" else 32 if len(y) <= 4000 else 128
        args = (self.hidden, int(size))
        search = train(data, settings, parts, *args, self.max_steps, generator, self._progress("search"))
        self._report_interrupt(search)
        best = search.best()
        self.shrinkage_, self.learning_rate_ = best.shrinkage, best.learning_rate
        self.n_steps_ = search.best_step(best)
        self.best_score_ = -search.loss(best)
        networks = [w[search.settings.index(best)] for w in search.weights]
        kept = [w[: self.n_networks] for w in networks]
        more, their_parts = self._more(data, best, parts, args, generator) if not search.interrupted else ([], [])
        if more and self.refit:
            kept = more
        elif more:
            kept, networks = ([torch.cat(pair) for pair in zip(some, more)] for some in (kept, networks))
            parts = [*parts, *their_parts]
        self._weights = [w.cpu().numpy() for w in kept]
        found = evidence(networks, parts, data, self._encoder.sources, self.n_features_in_, generator)
        self._describe(search, found)

    def _more(
        self, data: Data, best: Setting, parts: list[Part], args: tuple[int, int], generator: torch.Generator
    ) -> tuple[list[torch.Tensor], list[Part]]:
        """Return the weights and parts of further networks of the best setting; with `refit`, of all, on all rows."""
        steps = self.max_steps
        missing = self.n_networks - len(parts)
        chosen = [parts[i % len(parts)] for i in range(missing)]
        if self.refit:
            everything = np.flatnonzero(data.weight.cpu().numpy() > 0)
            longer = len(everything) / np.mean([len(part.training) for part in parts])
            steps = round(self.n_steps_ * longer)
            chosen = [Part(everything, everything[:0])] * self.n_networks
            if steps == 0:  # nothing better than a constant was found
                return [], []
        if not chosen:
            return [], []
        trained = train(data, [best], chosen, *args, steps, generator, self._progress("networks"))
        self._report_interrupt(trained)
        if trained.interrupted and self.refit:
            return [], []
        return [w[0] for w in trained.weights], chosen

    def _settings(self) -> list[Setting]:
        """Return what is tried, having checked the options."""
        auto = isinstance(self.shrinkage, str) and self.shrinkage == "auto"
        shrinkages = SHRINKAGES if auto else _numbers("shrinkage", self.shrinkage, 0.0, 'be "auto" or numbers >= 0')
        rates = _numbers("learning_rates", self.learning_rates, 1e-12, "be numbers > 0")
        for name in ("hidden", "max_steps", "n_networks"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if not _is_count(self.batch_size) and not (isinstance(self.batch_size, str) and self.batch_size == "auto"):
            raise ValueError(f'batch_size must be "auto" or a whole number of at least 1, got {self.batch_size!r}')
        return [Setting(rate, shrinkage) for rate in rates for shrinkage in shrinkages]

    def _device(self) -> torch.device:
        if isinstance(self.device, str) and self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.zeros(1, device=device)
        except (AssertionError, RuntimeError, TypeError) as error:
            raise ValueError(
                f'device must be "auto" or a device of this torch, got {self.device!r}: {str(error).splitlines()[0]}'
            ) from error
        return device

    def _parts(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray, seed: int) -> list[Part]:
        """Return which rows are trained on and held out; rows of weight 0 are in none."""
        rows = np.flatnonzero(weight > 0)
        if len(rows) < 4:
            return [Part(rows, rows)]
        classes = np.issubdtype(y.dtype, np.integer)
        rarest = np.unique(y[rows], return_counts=True)[1].min() if classes else 0
        if isinstance(self.cv, str):
            if self.cv != "auto":
                raise ValueError(f'cv must be "auto", a number of folds or a splitter, got {self.cv!r}')
            folds = min(FOLDS, len(rows) // 2)
            if len(rows) <= FEW_ROWS:
                kind = StratifiedKFold if rarest >= folds else KFold
                splitter = kind(folds, shuffle=True, random_state=seed)
            else:
                shuffle = StratifiedShuffleSplit if rarest >= 2 and len(np.unique(y)) < HELD_OUT * len(rows) else None
                splitter = (shuffle or ShuffleSplit)(1, test_size=HELD_OUT, random_state=seed)
        else:
            # A splitter counts all rows; those of weight 0 are then left out.
            splitter = check_cv(self.cv, y, classifier=classes and rarest > 1)
            counted = weight > 0
            found = [Part(*(part[counted[part]] for part in pair)) for pair in splitter.split(x, y)]
            if any(len(part.training) == 0 or len(part.held_out) == 0 for part in found):
                raise ValueError(f"cv={self.cv!r} makes a part in which no row has a weight above 0")
            return found
        return [Part(rows[training], rows[held_out]) for training, held_out in splitter.split(x[rows], y[rows])]

    def _progress(self, name: str) -> Callable[[float], None]:
        def show(share: float) -> None:
            if self.verbose:
                bar = "#" * round(40 * share)
                print(
                    f"\r{name:8} [{bar:40}] {share:4.0%}", end="\n" if share >= 1 else "", file=sys.stderr, flush=True
                )

        return show

    def _report_interrupt(self, trained: Trained) -> None:
        if trained.interrupted:
            warnings.warn(
                f"interrupted after {trained.steps[-1]} of at most {self.max_steps} steps; the best so far is kept",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _describe(self, search: Trained, found: Evidence) -> None:
        """Set what is told of shrinkages and columns."""
        rows: dict[str, list[float]] = {"shrinkage": [], "loss": [], "n_columns": []}
        for shrinkage in sorted({setting.shrinkage for setting in search.curves}):
            best = min((s for s in search.curves if s.shrinkage == shrinkage), key=search.loss)
            going = min((s for s in search.settings if s.shrinkage == shrinkage), key=search.loss)
            rows["shrinkage"].append(shrinkage)
            rows["loss"].append(search.loss(best))
            rows["n_columns"].append(self._n_columns(search.weights[0][search.settings.index(going)]))
        self.path_ = {name: np.array(values) for name, values in rows.items()}
        self.p_values_, self.selected_ = found.p_value, found.selected
        rises = found.rise.clip(min=0)
        total = rises.sum()
        self.feature_importances_ = rises / total if total > 0 else rises

    def _n_columns(self, first: torch.Tensor) -> float:
        """Return the mean number of the table's columns that have weights in the first layers of several networks."""
        weighted = (first != 0).any(1).cpu().numpy()
        return float(np.mean([len(np.unique(self._encoder.sources[one])) for one in weighted]))

    # Data.

    def _table(self, X: ArrayLike, reset: bool) -> pd.DataFrame:  # noqa: N803 - scikit-learn's name
        """Return the inputs as a DataFrame of numbers and categories, checked."""
        if hasattr(X, "to_pandas") and not isinstance(X, pd.DataFrame):
            X = X.to_pandas()  # noqa: N806
        least = 2 if reset else 1
        if not isinstance(X, pd.DataFrame):
            X = validate_data(  # noqa: N806
                self, X, dtype="numeric", ensure_all_finite="allow-nan", ensure_min_samples=least, reset=reset
            )
            return pd.DataFrame(X)
        validate_data(self, X, skip_check_array=True, reset=reset)
        if len(X) < least:
            raise ValueError(
                f"Found array with {len(X)} sample(s) (shape={X.shape}) while a minimum of {least} is required by "
                f"{type(self).__name__}."
            )
        if X.shape[1] == 0:
            raise ValueError(f"Found array with 0 feature(s) (shape={X.shape}) while a minimum of 1 is required.")
        for i in range(X.shape[1]):
            check_column(X.iloc[:, i])
        return X

    def _answers(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """Return the answers of each network, of shape (networks, rows, outputs)."""
        check_is_fitted(self)
        x = self._encoder.transform(self._table(X, reset=False)).astype(np.float32)
        first, first_bias, second, second_bias = self._weights
        return np.stack(
            [np.maximum(x @ w.T + b, 0) @ v.T + c for w, b, v, c in zip(first, first_bias, second, second_bias)]
        ).astype(np.float64)

    # Pictures.

    def plot_path(self, ax: Axes | None = None) -> Axes:
        """Draw the held-out loss and the number of columns by shrinkage; needs matplotlib. Returns the axes."""
        from popriskmin.tabular.plots import path

        check_is_fitted(self)
        return path(self.path_, self.shrinkage_, ax)

    def plot_importances(self, most: int = 20, ax: Axes | None = None) -> Axes:
        """Draw the most important columns, the selected ones filled; needs matplotlib. Returns the axes."""
        from popriskmin.tabular.plots import importances

        check_is_fitted(self)
        names = getattr(self, "feature_names_in_", [f"column {i}" for i in range(self.n_features_in_)])
        return importances(self.feature_importances_, self.selected_, names, most, ax)


def _is_count(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def _numbers(name: str, given: ArrayLike, least: float, wanted: str) -> list[float]:
    """Return a number or several as a list, each once."""
    try:
        values = [float(value) for value in np.atleast_1d(given)]
    except (TypeError, ValueError):
        values = []
    if not values or not all(least <= value < np.inf for value in values):
        raise ValueError(f"{name} must {wanted}, got {given!r}")
    return list(dict.fromkeys(values))


_PARAMETERS = """
    The networks have one hidden layer. Those of all shrinkages, learning rates and parts of
    the data are trained side by side, with `popriskmin.PRM`, and measured on held-out rows.
    Those of the setting with the lowest mean loss, each at its best step, are averaged.

    Parameters
    ----------
    shrinkage
        How many standard errors of zero the mean gradient of a weight of the first layer must
        leave for the weight to leave zero (`shrinkage` of `popriskmin.PRM`): a number or
        several. "auto" tries 0, 1, 1.5, 2 and 3.
    learning_rates
        Learning rates that are tried.
    hidden
        Units of the hidden layer.
    max_steps
        Optimizer steps at most.
    batch_size
        Rows in a batch. "auto": 32 up to 4,000 rows, else 128.
    cv
        What is held out: a number of folds or a splitter of scikit-learn. "auto": five folds
        up to 1,000 rows, else a fifth of the rows.
    n_networks
        How many networks are averaged: those of the search, and further ones from other starts.
    refit
        Whether the networks are trained anew on all rows, for as many passes as were best.
    device
        "auto" takes a GPU where torch finds one; else what torch calls it.
    verbose
        1 shows a progress bar.
    random_state
        What decides the parts, weights and batches: a number, a numpy RandomState or None."""

_ATTRIBUTES = """
    shrinkage_, learning_rate_, n_steps_, best_score_
        The chosen setting, the step of its lowest mean held-out loss, and that loss, negated.
    p_values_
        For each column of the table, how probable so large a rise of the held-out loss is by
        chance when the column is permuted, adjusted for the number of columns
        (Benjamini-Hochberg), shape (columns,); 1 where no network of the chosen setting has
        weights, and where `cv` holds rows out one by one.
    selected_
        Which columns the data support, booleans of shape (columns,): those whose p-value is
        at most 0.05, so that about one in 20 of them may say nothing.
    feature_importances_
        The mean rises, as shares of their sum; below 0 they count as 0.
    path_
        For each shrinkage, the lowest held-out loss (`loss`) and in how many columns a network
        has weights then, on average (`n_columns`), as arrays under the names `shrinkage`, `loss`, `n_columns`."""


class PRMClassifier(ClassifierMixin, _PRMEstimator):  # type: ignore[misc]
    """Networks for the classes of a table's rows, which leave out columns that say nothing.

    [parameters]
    class_weight
        As in scikit-learn: None, "balanced" or a dict of weights.

    Attributes
    ----------
    classes_
        The classes.
    [attributes]

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True, as_frame=True)
    >>> model = PRMClassifier(random_state=0, max_steps=200).fit(X, y)
    >>> model.predict_proba(X[:2]).shape, bool(model.score(X, y) > 0.9)
    ((2, 3), True)
    """

    def __init__(
        self,
        *,
        shrinkage: float | str | Sequence[float] = "auto",
        learning_rates: Sequence[float] = (1e-2, 3e-2),
        hidden: int = 64,
        max_steps: int = 1000,
        batch_size: int | str = "auto",
        cv: int | str | BaseCrossValidator = "auto",
        n_networks: int = 5,
        refit: bool = False,
        class_weight: Mapping[object, float] | str | None = None,
        device: str = "auto",
        verbose: int = 0,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        super().__init__(
            shrinkage=shrinkage,
            learning_rates=learning_rates,
            hidden=hidden,
            max_steps=max_steps,
            batch_size=batch_size,
            cv=cv,
            n_networks=n_networks,
            refit=refit,
            device=device,
            verbose=verbose,
            random_state=random_state,
        )
        self.class_weight = class_weight

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> PRMClassifier:  # noqa: N803
        """Search, and train; `X` is a DataFrame of numbers and categories or an array of numbers, `y` are classes.

        Raises
        ------
        ValueError
            With scikit-learn's messages for data that does not fit, and for columns of which it is not clear what
            they mean: dates, and text that means numbers.
        """
        frame = self._table(X, reset=True)
        y = _column(y, frame)
        check_classification_targets(y)
        weight = _check_sample_weight(sample_weight, frame, ensure_non_negative=True, dtype=np.float64)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if self.class_weight is not None:
            weight = weight * compute_class_weight(self.class_weight, classes=self.classes_, y=y)[codes]
        self._fit(frame, codes.astype(np.int64), weight, len(self.classes_))
        return self

    def predict_proba(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """Return the mean probability of each class over the networks, of shape (rows, classes)."""
        found = self._answers(X)
        found = np.exp(found - found.max(2, keepdims=True))
        probabilities: np.ndarray = (found / found.sum(2, keepdims=True)).mean(0)
        return probabilities

    def predict_log_proba(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """Return the logarithms of `predict_proba`."""
        logarithms: np.ndarray = np.log(self.predict_proba(X))
        return logarithms

    def predict(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """Return the most probable class of each row."""
        places = self.predict_proba(X).argmax(1)
        predicted: np.ndarray = self.classes_[places]
        return predicted


class PRMRegressor(RegressorMixin, _PRMEstimator):  # type: ignore[misc]
    """Networks for a number that depends on a table's columns, which leave out those that say nothing.

    The target is scaled while training, so that losses are in units of its variance.
    [parameters]

    Attributes
    ----------
    [attributes]

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True, as_frame=True)
    >>> model = PRMRegressor(random_state=0, max_steps=200).fit(X, y)
    >>> model.predict(X[:2]).shape, bool(model.score(X, y) > 0.4)
    ((2,), True)
    """

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> PRMRegressor:  # noqa: N803
        """Search, and train; `X` is a DataFrame of numbers and categories or an array of numbers, `y` are numbers.

        Raises
        ------
        ValueError
            With scikit-learn's messages for data that does not fit, and for columns of which it is not clear what
            they mean: dates, and text that means numbers.
        """
        frame = self._table(X, reset=True)
        y = _column(y, frame, are_numbers=True)
        weight = _check_sample_weight(sample_weight, frame, ensure_non_negative=True, dtype=np.float64)
        with np.errstate(over="ignore"):
            if np.isinf(np.square(y).sum()):
                raise ValueError(f"y holds {y[np.abs(y).argmax()]:.10g}: its variance is not finite")
        self._mean = float(np.average(y, weights=weight)) if weight.sum() > 0 else float(y.mean())
        spread = float(np.sqrt(np.average((y - self._mean) ** 2, weights=weight))) if weight.sum() > 0 else 0.0
        self._scale = spread if spread > 0 else 1.0
        self._fit(frame, ((y - self._mean) / self._scale).astype(np.float32), weight, 1)
        return self

    def predict(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """Return the mean answer of the networks for each row."""
        predicted = np.asarray(self._answers(X)[..., 0].mean(0), dtype=np.float64) * self._scale + self._mean
        return predicted


def _column(y: ArrayLike, frame: pd.DataFrame, are_numbers: bool = False) -> np.ndarray:
    """Return the target as an array with scikit-learn's checks."""
    if y is None:
        raise ValueError("This estimator requires y to be passed, but the target y is None.")
    y = _check_y(y, y_numeric=True, estimator=None) if are_numbers else column_or_1d(y, warn=True)
    if not are_numbers:
        if pd.isna(y).any():
            raise ValueError("Input y contains missing values.")
        _check_y(y, estimator=None)
    check_consistent_length(frame, y)
    return np.asarray(y, dtype=np.float64 if are_numbers else None)


for _kind in (PRMClassifier, PRMRegressor):  # what they share is written once
    _text = (_kind.__doc__ or "").replace("[parameters]", _PARAMETERS.strip())
    _kind.__doc__ = _text.replace("[attributes]", _ATTRIBUTES.strip())
