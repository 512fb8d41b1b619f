"""Runs on disk, a whole file of JSON lines each, and many of them packed into one file."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from popriskmin.compare.task import Task
from popriskmin.compare.text import exact
from popriskmin.compare.training.arms import Arm
from popriskmin.compare.training.fingerprint import source_digest
from popriskmin.compare.training.train import PLAIN, Configuration, Record, Variant
from popriskmin.version import __version__

# Raised when the records of a run change, so that older files are not read as new ones.
FORMAT = 1

PACK, PACK_FORMAT = "popriskmin compare, packed runs", 1

# All runs of a comparison share the first settings; the others tell them apart.
SHARED = ("format", "task", "task_options", "task_source", "optimizer_options", "popriskmin", "torch")
OWN = {"arm": str, "lr": float, "weight_decay": float, "seed": int}

# All that decides what a run gives, by name.
Settings = Record


def plain(value: object, setting: bool = False) -> object:
    """Return a value as JSON holds it.

    Tuples become lists, dataclasses dicts, types text, and numbers that are not finite None.

    Parameters
    ----------
    setting
        Whether the value is a setting, in which inf, -inf and nan become text, because they
        are not the same setting.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name), setting) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, setting) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, setting) for item in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value) if setting else None
    return str(value)


def settings_of(
    task: Task, arm: Arm, configuration: Configuration, source: str | None = None, variant: Variant = PLAIN
) -> Settings:
    """Return the settings of a run; two runs with the same settings are the same run.

    Parameters
    ----------
    source
        The task's `source_digest`, where it is known already.
    """
    settings = {
        "format": FORMAT,
        "task": task.name,
        "task_options": task.options,
        "task_source": source_digest(task) if source is None else source,
        "optimizer_options": task.optimizer_options,
        "arm": arm.name,
        "arm_kind": arm.kind,
        "prm_options": arm.options,
        # Only where there is something to say: all other runs keep their names.
        **({} if arm.optimizer is None else {"optimizer": arm.optimizer}),
        **{name: value for name, value in dataclasses.asdict(variant).items() if value},
        **dataclasses.asdict(configuration),
        "popriskmin": __version__,
        "torch": torch.__version__,
    }
    return {name: plain(value, setting=True) for name, value in settings.items()}


class Store:
    """The runs in one folder, each named by its arm, its configuration and a digest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, settings: Settings) -> Path:
        """Return the path of the run with these settings, made or not."""
        text = json.dumps(settings, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        arm = re.sub(r"[^A-Za-z0-9.=-]+", "_", settings["arm"])[:80]
        configuration = f"lr{exact(settings['lr'])}_wd{exact(settings['weight_decay'])}_seed{settings['seed']}"
        return self.folder / f"{arm}_{configuration}_{digest}.jsonl"

    def write(self, settings: Settings, records: Sequence[Record]) -> None:
        """Write a run; the file is whole or absent at every moment, a power cut included."""
        lines = [json.dumps({"kind": "settings", **settings})]
        lines += [json.dumps(plain(record), allow_nan=False) for record in records]
        write_whole(self.path(settings), "".join(line + "\n" for line in lines))

    def read(self, settings: Settings) -> list[Record] | None:
        """Return the records of a run; None where it has not been made, or has failed."""
        path = self.path(settings)
        try:
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(
                f"{path} is not a run of popriskmin compare ({error}); delete it to make it again"
            ) from error
        if not all(isinstance(record, dict) and isinstance(record.get("kind"), str) for record in records):
            raise ValueError(f"{path} is not a run of popriskmin compare; delete it to make it again")
        if not records or records[-1]["kind"] != "end" or not isinstance(records[-1].get("status"), str):
            raise ValueError(f"{path} has no end; delete it to make it again")
        if records[0] != json.loads(json.dumps({"kind": "settings", **settings})):
            raise ValueError(f"{path} holds another run than its name says; delete it to make it again")
        # A failed run gets another try: its cause may have been mended.
        return None if records[-1]["status"] == "failed" else records[1:]


def prepare_folder(folder: Path) -> None:
    """Make a folder and try to write in it, before anything is trained.

    Raises
    ------
    ValueError
        Where that cannot be done.
    """
    try:
        for path in (folder, *folder.parents):
            if path.exists() and not path.is_dir():
                raise ValueError(f"out must be a folder, but {path} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written to, but {folder} is not: {error}") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, in one piece: on the disk before it gets its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def export_runs(store: Store, settings: Iterable[Settings], file: str | Path) -> int:
    """Pack the runs with these settings into one file, and return their number.

    Users who train on one machine and report on another need it: one file travels in place
    of a folder of thousands, and a damaged or foreign one is refused. Runs that have failed
    are left out. The same runs always give the same bytes.

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
    header = json.dumps({"kind": PACK, "format": PACK_FORMAT, "runs": len(packed)})
    text = "".join(line + "\n" for line in (header, *packed))
    write_whole(Path(file), gzip.compress(text.encode(), mtime=0))
    return len(packed)


def import_runs(store: Store, expected: Settings, file: str | Path) -> int:
    """Put the runs of a file that the store lacks into it, and return their number.

    All are checked before any is written.

    Parameters
    ----------
    expected
        The settings of any run of the comparison. Those in `SHARED` must be the same.

    Raises
    ------
    ValueError
        For a file that is not there or not whole, or holds runs of another comparison.
    """
    packed = _read_pack(Path(file))
    expected = json.loads(json.dumps(expected))
    for settings, _ in packed:
        for name in SHARED:
            if settings.get(name) != expected[name]:
                raise ValueError(
                    f"{file} holds runs of another comparison: their {name} is {settings.get(name)!r}, here it is "
                    f"{expected[name]!r}; nothing was imported"
                )
    new = [(settings, records) for settings, records in packed if store.read(settings) is None]
    for settings, records in new:
        store.write(settings, records)
    return len(new)


def _read_pack(path: Path) -> list[tuple[Settings, list[Record]]]:
    """Return settings and records of every run of a file."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
        header, *runs = (json.loads(line) for line in lines)
    except OSError as error:
        if not isinstance(error, gzip.BadGzipFile):
            raise ValueError(f"{path} cannot be read: {error}") from error
        raise _not_a_pack(path, error) from error
    except (EOFError, ValueError, zlib.error) as error:
        raise _not_a_pack(path, error) from error
    if not isinstance(header, dict) or header.get("kind") != PACK:
        raise _not_a_pack(path, "it has another content")
    if header.get("format") != PACK_FORMAT:
        raise ValueError(
            f"{path} has the format {header.get('format')!r}, this version of popriskmin reads {PACK_FORMAT}"
        )
    if header.get("runs") != len(runs) or not all(map(_is_a_run, runs)):
        raise _not_a_pack(path, "it is not whole")
    return [(run[0], run[1:]) for run in runs]


def _is_a_run(run: object) -> bool:
    """Return whether this is a run in the form that `export_runs` writes."""
    if not isinstance(run, list) or len(run) < 2 or not all(isinstance(one, dict) for one in run):
        return False
    settings, last = run[0], run[-1]
    typed = all(isinstance(settings.get(name), kind) for name, kind in OWN.items())
    kinds = all(isinstance(record.get("kind"), str) for record in run[1:])
    return typed and kinds and last["kind"] == "end" and last.get("status") in ("finished", "diverged")


def _not_a_pack(path: Path, why: object) -> ValueError:
    return ValueError(
        f"{path} is not a file that popriskmin compare --export has written, or is damaged ({why}); nothing is lost"
    )
