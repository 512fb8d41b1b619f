"""The command `popriskmin`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from popriskmin.version import __version__

if TYPE_CHECKING:
    from popriskmin.compare import Task

FAILED = 1
WRONG_ARGUMENTS = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 if something failed, 2 for wrong arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="popriskmin",
        description="PRM, an optimizer that trains on population risk.",
    )
    parser.add_argument("--version", action="version", version=f"popriskmin {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    compare_parser = commands.add_parser(
        "compare",
        help="train with AdamW and with PRM and say which was better",
        description="Train a task with AdamW, with PRM, and with AdamW at PRM's step size, and say which was better on "
        "test data, and by how much. Runs are kept as they end: the same command again goes on.",
        add_help=False,  # served below, when the task's own options are known
        allow_abbrev=False,
    )
    _add_compare_arguments(compare_parser)
    known, _ = parser.parse_known_args(arguments)
    return _compare(compare_parser, known, lambda: parser.parse_args(arguments))


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
    add("--match-all", action="store_true", help="give each further PRM arm its own AdamW with equal steps")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time, each on one thread (default: %(default)s)")
    add(
        "--backend",
        default="loky",
        help="joblib's backend: loky for processes here, dask or ray for a cluster (default: %(default)s)",
    )
    add("--out", metavar="DIR", help="folder for the results (default: runs/TASK)")


def _compare(
    parser: argparse.ArgumentParser, known: argparse.Namespace, parse: Callable[[], argparse.Namespace]
) -> int:
    try:
        from popriskmin.compare import compare
        from popriskmin.compare.arms import parse_options
        from popriskmin.compare.task import load_task_class, shipped_tasks
    except ImportError as error:
        needed = f"popriskmin compare needs a package that is not installed: {error.name}"
        print(f"{needed}; get all it needs with: pip install 'popriskmin[compare]'", file=sys.stderr)
        return FAILED
    if known.task is None:
        if known.help:
            parser.print_help()
            return 0
        return _wrong(f"name a task: {', '.join(shipped_tasks())}, or a Python file that defines one")
    try:
        task_class = load_task_class(known.task)
        _add_task_options(parser, task_class)
    except ValueError as error:
        return _wrong(str(error))
    if known.help:
        parser.print_help()
        return 0
    args = parse()
    try:
        options = {field.name: getattr(args, field.name) for field in dataclasses.fields(task_class)}
        results = compare(
            task_class(**options),
            lr=args.lr,
            weight_decay=args.weight_decay,
            seeds=args.seeds if args.seed_list is None else args.seed_list,
            prm=[parse_options(pairs) for pairs in args.prm],
            match_all=args.match_all,
            jobs=args.jobs,
            backend=args.backend,
            out=args.out,
        )
    except ValueError as error:
        return _wrong(str(error))
    except OSError as error:
        print(f"popriskmin compare: {error}; finished runs are kept", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, and the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    results.print()
    print(f"\nThe page: {results.folder / 'report.html'}\nThe numbers: {results.folder / 'results.json'}")
    return FAILED if any(run.end["status"] == "failed" for run in results.runs) else 0


def _wrong(message: str) -> int:
    print(f"popriskmin compare: {message}", file=sys.stderr)
    return WRONG_ARGUMENTS


def _add_task_options(parser: argparse.ArgumentParser, task_class: type[Task]) -> None:
    """Offer every field of a task as a flag."""
    taken = set(parser._option_string_actions)
    hints = typing.get_type_hints(task_class)
    group = parser.add_argument_group(f"options of {task_class.__name__}")
    for field in dataclasses.fields(task_class):
        flag = "--" + field.name.replace("_", "-")
        if flag in taken:
            raise ValueError(
                f"the option {field.name} of {task_class.__name__} would hide {flag} of popriskmin compare"
            )
        text = field.metadata.get("help", "")
        if field.default is dataclasses.MISSING:
            raise ValueError(f"the option {field.name} of {task_class.__name__} needs a default value")
        kind = _plain_type(hints[field.name])
        shown = f"{text} (default: {field.default})".strip()
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=shown)
        else:
            group.add_argument(flag, type=kind, default=field.default, metavar=kind.__name__.upper(), help=shown)


def _plain_type(hint: Any) -> type:
    """Return the type that a text on the command line becomes: of `float | None`, float."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        hint = kinds[0] if len(kinds) == 1 else str
    return hint if hint in (int, float, bool, str) else str
