"""The command `popriskmin`."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import platform
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from popriskmin.version import __version__

FAILED = 1
WRONG_ARGUMENTS = 2
INTERRUPTED = 130

# What `popriskmin compare` imports, as the extra `compare` installs it.
COMPARE_NEEDS = ("cloudpickle", "jinja2", "joblib", "matplotlib", "numpy", "pandas", "rich", "sklearn", "scipy")
# What works before a first release on PyPI, too.
GET_COMPARE = "get all it needs with, in a clone of the repository: pip install -e '.[compare]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 if something failed, 2 for wrong arguments."""
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
    _add_compare_arguments(compare_parser)
    commands.add_parser(
        "info",
        help="say what is usable here: versions, the fused step, extras",
        description="Say what is usable here, and why what is not is not.",
    )
    try:
        known, unknown = parser.parse_known_args(arguments)
        if known.command == "info":
            if unknown:
                parser.error(f"unrecognized arguments: {' '.join(unknown)}")
            return _info()
        return _compare(compare_parser, known)
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, and the same command goes on from there", file=sys.stderr)
        return INTERRUPTED


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
    """Adds to argparse's messages what was most likely meant.

    Attributes
    ----------
    words
        What was given to the command.
    """

    words: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and leave."""
        # Flags that take several values take the task too, where it comes after them.
        taken = re.search(r"invalid \w+ value: '(.+)'", message)
        if taken and self.words[0].startswith("-"):
            message += f"; if {taken[1]!r} is the task, it goes first: {self.with_task_first(taken[1])}"
        super().error(message)

    def with_task_first(self, task: str) -> str:
        """Return the command as it was probably meant."""
        return " ".join(["popriskmin", "compare", task, *(word for word in self.words if word != task)])

    def refuse_unknown(self, words: Sequence[str]) -> NoReturn:
        """Say that these flags are not known, and which ones resemble them."""
        flags = [word.split("=")[0] for word in words if word.startswith("--")]
        near = [difflib.get_close_matches(flag, self._option_string_actions, n=1) for flag in flags]
        hint = f"; did you mean {', '.join(match[0] for match in near if match)}?" if any(near) else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{hint}")


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", help="a task that comes with the package, or a Python file that defines one")
    parser.add_argument("-h", "--help", action="store_true", help="show this, with the task's own options, and exit")
    add = parser.add_argument_group("the comparison").add_argument
    add("--lr", type=float, nargs="+", metavar="LR", help="learning rates to try (default: the task's own)")
    add("--weight-decay", type=float, nargs="+", metavar="DECAY", help="weight decays to try (default: the task's own)")
    add("--seeds", type=int, default=5, metavar="N", help="how many seeds (default: %(default)s)")
    add("--seed-list", type=int, nargs="+", metavar="SEED", help="which seeds, in place of --seeds")
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
        help="without the task's own further arms, as also where --prm or --arm names some",
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
        help="train each arm at its best configuration on training and validation data joined, too, and to the end",
    )
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
        from popriskmin.compare import compare
        from popriskmin.compare.flags import add_task_options, option_fields
        from popriskmin.compare.loading import installed_tasks, load_task_class, make_task
        from popriskmin.compare.report.page import wider_command
        from popriskmin.compare.text import brief, last_frame
        from popriskmin.compare.training.arms import describe_options, parse_arm, parse_arm_lr, parse_options
        from popriskmin.compare.training.runner import RunError
    except ImportError as error:
        needed = f"popriskmin compare needs a package that is not installed: {error.name}"
        print(f"{needed}; {GET_COMPARE}", file=sys.stderr)
        return FAILED
    parser.epilog = f"Options of PRM, for --prm: {describe_options()}."
    if known.task is None:
        if known.help:
            tasks = f"Installed tasks: {', '.join(installed_tasks())}; TASK --help shows a task's options."
            parser.epilog = f"{tasks} {parser.epilog}"
            parser.print_help()
            return 0
        meant = next((word for word in parser.words if word.endswith(".py") or word in installed_tasks()), "TASK")
        first = f"; the task goes first: {parser.with_task_first(meant)}" if parser.words else ""
        return _wrong(f"name a task: {', '.join(installed_tasks())}, or a Python file that defines one{first}")
    try:
        task_class = load_task_class(known.task)
        add_task_options(parser, task_class)
        if known.help:
            parser.print_help()
            return 0
        args, unknown = parser.parse_known_args(parser.words)
        if unknown:
            parser.refuse_unknown(unknown)
        rivals = [parse_arm(words) for words in args.arm]
        own = not (args.prm or args.arm or args.only)
        results = compare(
            make_task(task_class, {field.name: getattr(args, field.name) for field in option_fields(task_class)}),
            lr=args.lr,
            weight_decay=args.weight_decay,
            seeds=args.seeds if args.seed_list is None else args.seed_list,
            prm=None if own else [parse_options(pairs) for pairs in args.prm],
            match_all=args.match_all,
            average=args.average,
            spend_validation=args.spend_validation,
            arms=None if own else {name: (optimizer, options) for name, optimizer, options in _once("--arm", rivals)},
            arm_lr=dict(_once("--arm-lr", [parse_arm_lr(words) for words in args.arm_lr])),
            jobs=args.jobs,
            backend=args.backend,
            out=args.out,
            keep_going=args.keep_going,
            import_from=args.import_from,
            export_to=args.export,
        )
    except ValueError as error:
        return _wrong(str(error))
    except RunError as error:
        where = last_frame(error.error)
        told = "\n".join(filter(None, [f"popriskmin compare: {error.job} failed", where, brief(error.error)]))
        print(f"{told}\nfinished runs are kept; --keep-going makes the others all the same", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"popriskmin compare: {error}; finished runs are kept", file=sys.stderr)
        return FAILED
    results.print()
    wider = wider_command(results)
    if wider:
        print(f"\nWith the grid extended beyond the edges:\n\n  {wider}")
    print(f"\nThe page: {results.folder / 'report.html'}\nThe numbers: {results.folder / 'results.json'}")
    failed = any(run.end["status"] == "failed" for run in results.runs)
    return FAILED if failed or not results.has_an_answer else 0


def _once(flag: str, given: list[Any]) -> list[Any]:
    """Refuse a name that is given twice, of which one would be lost."""
    names = [one[0] for one in given]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{flag} gives {name!r} twice")
    return given


def _wrong(message: str) -> int:
    print(f"popriskmin compare: {message}", file=sys.stderr)
    return WRONG_ARGUMENTS
