"""Digests of a task's code, so that a changed task is a new one, and of batches."""

from __future__ import annotations

import hashlib
import pickle
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

import cloudpickle
import numpy as np
import torch

from popriskmin.compare.task import Task


def source_digest(task: Task) -> str:
    """Return a digest of the code that defines a task and of its data files.

    A run belongs to it, so that the results of an older version of the task are not taken
    for this one's. For a task in a file it is the digest of the file's text. A task from a
    notebook, a prompt or standard input has no file. Its digest differs from session to
    session, and within one it follows the class and all that the class uses.
    """
    code = _code_digest(task)
    if not task.files:
        return code
    parts = [code, *(hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in task.files)]
    return _short(" ".join(parts).encode())


def _code_digest(task: Task) -> str:
    file = getattr(sys.modules.get(type(task).__module__), "__file__", None)
    if file and Path(file).is_file():
        text = Path(file).read_text(encoding="utf-8", errors="surrogateescape")
        return _short(text.encode("utf-8", errors="surrogateescape"))
    try:
        # It holds the code, and a mark of the class that is new in each session.
        return _short(cloudpickle.dumps(type(task)))
    except Exception:  # pickling may raise anything; then every call makes its runs anew
        return _short(uuid.uuid4().bytes)


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def content_digest(content: object) -> str:
    """Return a digest of tensors, arrays and plain values in any nesting.

    Other objects do not enter it.
    """
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(_tensor_bytes(value))
        elif isinstance(value, np.ndarray):
            digest.update(value.tobytes())
        elif isinstance(value, Mapping):
            for item in value.values():
                add(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif isinstance(value, (int, float, str, bytes, bool)):
            digest.update(pickle.dumps(value))

    add(content)
    return digest.hexdigest()[:16]


def _tensor_bytes(value: torch.Tensor) -> bytes:
    value = value.detach().cpu()
    value = torch.view_as_real(value) if value.is_complex() else value
    return value.double().numpy().tobytes()
