"""Finding tasks: those that installed packages bring, and those in files of the user's."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import GenericAlias, ModuleType
from typing import Any

from popriskmin.compare.task import Task, check_task_class
from popriskmin.compare.text import describe, place_of

# By the name of a module, the path by which the user gave its file.
_given: dict[str, str] = {}


# Packages name their tasks here, this one among them; a value is the path of a class, package.module:Class.
GROUP = "popriskmin.tasks"


def installed_tasks() -> dict[str, str]:
    """Return the names of the tasks that installed packages bring, and where the class of each is.

    Another package adds its own in its pyproject.toml, under ``[project.entry-points."popriskmin.tasks"]``.

    Examples
    --------
    >>> installed_tasks()["digits"]
    'popriskmin.tasks.digits:Digits'
    """
    return {entry.name: entry.value for entry in sorted(importlib.metadata.entry_points(group=GROUP))}


def load_task_class(name: str) -> type[Task]:
    """Return the task of this name, or the one that a Python file defines.

    Parameters
    ----------
    name
        One of `installed_tasks()`, or the path of a file that ends in .py.

    Raises
    ------
    ValueError
        If there is no such task or file, or the file cannot be run, or defines no usable task or several.
    """
    installed = installed_tasks()
    if name in installed:
        return _load_installed(name, installed[name])
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ValueError(f"there is no file {name}")
        module = _load_file(name)
    else:
        raise ValueError(
            f"there is no task {name!r}; installed are {', '.join(installed)}, and a file of your own is given by its "
            "path, ending in .py"
        )
    found = [
        value
        for value in vars(module).values()
        # Python 3.10 takes an alias such as dict[str, float] for a type.
        if isinstance(value, type)
        and not isinstance(value, GenericAlias)
        and issubclass(value, Task)
        and value.__module__ == module.__name__
    ]
    # A base without `trial` is no task of its own, unless it is all there is, where it is a mistake to be told.
    found = [kind for kind in found if not inspect.isabstract(kind)] or found
    if len(found) != 1:
        names = ", ".join(task.__name__ for task in found) or "none"
        raise ValueError(f"{name} must define one subclass of popriskmin.compare.Task, but defines {names}")
    return _checked(name, found[0])


def make_task(task_class: type[Task], options: Mapping[str, Any]) -> Task:
    """Make a task with these options.

    Raises
    ------
    ValueError
        Where the task's own code raises; with the line, unless it is an installed task that refuses an option.
    """
    module = task_class.__module__
    try:
        task = task_class(**options)
        _ = task.metrics  # may be a property, with code of the user's
    except (Exception, SystemExit) as error:
        if _installed_name(task_class) is not None and isinstance(error, ValueError):
            raise
        raise _mistake(error, _given.get(module, module)) from error
    return task


def given_path(task: Task) -> str | None:
    """Return how the user can name the task on the command line; None for one that is not in a file of its own."""
    module, name = type(task).__module__, _installed_name(type(task))
    if name is not None:
        return name
    file = getattr(sys.modules.get(module), "__file__", None)
    # A script that defines a task and compares it too would compare again when it is loaded.
    if module == "__main__" or file is None:
        return None
    path, here = Path(file).resolve(), Path.cwd()
    return _given.get(module, str(path.relative_to(here) if here in path.parents else path))


def _installed_name(task_class: type[Task]) -> str | None:
    place = f"{task_class.__module__}:{task_class.__qualname__}"
    return next((name for name, value in installed_tasks().items() if value == place), None)


def _load_installed(name: str, place: str) -> type[Task]:
    try:
        task_class: Any = importlib.metadata.EntryPoint(name, place, GROUP).load()
    except ImportError:
        raise  # a package that the task needs; the command says how to get it
    except Exception as error:
        raise _mistake(error, place) from error
    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise ValueError(f"the task {name} must be a subclass of popriskmin.compare.Task, but {place} is none")
    return _checked(name, task_class)


def _checked(name: str, task_class: type[Task]) -> type[Task]:
    try:
        check_task_class(task_class)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return task_class


def _mistake(error: BaseException, name: str) -> ValueError:
    return ValueError(f"{place_of(error, name)}: {describe(error)}")


def _load_file(name: str) -> ModuleType:
    path = Path(name)
    module_name = path.stem
    if module_name in sys.modules and getattr(sys.modules[module_name], "__file__", None) != str(path.resolve()):
        module_name = f"{path.stem}_task"
    # A task may import the files beside it, as it could if it were run as a script.
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    former = sys.modules.get(module_name)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        # As an import statement does: what was not run to its end is not there.
        sys.modules.pop(module_name, None)
        if former is not None:
            sys.modules[module_name] = former
        raise _mistake(error, name) from error
    _given[module_name] = name
    return module
