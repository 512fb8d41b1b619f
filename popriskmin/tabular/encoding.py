"""Numbers of a table's columns: scaled numbers, a column for each category, and flags of what is missing."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.feature_selection import VarianceThreshold
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

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
        """Learn medians, means and categories from all rows of `inputs`."""
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
        self.columns.fit(self._typed(inputs))
        self.sources = self._sources()
        return self

    def transform(self, inputs: pd.DataFrame) -> np.ndarray:
        """Return numbers of shape (rows, columns), float64."""
        if not (self.numbers or self.others):
            return np.zeros((len(inputs), 0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of categories that no training row has: they count as rare
            encoded: np.ndarray = self.columns.transform(self._typed(inputs))
        return encoded

    def _typed(self, inputs: pd.DataFrame) -> pd.DataFrame:
        """Return numbers as float64 and all else as text, under names by place, which are unique."""
        made: dict[str, Any] = {}
        for i in self.numbers:
            made[str(i)] = inputs.iloc[:, i].to_numpy(dtype="float64", na_value=np.nan)
        for i in self.others:
            column = inputs.iloc[:, i].astype("object")
            made[str(i)] = column.where(column.notna(), "missing").map(str).to_numpy(dtype="object")
        return pd.DataFrame(made)

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
