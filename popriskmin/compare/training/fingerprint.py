"""Digests that tell contents apart: of a task's code, so that a changed task is a new one, and of batches."""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import pickle
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from popriskmin.compare.task import Task

# What Python adds to a class, and what a dataclass adds of which the code itself is in its methods.
IGNORED = ("__dict__", "__weakref__", "__module__", "__doc__", "__dataclass_fields__", "__dataclass_params__",
           "__firstlineno__", "__static_attributes__", "__annotations_cache__", "_abc_impl")  # fmt: skip

# What cannot hold itself. Whether equal ones are one object differs from session to session.
ATOMS = (int, float, complex, str, bytes, tuple, frozenset, types.CodeType, type(None))


def source_digest(task: Task) -> str:
    """Return a digest of what defines the task.

    It is part of what identifies a run, so that results of an older version of the task are not taken for this one's.
    Of a task in a file that is the file's text. A task from a notebook, a prompt or standard input has no file: there
    it is the code of the class with all that it uses of the same place, functions and data included. The content of the
    task's data files belongs to it.
    """
    code = _code_digest(task)
    if not task.files:
        return code
    parts = [code, *(hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in task.files)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _code_digest(task: Task) -> str:
    file = getattr(sys.modules.get(type(task).__module__), "__file__", None)
    try:
        source = Path(file).read_text(encoding="utf-8", errors="surrogateescape") if file else None
    except OSError:
        source = None
    if source is not None:
        return hashlib.sha256(source.encode("utf-8", errors="surrogateescape")).hexdigest()[:16]
    return _Code(type(task)).hash.hexdigest()[:16]


def content_digest(content: Any) -> str:
    """Return a digest of tensors, arrays and plain values in any nesting; what cannot be read counts as nothing."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
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


class _Code:
    """The digest of a class: its code and what that uses of the same module, followed as far as it goes.

    Line numbers and the names of files do not enter: the cells of a notebook are numbered anew in each session.
    """

    def __init__(self, root: type) -> None:
        self.module = root.__module__
        self.hash = hashlib.sha256()
        # Kept, not only their ids: the id of what has been freed may be given again.
        self.seen: dict[int, Any] = {}
        self.add(root)

    def add(self, value: Any) -> None:
        """Add a value of any kind."""
        self.hash.update(f"<{type(value).__name__}>".encode())
        if not isinstance(value, ATOMS):
            if id(value) in self.seen:
                return
            self.seen[id(value)] = value
        if isinstance(value, types.CodeType):
            self._code(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, (classmethod, staticmethod)):
            self.add(value.__func__)
        elif isinstance(value, property):
            self._all([value.fget, value.fset])
        elif isinstance(value, functools.partial):
            self._all([value.func, value.args, value.keywords])
        elif isinstance(value, Mapping):
            self._all([item for pair in value.items() for item in pair])
        elif isinstance(value, (list, tuple)):
            self._all(value)
        elif isinstance(value, (set, frozenset)):
            self._all(sorted(value, key=repr))
        else:
            self._data(value)

    def _all(self, values: Any) -> None:
        for value in values:
            self.add(value)

    def _code(self, code: types.CodeType) -> None:
        self.hash.update(code.co_code)
        self._all([code.co_names, code.co_varnames, code.co_freevars, code.co_consts])

    def _function(self, function: types.FunctionType) -> None:
        self.hash.update(function.__qualname__.encode())
        if function.__module__ != self.module:
            return
        self._all([function.__code__, function.__defaults__, function.__kwdefaults__])
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:  # a name that has no value yet
                continue
        for name in _globals_of(function.__code__):
            if name in function.__globals__:
                self._all([name, function.__globals__[name]])

    def _class(self, kind: type) -> None:
        self.hash.update(f"{kind.__module__}.{kind.__qualname__}".encode())
        if kind.__module__ == self.module:
            self._all(kind.__bases__)
            self._all(pair for pair in sorted(vars(kind).items()) if pair[0] not in IGNORED)

    def _data(self, value: Any) -> None:
        if isinstance(value, types.ModuleType):
            self.hash.update(value.__name__.encode())
        elif isinstance(value, torch.Tensor):
            self.hash.update(_tensor_bytes(value))
        else:
            try:
                self.hash.update(pickle.dumps(value))
            except Exception:  # an open file, a generator: there is no saying what it holds
                self.hash.update(type(value).__qualname__.encode())
            if type(value).__module__ == self.module:
                self.add(type(value))


def _globals_of(code: types.CodeType) -> Iterator[str]:
    """Return the global names that code reads, that of functions within it included."""
    names = {str(one.argval) for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    yield from sorted(names)
    for inner in code.co_consts:
        if inspect.iscode(inner):
            yield from _globals_of(inner)
