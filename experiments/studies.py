"""Helpers of the studies: results that survive a kill, and timing in turns."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from popriskmin import __version__

Record = dict[str, Any]


class Records(list[Record]):
    """The records of a study, kept in a JSON file with a record on each line.

    `save` writes the whole file beside the old one and then replaces it, so that a kill
    leaves one of the two. A study that is started again reads the file and makes the
    records that are missing.

    Parameters
    ----------
    path
        The file. Its folder is made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(json.loads(path.read_text()) if path.exists() else [])
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def find(self, **place: object) -> Record | None:
        """Return the first record that has these values, or None."""
        return next((record for record in self if place.items() <= record.items()), None)

    def save(self) -> None:
        """Write all records."""
        partial = self.path.with_suffix(".partial")
        partial.write_text("[\n" + ",\n".join(map(json.dumps, self)) + "\n]\n")
        partial.replace(self.path)


def header(repeats: int) -> str:
    """Return a line that says where and with which versions the numbers were measured."""
    return (
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"popriskmin {__version__}; median of {repeats}"
    )


def ratio_in_turns(one: Callable[[], None], other: Callable[[], None], repeats: int) -> float:
    """Return the median of the ratios of their times, called in turns after one call each."""
    one()
    other()
    ratios = []
    for _ in range(repeats):
        start = time.perf_counter()
        one()
        middle = time.perf_counter()
        other()
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(ratios)
