"""Reading a file as the table that was meant: separators, names, lines of other lengths, and what is no table.

A program that guesses reads almost any file, some of them wrongly and without a word: a comma at each line's end makes
pandas take the first column for an index, so that every name stands over its neighbour's values. Here each such file
is read as it was meant where there is one way to mean it, and refused with the line at fault where there is none.
"""

from __future__ import annotations

import collections
import csv
import gzip
import importlib.util
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

FILES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".parquet", ".pq")
SEPARATORS = ("\t", ";", "|", ",")  # of two that fit alike the earlier one: commas are common within values
NAMES = {"\t": "tab", ";": "semicolon", "|": "pipe", ",": "comma"}
LOOKED_AT = 100  # rows from which the separator is found


class File(NamedTuple):
    """A table as a file holds it.

    Attributes
    ----------
    frame
        The columns, names without surrounding spaces.
    notes
        One line for each thing that a reader should know.
    repeated
        Names that the file gives to several columns; all but the first have a number behind the name here.
    """

    frame: pd.DataFrame
    notes: tuple[str, ...] = ()
    repeated: frozenset[str] = frozenset()


def read_file(path: Path) -> File:
    """Read a CSV or parquet file.

    Only an empty field is missing: `NA`, `None` or `?` may be the name of a class, and what they are in a column of
    numbers is decided where the columns are known (`popriskmin.tabular.numbers`).

    Parameters
    ----------
    path
        A parquet file (.parquet, .pq), or a CSV file in UTF-8 or UTF-16, gzipped where it ends in .gz, whose first
        line names the columns. Commas, semicolons, tabs or pipes separate values; a first line such as `sep=;` says
        which.

    Raises
    ------
    ValueError
        For a file that is not there or no table, lines that have more values than the header has names, and a quote
        that is not closed.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    parquet = path.suffix.lower() in (".parquet", ".pq")
    if parquet and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"reading {path} needs the package pyarrow: pip install pyarrow")
    try:
        return File(pd.read_parquet(path)) if parquet else _read_csv(_text_of(path))
    except (OSError, ValueError, EOFError, zlib.error, csv.Error) as error:  # pandas's and pyarrow's are among them
        raise ValueError(f"{path} cannot be read as {'parquet' if parquet else 'CSV'}: {error}") from error


def _text_of(path: Path) -> str:
    content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    if content[:4] == b"PK\x03\x04":
        raise ValueError("it is an Excel workbook or a zip archive; save the table as CSV")
    if content[:2] == b"\x1f\x8b":
        raise ValueError("it is gzipped; give it a name that ends in .gz")
    if not content.strip():
        raise ValueError("it is empty")
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line} is not {encoding[:-4] if encoding.endswith('-sig') else encoding}: save it as UTF-8, as "
            f"iconv -f latin1 -t utf-8 does with a file in Latin-1 ({error})"
        ) from error


def _read_csv(text: str) -> File:
    first, _, rest = text.partition("\n")
    told = first.strip().strip('"').lower()
    separator = None
    if told.startswith("sep=") and len(told) <= 5:
        separator, text = first.strip().strip('"')[4:] or "\t", rest
    separator = separator or find_separator(text)
    header, widths, ends_empty = _lines_of(text, separator)
    notes = []
    spare = 0
    longest = max(widths, default=len(header))
    if longest > len(header):
        if set(widths) == {len(header) + 1} and ends_empty:
            spare = 1
            notes.append(f"every line ends in a {NAMES.get(separator, separator)}, and nothing is read behind it")
        else:
            raise ValueError(_too_long(header, widths, longest))
    short = {width: line for width, line in widths.items() if width < len(header)}
    if short:
        notes.append(
            f"line {min(short.values())} has fewer values than the {len(header)} that the header names; what lines "
            "do not have is missing"
        )
    names, repeated = _names(header)
    if repeated:
        notes.append(f"several columns have one name ({', '.join(sorted(repeated))}); all but the first are numbered")
    if all(_is_number(name) for name in names):
        notes.append("the names of the columns are all numbers; if the file has no line of names, add one")
    frame = pd.read_csv(
        io.StringIO(text),
        sep=separator,
        header=0,
        names=[*names, *[f"behind the last {i}" for i in range(spare)]],
        index_col=False,
        keep_default_na=False,
        na_values=[""],
        skipinitialspace=True,
        low_memory=False,
    )
    return File(frame[names], tuple(notes), frozenset(repeated))


def find_separator(text: str) -> str:
    r"""Return the separator with which the first rows have as many values as the header has names.

    Examples
    --------
    >>> find_separator("Temp, C;Pressure, Pa\n1,5;2,5\n")
    ';'
    >>> find_separator('"a;b;c",d\n1,2\n')
    ','
    """
    found = {}
    for separator in SEPARATORS:
        rows = [row for _, row in zip(range(LOOKED_AT), _rows(text, separator))]
        header, widths = len(rows[0]), [len(row) for row in rows[1:]]
        if header > 1:
            alike = sum(width in (header, header + 1) for width in widths)
            found[separator] = alike / max(1, len(widths))
    return max(found, key=lambda separator: found[separator]) if found else ","


def _rows(text: str, separator: str) -> Iterator[list[str]]:
    """Yield the rows that are not blank, each with its values, as pandas divides them."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    yield from (row for row in reader if row)


def _lines_of(text: str, separator: str) -> tuple[list[str], dict[int, int], bool]:
    """Return the header; for each number of values the first line that has so many; whether the last ones are empty."""
    limit = csv.field_size_limit(len(text) + 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        header = next(row for row in reader if row)
        widths: dict[int, int] = {}
        ends_empty, line = True, reader.line_num
        for row in reader:
            begins, line = line + 1, reader.line_num
            if row:
                widths.setdefault(len(row), begins)
                if row == header:
                    raise ValueError(f"line {begins} repeats the names of the columns: join files without those")
                ends_empty = ends_empty and not row[-1].strip()
                if line > begins and any(value.count(separator) >= max(1, len(header) - 1) for value in row):
                    raise ValueError(f'a quote (") in line {begins} is closed in line {line}, and rows stand between')
    finally:
        csv.field_size_limit(limit)
    return header, widths, ends_empty


def _too_long(header: list[str], widths: dict[int, int], longest: int) -> str:
    if set(widths) == {len(header) + 1}:
        return (
            f"every line has {longest} values where the header names {len(header)}: if the first are the names of "
            f"rows, as R's write.table puts them, put a name for them before {header[0]!r} in the first line"
        )
    if len(header) == 1:
        return f"the first line has one value, {header[0]!r}, and line {widths[longest]} has {longest}: begin the file \
with the names of the columns"
    return f"line {widths[longest]} has {longest} values where the header names {len(header)}"


def _names(header: list[str]) -> tuple[list[str], set[str]]:
    """Return a name for each column, and those that the header has more than once."""
    stripped = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(header)]
    counts = collections.Counter(stripped)
    names: list[str] = []
    for name in stripped:
        numbered, number = name, 0
        while numbered in names if counts[name] > 1 else False:
            number += 1
            numbered = f"{name}.{number}"
        names.append(numbered)
    return names, {name for name, count in counts.items() if count > 1}


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True
