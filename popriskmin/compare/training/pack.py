"""Finished runs in one file, made on one machine and taken up on another: gzip'd JSON lines."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from popriskmin.compare.training.store import Store, write_whole

KIND, FORMAT = "popriskmin compare, packed runs", 1

# Settings that all runs of one comparison share; the others are the arm, the configuration and the seed.
SHARED = ("format", "task", "task_options", "task_source", "optimizer_options", "popriskmin", "torch")
OWN = {"arm": str, "lr": float, "weight_decay": float, "seed": int}


def export_runs(store: Store, settings: Iterable[Mapping[str, Any]], file: str | Path) -> int:
    """Write the runs with these settings that are finished or diverged into one file, and return how many.

    The same runs always give the same bytes.

    Raises
    ------
    OSError
        Where the file cannot be written; a former one is kept.
    """
    packed = []
    for one in settings:
        records = store.read(one)
        if records is not None:
            packed.append(json.dumps([one, *records], allow_nan=False))
    header = json.dumps({"kind": KIND, "format": FORMAT, "runs": len(packed)})
    text = "".join(line + "\n" for line in (header, *packed))
    write_whole(Path(file), gzip.compress(text.encode(), mtime=0))
    return len(packed)


def import_runs(store: Store, expected: Mapping[str, Any], file: str | Path) -> int:
    """Put the runs of a file into the store, those that it has not, and return how many these were.

    All are looked at before any is written.

    Parameters
    ----------
    expected
        The settings of any run of the comparison, of which those in `SHARED` must be the same.

    Raises
    ------
    ValueError
        For a file that is not there or not whole, or holds runs of another comparison.
    """
    found = _read(Path(file))
    expected = json.loads(json.dumps(expected))
    for settings, _ in found:
        for name in SHARED:
            if settings.get(name) != expected[name]:
                raise ValueError(
                    f"{file} holds runs of another comparison: their {name} is {settings.get(name)!r}, here it is "
                    f"{expected[name]!r}; nothing was imported"
                )
    new = [(settings, records) for settings, records in found if store.read(settings) is None]
    for settings, records in new:
        store.write(settings, records)
    return len(new)


def _read(path: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return settings and records of every run of a file."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
        header, *runs = (json.loads(line) for line in lines)
    except OSError as error:
        if not isinstance(error, gzip.BadGzipFile):
            raise ValueError(f"{path} cannot be read: {error}") from error
        raise _not_ours(path, error) from error
    except (EOFError, ValueError, zlib.error) as error:
        raise _not_ours(path, error) from error
    if not isinstance(header, dict) or header.get("kind") != KIND:
        raise _not_ours(path, "it has another content")
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {header.get('format')!r}, this version of popriskmin reads {FORMAT}")
    if header.get("runs") != len(runs) or not all(map(_whole, runs)):
        raise _not_ours(path, "it is not whole")
    return [(run[0], run[1:]) for run in runs]


def _whole(run: Any) -> bool:
    """Whether this is what `export_runs` writes of a run."""
    if not isinstance(run, list) or len(run) < 2 or not all(isinstance(one, dict) for one in run):
        return False
    settings, last = run[0], run[-1]
    typed = all(isinstance(settings.get(name), kind) for name, kind in OWN.items())
    kinds = all(isinstance(record.get("kind"), str) for record in run[1:])
    return typed and kinds and last["kind"] == "end" and last.get("status") in ("finished", "diverged")


def _not_ours(path: Path, why: object) -> ValueError:
    return ValueError(
        f"{path} is not a file that popriskmin compare --export has written, or is damaged ({why}); nothing is lost"
    )
