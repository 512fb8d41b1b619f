"""Runs on disk: one file of JSON lines each, complete or not there at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from popriskmin.compare.task import Task
from popriskmin.compare.text import exact
from popriskmin.compare.training.arms import Arm
from popriskmin.compare.training.fingerprint import source_digest
from popriskmin.compare.training.train import PLAIN, Configuration, Record, Variant
from popriskmin.version import __version__

# Raised when the records of a run change, so that older files are not read as new ones.
FORMAT = 1


def plain(value: Any, setting: bool = False) -> Any:
    """Return a value as JSON holds it: tuples as lists, numbers that are not finite as None, types as text.

    Parameters
    ----------
    setting
        Whether it is one, where inf, -inf and nan are text, for they are not the same.
    """
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
) -> dict[str, Any]:
    """Return everything that decides what a run gives; two runs with the same settings are the same run.

    Parameters
    ----------
    source
        The task's `source_digest`, where it is known already.
    """
    settings: dict[str, Any] = plain(
        {
            "format": FORMAT,
            "task": task.name,
            "task_options": task.options,
            "task_source": source_digest(task) if source is None else source,
            "optimizer_options": task.optimizer_options,
            "arm": arm.name,
            "arm_kind": arm.kind,
            "prm_options": arm.options,
            # Only where there is something: all other runs keep their names.
            **({} if arm.optimizer is None else {"optimizer": arm.optimizer}),
            **{name: value for name, value in dataclasses.asdict(variant).items() if value},
            **dataclasses.asdict(configuration),
            "popriskmin": __version__,
            "torch": torch.__version__,
        },
        setting=True,
    )
    return settings


class Store:
    """The runs in one folder, named by what they are and a digest of all their settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, settings: Mapping[str, Any]) -> Path:
        """Return where the run with these settings is, or will be."""
        text = json.dumps(settings, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        arm = re.sub(r"[^A-Za-z0-9.=-]+", "_", settings["arm"])[:80]
        configuration = f"lr{exact(settings['lr'])}_wd{exact(settings['weight_decay'])}_seed{settings['seed']}"
        return self.folder / f"{arm}_{configuration}_{digest}.jsonl"

    def write(self, settings: Mapping[str, Any], records: Sequence[Record]) -> None:
        """Write a run so that at every moment the file is whole or absent, a power cut included."""
        lines = [json.dumps({"kind": "settings", **settings})]
        lines += [json.dumps(plain(record), allow_nan=False) for record in records]
        write_whole(self.path(settings), "".join(line + "\n" for line in lines))

    def read(self, settings: Mapping[str, Any]) -> list[Record] | None:
        """Return the records of the run with these settings; None where it has not been made, or failed."""
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
        # A failed run is worth another try: the cause may have been mended.
        return None if records[-1]["status"] == "failed" else records[1:]


def prepare_folder(folder: Path) -> None:
    """Make a folder and write a file in it, so that nothing is trained whose results could not be kept.

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
    """Write a file, text as UTF-8, in one piece: to a temporary name, to the disk, and only then to its own name."""
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
