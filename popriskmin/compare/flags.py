"""Words of the command line: the options of a task as flags, and the options of arms."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

import torch

from popriskmin.compare.task import Options, Task
from popriskmin.compare.training.arms import prm_defaults
from popriskmin.mask import BOUNDARIES, MASKS, REDUCTIONS

# The types of a value on the command line.
PLAIN = (int, float, bool, str)

# Words for values, in any case of letters; "on" and "yes" come from configuration files.
WORDS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False, "none": None}
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}


def add_task_options(parser: argparse.ArgumentParser, task_class: type[Task]) -> None:
    """Offer every option of a task as a flag.

    Raises
    ------
    ValueError
        For an option that cannot be a flag: its name is taken, it has no default, or no text
        becomes its type.
    """
    name = task_class.__name__
    try:
        hints = typing.get_type_hints(task_class)
    except (NameError, TypeError, AttributeError) as error:
        raise ValueError(f"the types of the options of {name} cannot be read: {error}") from error
    group = parser.add_argument_group(f"options of {name}")
    for field in option_fields(task_class):
        flag = flag_of(field.name)
        _check_free(parser, field.name, flag, name)
        default = _default(field, name)
        kind, choices = _type_of(hints[field.name], field.name, name)
        # argparse formats help with %.
        shown_default = "" if default is None else f" (default: {default})"
        shown = f"{field.metadata.get('help', '')}{shown_default}".strip().replace("%", "%%")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=shown)
        else:
            # argparse shows choices, where there are some, in place of a name.
            metavar = None if choices else kind.__name__.upper()
            group.add_argument(flag, type=kind, default=default, choices=choices, metavar=metavar, help=shown)


def option_fields(task_class: type[Task]) -> list[dataclasses.Field[Any]]:
    """Return the fields that are options: those that can be set when a task is made."""
    return [field for field in dataclasses.fields(task_class) if field.init]


def flag_of(name: str) -> str:
    """Return the flag of an option.

    Examples
    --------
    >>> flag_of("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def flags_for(options: Options) -> list[str]:
    """Return the words that set these options on the command line.

    Examples
    --------
    >>> flags_for({"noise": 0.3, "clip": float("-inf"), "shuffle": False, "width": None})
    ['--noise', '0.3', '--clip=-inf', '--no-shuffle']
    """
    words = []
    for name, value in options.items():
        flag = flag_of(name)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            # A value that begins with a hyphen would be taken for a flag.
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return words


def _check_free(parser: argparse.ArgumentParser, name: str, flag: str, task: str) -> None:
    taken = {word: action for action in parser._actions for word in (*action.option_strings, action.dest)}
    for word in (flag, flag.replace("--", "--no-", 1), name):
        if word in taken:
            hidden = (taken[word].option_strings or [f"the argument {taken[word].dest}"])[-1]
            raise ValueError(
                f"the option {name} of {task} would hide {hidden} of popriskmin compare; give it another name"
            )


def _default(field: dataclasses.Field[Any], task: str) -> object:
    if field.default is not dataclasses.MISSING:
        default: object = field.default
        return default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    raise ValueError(f"the option {field.name} of {task} needs a default value")


def _type_of(hint: object, name: str, task: str) -> tuple[type, list[str | int] | None]:
    """Return the type of an option, of `float | None` float, and the choices of a Literal."""
    kinds = [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if len(kinds) == 1:
        if isinstance(kinds[0], type) and kinds[0] in PLAIN:
            return kinds[0], None
        if typing.get_origin(kinds[0]) is typing.Literal:
            values = list(typing.get_args(kinds[0]))
            if len({type(value) for value in values}) == 1 and type(values[0]) in (int, str):
                return type(values[0]), values
    shown = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    raise ValueError(
        f"the option {name} of {task} has the type {shown}, which a flag cannot give: an option is an int, float, "
        "bool or str; a class attribute without a type is not an option"
    )


def describe_options() -> str:
    """Return the options of a PRM arm, with the choices of those that have some."""
    choices = {"mask": MASKS, "boundary": BOUNDARIES, "reduction": REDUCTIONS}
    shown = []
    for name, default in prm_defaults().items():
        if name not in ("lr", "weight_decay", "variance"):
            values = ("on", "off") if isinstance(default, bool) else choices.get(name, ())
            values = (*values, "MODULE:FUNCTION") if name == "mask" else values
            shown.append(f"{name}={'|'.join(values)}" if values else name)
    return ", ".join(shown)


def parse_arm(words: Sequence[str]) -> tuple[str, str, Options]:
    """Read an arm given as NAME=IMPORT.PATH:CLASS key=value ...

    Examples
    --------
    >>> parse_arm(["sgd=torch.optim:SGD", "momentum=0.9"])
    ('sgd', 'torch.optim:SGD', {'momentum': 0.9})
    """
    name, equals, path = words[0].partition("=")
    if not equals or not name or not path:
        raise ValueError(
            f"an arm is given as NAME=IMPORT.PATH:CLASS, such as sgd=torch.optim:SGD momentum=0.9, got {words[0]!r}"
        )
    return name, path, parse_options(words[1:], what=f"the arm {name}")


def parse_arm_lr(words: Sequence[str]) -> tuple[str, list[float]]:
    """Read a grid given as NAME LR ..."""
    try:
        rates = [float(word) for word in words[1:]]
    except ValueError:
        rates = []
    if not rates:
        raise ValueError(f"--arm-lr takes the arm's name and its learning rates, such as sgd 0.01 0.1, got {words!r}")
    return words[0], rates


def parse_options(pairs: Sequence[str], what: str = "PRM") -> Options:
    """Read options given as NAME=VALUE: numbers, tuples, true, false, none, dtypes, or text.

    on and yes are true, off and no are false. A PRM option with a default that is text is
    always read as text.

    Examples
    --------
    >>> parse_options(["mask=soft", "softness=0.3", "debias=true", "betas=0.9,0.95"])
    {'mask': 'soft', 'softness': 0.3, 'debias': True, 'betas': (0.9, 0.95)}
    """
    options: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name or not text:
            raise ValueError(f"options of {what} are given as NAME=VALUE, such as mask=soft, got {pair!r}")
        if name in options:
            raise ValueError(f"the option {name!r} is given twice in one arm")
        options[name] = text if what == "PRM" and isinstance(prm_defaults().get(name), str) else _value(text)
    return options


def _value(text: str) -> object:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    dtype = DTYPES.get(text.removeprefix("torch."))
    if dtype is not None:
        return dtype
    try:
        value: object = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value
