"""The command `popriskmin`."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import difflib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn, TypeVar

from popriskmin.version import __version__

if TYPE_CHECKING:
    from popriskmin.compare import Results, Task

FAILED = 1
WRONG_ARGUMENTS = 2
INTERRUPTED = 130

# The modules that `popriskmin compare` imports, as the extra `compare` installs them.
COMPARE_NEEDS = ("cloudpickle", "jinja2", "joblib", "matplotlib", "numpy", "pandas", "rich", "sklearn", "scipy")
# This also works before a first release on PyPI.
GET_COMPARE = "get all it needs with, in a clone of the repository: pip install -e '.[compare]'"

T = TypeVar("T", bound="tuple[object, ...]")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its status: 0, 1 for a failure, 2 for wrong arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="popriskmin",
        description="PRM, an optimizer that trains on population risk.",
    )
    parser.add_argument("--version", action="version", version=f"popriskmin {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, parser_class=_CompareParser
    )
    compare_parser: _CompareParser = commands.add_parser(
        "compare",
        help="train with AdamW and with PRM and say which was better",
        description="Train a task with AdamW, with PRM, and with AdamW at PRM's step size, and say which was better on "
        "test data, and by how much. Runs are kept as they end: the same command again goes on.",
        add_help=False,  # served below, when the task's own options are known
        allow_abbrev=False,
    )
    compare_parser.words = arguments[1:]
    _add_grid(compare_parser)
    _add_arms(compare_parser)
    _add_making(compare_parser)
    commands.add_parser(
        "info",
        help="say what is usable here: versions, the fused step, extras",
        description="Say what is usable here, and why the rest is not.",
    )
    try:
        known, unknown = parser.parse_known_args(arguments)
        if known.command == "info":
            if unknown:
                parser.error(f"unrecognized arguments: {' '.join(unknown)}")
            return _info()
        with _current_folder_on_the_path(), _every_interruption():
            return _compare(compare_parser, known)
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, and the same command goes on from there", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def _current_folder_on_the_path() -> Iterator[None]:
    """Let tasks and arms import modules of the current folder, as with `python -m`."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


