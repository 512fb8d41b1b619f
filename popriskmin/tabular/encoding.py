"""Numbers of a table's columns: scaled numbers, a column for each category, and flags of what is missing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.api import types
from sklearn.compose import ColumnTransformer
from sklearn.feature_selection import VarianceThreshold
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from popriskmin.tabular.numbers import read_numbers

MOST_CATEGORIES = 20  # of one column; the rarest share a column of their own
FARTHEST = 5.0  # standard deviations: one value farther off would move a network more than all others


class Encoder:
    """What makes numbers of a table's columns, learnt from the rows that it is fitted to.

    Numbers are centred and scaled to variance 1, and cut five standard deviations from the mean; a missing one becomes
    the median, and a further column says so. A category becomes a column for each of its values, missing as one of
    them; the rarest of more than 20 share a column. What does not vary among the rows is left out.

    Attributes
    ----------
    sources
        After `fit`: for each column of numbers the place of the table's column that it was made of.

    Examples
    --------
    >>> table = pd.DataFrame({"age": [20.0, 40.0, None], "town": ["Ulm", "Graz", "Bern"]})
    >>> encoder = Encoder().fit(table)
    >>> encoder.transform(table).shape, encoder.sources.tolist()
    ((3, 5), [0, 0, 1, 1, 1])
    """

    def fit(self, inputs: pd.DataFrame) -> Encoder:
        """Learn medians, means and categories from all rows of `inputs`.

        Raises
        ------
        ValueError
            For numbers so large that their variance is not finite.
        """
        self.names = list(inputs.columns)
        numbers = [i for i, name in enumerate(self.names) if is_number(inputs.iloc[:, i])]
        self.numbers = [i for i in numbers if inputs.iloc[:, i].nunique(dropna=False) > 1]
        self.others = [i for i in range(len(self.names)) if i not in set(numbers)]
        self.sources: np.ndarray = np.zeros(0, dtype=np.int64)
        if not (self.numbers or self.others):
            return self
        scale = make_pipeline(
            SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True),
            VarianceThreshold(),
            StandardScaler(),
            FunctionTransformer(np.clip, kw_args={"a_min": -FARTHEST, "a_max": FARTHEST}),
        )
        categories = OneHotEncoder(
            drop="if_binary", max_categories=MOST_CATEGORIES, handle_unknown="infrequent_if_exist", sparse_output=False
        )
        self.columns = ColumnTransformer(
            [("numbers", scale, _in_order(self.numbers)), ("categories", categories, _in_order(self.others))]
        )
        typed = self._typed(inputs)
        _check_sizes(typed, self.names)
        self.columns.fit(typed)
        self.sources = self._sources()
        return self

    def transform(self, inputs: pd.DataFrame) -> np.ndarray:
        """Return numbers of shape (rows, columns), float64.

        Raises
        ------
        ValueError
            Where a column of numbers now holds text, or a column of text now holds numbers that were no categories.
        """
        if not (self.numbers or self.others):
            return np.zeros((len(inputs), 0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of categories that no training row has: they count as rare
            encoded: np.ndarray = self.columns.transform(self._typed(inputs))
        return encoded

    def _typed(self, inputs: pd.DataFrame) -> pd.DataFrame:
        """Return numbers as float64 and all else as text, under names by place, which are unique."""
        made: dict[str, np.ndarray] = {}
        for i in self.numbers:
            column = inputs.iloc[:, i]
            try:
                made[str(i)] = column.to_numpy(dtype="float64", na_value=np.nan)
            except (TypeError, ValueError) as error:
                raise ValueError(f"the column {self.names[i]!r} held numbers in fit, not so now: {error}") from error
        for i in self.others:
            column = inputs.iloc[:, i].astype("object")
            made[str(i)] = column.where(column.notna(), "missing").map(str).to_numpy(dtype="object")
            if is_number(inputs.iloc[:, i]) and column.notna().any() and not self._has_known(i, made[str(i)]):
                raise ValueError(f"the column {self.names[i]!r} held text in fit, now numbers: {made[str(i)][0]!r}")
        return pd.DataFrame(made)

    def _has_known(self, place: int, values: np.ndarray) -> bool:
        known = self.columns.named_transformers_["categories"].categories_[self.others.index(place)]
        return bool(np.isin(values[values != "missing"], known).any())

    def _sources(self) -> np.ndarray:
        scale, categories = (self.columns.named_transformers_[name] for name in ("numbers", "categories"))
        sources: list[int] = []
        if self.numbers:
            imputer, varying = scale[0], scale[1]
            flagged = imputer.indicator_.features_
            kept = varying.get_support()
            sources += np.array([*self.numbers, *[self.numbers[i] for i in flagged]])[kept].tolist()
        if self.others:
            for i, name in enumerate(self.others):
                dropped = categories.drop_idx_ is not None and categories.drop_idx_[i] is not None
                infrequent = categories.infrequent_categories_[i]
                rare = 0 if infrequent is None else len(infrequent) - 1
                sources += [name] * (len(categories.categories_[i]) - rare - dropped)
        return np.array(sources, dtype=np.int64)


def _check_sizes(typed: pd.DataFrame, names: Sequence[Any]) -> None:
    numbers = typed.select_dtypes("float64")
    with np.errstate(over="ignore", invalid="ignore"):
        sizes = np.square(numbers.abs().max()) * len(typed)
    for place in sizes.index[np.isinf(sizes)]:
        value = typed[place].iloc[int(np.nanargmax(typed[place].abs()))]
        raise ValueError(f"the column {names[int(place)]!r} holds {value:.10g}: its variance is not finite")


def _in_order(places: list[int]) -> list[str]:
    return [str(i) for i in places]


def is_number(column: pd.Series) -> bool:
    """Return whether a column counts as numbers; yes and no do."""
    return bool(pd.api.types.is_numeric_dtype(column))


def encode(inputs: pd.DataFrame, training: np.ndarray) -> np.ndarray:
    """Return the inputs as numbers, of shape (rows, columns), by what the rows `training` say; see `Encoder`.

    Parameters
    ----------
    inputs
        A table of numbers, categories and missing values.
    training
        Numbers of the rows from which medians, means and categories are taken.
    """
    return Encoder().fit(inputs.iloc[training]).transform(inputs)


def check_column(column: pd.Series) -> None:
    """Raise ValueError for a column of which it is not clear what it would mean to a network."""
    if types.is_datetime64_any_dtype(column) or types.is_timedelta64_dtype(column):
        raise ValueError(f"the column {column.name!r} holds dates or times: replace it by numbers such as an age")
    if types.is_complex_dtype(column):
        raise ValueError(f"Complex data not supported: the column {column.name!r}")
    if is_number(column):
        if np.isinf(column.to_numpy(dtype="float64", na_value=np.nan)).any():
            raise ValueError(f"Input X contains infinity, in the column {column.name!r}.")
        return
    if types.is_object_dtype(column):
        for value in column:
            if isinstance(value, (list, tuple, set, dict, np.ndarray, bytes, bytearray)):
                raise ValueError(
                    f"the column {column.name!r} holds {type(value).__name__} objects ({str(value)[:40]}): leave it "
                    "out, or make a column of numbers for each of their parts"
                )
    if not isinstance(column.dtype, pd.CategoricalDtype) and read_numbers(column) is not None:
        raise ValueError(
            f"the column {column.name!r} holds text that means numbers ({column.dropna().iloc[0]!r}): replace it by "
            "popriskmin.tabular.read_numbers(column).values"
        )
