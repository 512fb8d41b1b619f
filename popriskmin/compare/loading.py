"""Finding tasks: those of installed packages, and those in files of the user's."""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import importlib.util
import inspect
import sys
from pathlib import Path
from types import GenericAlias, ModuleType

from popriskmin.compare.task import Options, Task, check_task_class
from popriskmin.compare.text import describe, place_of

# By the name of a module, the path by which the user gave its file.
_given: dict[str, str] = {}

# Packages name their tasks under this entry point, this package too; a value is the path
# of a class, package.module:Class.
GROUP = "popriskmin.tasks"

# Endings of files that hold a table, which are the data of a task and not a task.
TABLES = (".csv", ".csv.gz", ".tsv", ".txt", ".parquet")


def installed_tasks() -> dict[str, str]:
    """Return the names of the tasks of installed packages, and the path of each class.

    Another package adds its own in its pyproject.toml, under
    ``[project.entry-points."popriskmin.tasks"]``.

    Examples
    --------
    >>> installed_tasks()["digits"]
    'popriskmin.tasks.digits:Digits'
    """
    return {entry.name: entry.value for entry in sorted(importlib.metadata.entry_points(group=GROUP))}


def about_tasks() -> dict[str, str]:
    """Return the first line on each installed task, read without importing it.

    Examples
    --------
    >>> about_tasks()["digits"] != ""
    True
    """
    return {name: _first_line(place) for name, place in installed_tasks().items()}


def _first_line(place: str) -> str:
    """Return the first line of a class's docstring, or nothing where it cannot be read."""
    module, _, class_name = place.partition(":")
    try:
        spec = importlib.util.find_spec(module)
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8")) if spec and spec.origin else ast.parse("")
    except (ImportError, OSError, ValueError, SyntaxError):  # a package that is broken or has no source
        return ""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    doc = ast.get_docstring(classes[0]) if classes else None
    return (doc or "").strip().partition("\n")[0]


def load_task_class(name: str) -> type[Task]:
    """Return the task of this name, or the one that a Python file defines.

    Parameters
    ----------
    name
        One of `installed_tasks()`, or the path of a file that ends in .py.

    Raises
    ------
    ValueError
        If there is no such task or file, if the file cannot be run, or if it does not
        define exactly one usable task.
    """
    installed = installed_tasks()
    if name in installed:
        return _load_installed(name, installed[name])
    if not name.endswith(".py"):
        raise ValueError(_no_such_task(name, list(installed)))
    if not Path(name).is_file():
        raise ValueError(f"there is no file {name}")
    module = _load_file(name)
    tasks = [
        value
        for value in vars(module).values()
        # Python 3.10 takes an alias such as dict[str, float] for a type.
        if isinstance(value, type)
        and not isinstance(value, GenericAlias)
        and issubclass(value, Task)
        and value.__module__ == module.__name__
    ]
    # A base without `trial` does not count, unless it stands alone; then it is a mistake.
    tasks = [kind for kind in tasks if not inspect.isabstract(kind)] or tasks
    if len(tasks) != 1:
        names = ", ".join(task.__name__ for task in tasks) or "none"
        raise ValueError(f"{name} must define one subclass of popriskmin.compare.Task, but defines {names}")
    return _checked(name, tasks[0])


def is_table(name: str) -> bool:
    """Return whether a word of the command line names a file with a table."""
    return name.lower().endswith(TABLES)


def _no_such_task(name: str, installed: list[str]) -> str:
    if is_table(name):
        return f"{name} is a table and not a task: popriskmin compare table --data {name} --target COLUMN"
    near = difflib.get_close_matches(name, installed, n=1)
    if near:
        return f"there is no task {name!r}: did you mean {near[0]}?"
    listed = ", ".join(installed)
    return f"there is no task {name!r}; installed are {listed}, and a file of your own is given by its path"


def make_task(task_class: type[Task], options: Options) -> Task:
    """Make a task with these options.

    Raises
    ------
    ValueError
        Where the task's own code raises. It names the line, unless an installed task
        refuses an option.
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
    """Return the task's name on the command line; None for one without a file of its own."""
    module, name = type(task).__module__, _installed_name(type(task))
    if name is not None:
        return name
    file = getattr(sys.modules.get(module), "__file__", None)
    # A script that defines a task and compares it would compare again when it is loaded.
    if module == "__main__" or file is None:
        return None
    path, here = Path(file).resolve(), Path.cwd()
    return _given.get(module, str(path.relative_to(here) if here in path.parents else path))


def _installed_name(task_class: type[Task]) -> str | None:
    place = f"{task_class.__module__}:{task_class.__qualname__}"
    return next((name for name, value in installed_tasks().items() if value == place), None)


def _load_installed(name: str, place: str) -> type[Task]:
    try:
        task_class: object = importlib.metadata.EntryPoint(name, place, GROUP).load()
    except ImportError:
        raise  # the task needs a package; the command says how to get it
    except Exception as error:
        raise _mistake(error, place) from error
    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise ValueError(f"the task {name} must be a subclass of popriskmin.compare.Task, but {place} is not one")
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
    # A task may import the files beside it, as a script may.
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
        # A module that was not run to its end is not there, as after an import statement.
        sys.modules.pop(module_name, None)
        if former is not None:
            sys.modules[module_name] = former
        raise _mistake(error, name) from error
    _given[module_name] = name
    return module