@contextlib.contextmanager
def _every_interruption() -> Iterator[None]:
    """Interrupt again where Ctrl-C falls into code whose exceptions Python only prints."""
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _info() -> int:
    """Print versions, what each device steps with, and which extras are installed."""
    import torch

    from popriskmin.step import kernels

    print(f"popriskmin {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"{platform.system()} {platform.machine()}\n")
    for device, line in kernels.describe().items():
        print(f"{device + ':':10}{line}")
    missing = [name for name in COMPARE_NEEDS if importlib.util.find_spec(name) is None]
    state = f"missing {', '.join(missing)}; {GET_COMPARE}" if missing else "installed"
    print(f"{'compare:':10}{state}")
    return 0


class _CompareParser(argparse.ArgumentParser):
    """A parser with messages that say what was probably meant.

    Attributes
    ----------
    words
        The words after `popriskmin compare`.
    """

    words: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and leave."""
        # A flag with several values takes the task too, where the task comes after it.
        taken = re.search(r"invalid \w+ value: '(.+)'", message)
        if taken and self.words[0].startswith("-"):
            message += f"; if {taken[1]!r} is the task, it goes first: {self.with_task_first(taken[1])}"
        super().error(message)

    def with_task_first(self, task: str) -> str:
        """Return the command as it was probably meant."""
        return " ".join(["popriskmin", "compare", task, *(word for word in self.words if word != task)])

    def with_table(self, table: str) -> str:
        """Return the command that reads a table."""
        others = [word for word in self.words if word not in (table, "table")]
        target = [] if any(word.startswith("--target") for word in others) else ["--target", "COLUMN"]
        return shlex.join(["popriskmin", "compare", "table", "--data", table, *target, *others])

    def refuse_unknown(self, words: Sequence[str]) -> NoReturn:
        """Say that these words are not known, and which flags resemble them."""
        flags = [word.split("=")[0] for word in words if word.startswith("--")]
        near = [difflib.get_close_matches(flag, self._option_string_actions, n=1) for flag in flags]
        hint = f"; did you mean {', '.join(match[0] for match in near if match)}?" if any(near) else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{hint}")


def _add_grid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", help="an installed task, or a Python file that defines one")
    parser.add_argument("-h", "--help", action="store_true", help="show this, with the task's own options, and exit")
    add = parser.add_argument_group("the grid").add_argument
    add("--lr", type=float, nargs="+", metavar="LR", help="learning rates to try (default: the task's own)")
    add("--weight-decay", type=float, nargs="+", metavar="DECAY", help="weight decays to try (default: the task's own)")
    add("--seeds", type=int, default=5, metavar="N", help="the number of seeds (default: %(default)s)")
    add("--seed-list", type=int, nargs="+", metavar="SEED", help="the seeds themselves, in place of --seeds")


def _add_arms(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the arms").add_argument
    add(
        "--prm",
        nargs="+",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further PRM arm with these options, such as --prm mask=soft softness=0.3; may be repeated",
    )
    add(
        "--arm",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME=IMPORT.PATH:CLASS", "KEY=VALUE"),
        help="another optimizer as an arm, such as --arm sgd=torch.optim:SGD momentum=0.9; may be repeated",
    )
    add(
        "--arm-lr",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "LR"),
        help="learning rates for one arm of --arm in place of --lr; may be repeated",
    )
    add(
        "--only",
        action="store_true",
        help="omit the task's own further arms, which --prm and --arm omit too",
    )
    add("--match-all", action="store_true", help="give each further PRM arm its own AdamW with equal steps")
    add(
        "--average",
        type=int,
        default=0,
        metavar="STEPS",
        help="measure beside every arm an exponential average of its weights over about so many steps, such as 50",
    )
    add(
        "--spend-validation",
        action="store_true",
        help="also train each arm on training and validation data together, to the end",
    )


def _add_making(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the runs").add_argument
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time, each on one thread (default: %(default)s)")
    add(
        "--backend",
        default="loky",
        metavar="NAME",
        help="joblib's backend: loky or multiprocessing for processes here, threading, sequential, dask or ray for a "
        "cluster (default: %(default)s)",
    )
    add("--keep-going", action="store_true", help="make the other runs where one fails, in place of stopping there")
    add("--out", metavar="DIR", help="folder for the results (default: runs/TASK)")
    add("--export", metavar="FILE", help="pack the comparison's runs into this file, for another machine")
    add("--import", dest="import_from", metavar="FILE", help="take up the runs of a file that --export has written")


def _compare(parser: _CompareParser, known: argparse.Namespace) -> int:
    try:
        from popriskmin.compare.training.runner import RunError
    except ImportError as error:
        return _lacks(error)
    try:
        if known.task is None:
            return _help(parser) if known.help else _wrong(_no_task(parser))
        results = _results(parser, known)
    except ImportError as error:
        return _lacks(error)
    except ValueError as error:
        return _wrong(str(error))
    except RunError as error:
        return _failed(str(error.job), error.error)
    except OSError as error:
        print(f"popriskmin compare: {error}; finished runs are kept", file=sys.stderr)
        return FAILED
    return 0 if results is None else _told(results)


def _results(parser: _CompareParser, known: argparse.Namespace) -> Results | None:
    """Return the results of the comparison; None where only help was asked for."""
    from popriskmin.compare import compare
    from popriskmin.compare.flags import add_task_options, describe_options, parse_arm, parse_arm_lr, parse_options
    from popriskmin.compare.loading import is_table, load_task_class

    if is_table(known.task):
        raise ValueError(f"{known.task} is a table and not a task; try {parser.with_table(known.task)}")
    task_class = load_task_class(known.task)
    add_task_options(parser, task_class)
    parser.epilog = f"Options of PRM, for --prm: {describe_options()}."
    if known.help:
        parser.print_help()
        return None
    args, unknown = parser.parse_known_args(parser.words)
    tables = [word for word in unknown if is_table(word)]
    if tables:
        raise ValueError(f"the file of a table is given with --data; try {parser.with_table(tables[0])}")
    if unknown:
        parser.refuse_unknown(unknown)
    own = not (args.prm or args.arm or args.only)
    arms = {name: (path, options) for name, path, options in _once("--arm", [parse_arm(words) for words in args.arm])}
    return compare(
        _task(task_class, args),
        lr=args.lr,
        weight_decay=args.weight_decay,
        seeds=args.seeds if args.seed_list is None else args.seed_list,
        prm=None if own else [parse_options(pairs) for pairs in args.prm],
        match_all=args.match_all,
        average=args.average,
        spend_validation=args.spend_validation,
        arms=None if own else arms,
        arm_lr=dict(_once("--arm-lr", [parse_arm_lr(words) for words in args.arm_lr])),
        jobs=args.jobs,
        backend=args.backend,
        out=args.out,
        keep_going=args.keep_going,
        import_from=args.import_from,
        export_to=args.export,
    )


def _task(task_class: type[Task], args: argparse.Namespace) -> Task:
    from popriskmin.compare.flags import option_fields
    from popriskmin.compare.loading import make_task

    return make_task(task_class, {field.name: getattr(args, field.name) for field in option_fields(task_class)})


def _help(parser: _CompareParser) -> int:
    """Print the help without a task, with a line on each installed task."""
    from popriskmin.compare.flags import describe_options
    from popriskmin.compare.loading import about_tasks

    parser.epilog = f"Options of PRM, for --prm: {describe_options()}."
    parser.print_help()
    tasks = about_tasks()
    column = max(map(len, tasks)) + 4
    width = shutil.get_terminal_size().columns - column
    print("\ninstalled tasks; TASK --help shows a task's options:")
    for name, line in tasks.items():
        print(f"  {name}".ljust(column) + textwrap.shorten(line, width, placeholder=" ..."))
    return 0


def _no_task(parser: _CompareParser) -> str:
    from popriskmin.compare.loading import installed_tasks

    tasks = installed_tasks()
    meant = next((word for word in parser.words if word.endswith(".py") or word in tasks), "TASK")
    first = f"; the task goes first: {parser.with_task_first(meant)}" if parser.words else ""
    return f"name a task: {', '.join(tasks)}, or a Python file that defines one{first}"


def _told(results: Results) -> int:
    """Print the results and return the status."""
    from popriskmin.compare.report.command import wider_command

    results.print()
    wider = wider_command(results)
    if wider:
        print(f"\nWith the grid extended beyond the edges:\n\n  {wider}")
    print(f"\nThe page: {results.folder / 'report.html'}\nThe numbers: {results.folder / 'results.json'}")
    failed = any(run.end["status"] == "failed" for run in results.runs)
    return FAILED if failed or not results.has_an_answer else 0


def _once(flag: str, given: list[T]) -> list[T]:
    """Refuse a name that is given twice, of which one would be lost."""
    names = [one[0] for one in given]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{flag} gives {name!r} twice")
    return given


def _failed(job: str, error: str) -> int:
    """Print a run's error, with the line of the user's code that raised."""
    from popriskmin.compare.text import brief, last_frame

    lines = filter(None, [f"popriskmin compare: {job} failed", last_frame(error), brief(error)])
    print("\n".join(lines), file=sys.stderr)
    print("finished runs are kept; --keep-going makes the others all the same", file=sys.stderr)
    return FAILED


def _lacks(error: ImportError) -> int:
    needed = f"popriskmin compare needs a package that is not installed: {error.name or error}"
    print(f"{needed}; {GET_COMPARE}", file=sys.stderr)
    return FAILED


def _wrong(message: str) -> int:
    print(f"popriskmin compare: {message}", file=sys.stderr)
    return WRONG_ARGUMENTS
