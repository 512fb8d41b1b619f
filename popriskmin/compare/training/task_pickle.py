"""A task as bytes for other processes, with its code where these cannot import it."""

from __future__ import annotations

import io
import sys
import types
from collections import ChainMap
from collections.abc import Callable
from typing import Any, ClassVar

import cloudpickle

from popriskmin.compare.task import Task
from popriskmin.compare.text import describe

_reduce_code: Callable[[types.CodeType], Any] = cloudpickle.CloudPickler.dispatch_table[types.CodeType]


def pickle_task(task: Task) -> bytes:
    """Pickle a task, with its code where workers cannot import it: a file of the user's, a notebook.

    Raises
    ------
    ValueError
        For a task that holds what cannot be pickled. It need not be with one job, but then a task that works with one
        would not work with two.
    """
    module = sys.modules.get(type(task).__module__)
    by_value = module is not None and module.__name__.split(".")[0] not in ("popriskmin", "__main__")
    if by_value:
        cloudpickle.register_pickle_by_value(module)
    file = io.BytesIO()
    try:
        _Pickler(file).dump(task)
    except Exception as error:  # what the task's attributes raise, of whatever type
        raise ValueError(
            f"{type(task).__name__} holds something that cannot be sent to another process ({describe(error)}); "
            "make it in trial(seed)"
        ) from error
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(module)
    return file.getvalue()


def _reduce_named_code(code: types.CodeType) -> tuple[Any, ...]:
    make, arguments = _reduce_code(code)
    return _named, (make, arguments, code.co_filename)


def _named(make: Callable[..., types.CodeType], arguments: tuple[Any, ...], filename: str) -> types.CodeType:
    return make(*arguments).replace(co_filename=filename)


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
    """Keeps the name of the file that code is from, so that an error names the user's file and line.

    Since cloudpickle 3.1.3 it is left out, for pickles that do not depend on where a function was defined.
    """

    dispatch_table: ClassVar[ChainMap[Any, Any]] = ChainMap(
        {types.CodeType: _reduce_named_code}, cloudpickle.CloudPickler.dispatch_table
    )
