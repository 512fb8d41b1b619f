"""The options of a task as flags of the command line, one way and the other."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from popriskmin.compare.task import Task

PLAIN = (int, float, bool, str)


def add_task_options(parser: argparse.ArgumentParser, task_class: type[Task]) -> None:
    """Offer every option of a task as a flag.

    Raises
    ------
    ValueError
        For an option that cannot be one: its name is taken, it has no default, or text does not become its type.
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
        given = "" if default is None else f" (default: {default})"
        shown = f"{field.metadata.get('help', '')}{given}".strip().replace("%", "%%")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=shown)
        else:
            # argparse shows the choices in place of a name where there are some.
            metavar = None if choices else kind.__name__.upper()
            group.add_argument(flag, type=kind, default=default, choices=choices, metavar=metavar, help=shown)


def option_fields(task_class: type[Task]) -> list[dataclasses.Field[Any]]:
    """Return the fields that are options: those that can be given when a task is made."""
    return [field for field in dataclasses.fields(task_class) if field.init]


def flag_of(name: str) -> str:
    """Return the flag of an option.

    Examples
    --------
    >>> flag_of("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def flags_for(options: Mapping[str, Any]) -> list[str]:
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


def _default(field: dataclasses.Field[Any], task: str) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    raise ValueError(f"the option {field.name} of {task} needs a default value")


def _type_of(hint: Any, name: str, task: str) -> tuple[type, list[Any] | None]:
    """Return what a text on the command line becomes, of `float | None` float, and the choices of a Literal."""
    kinds = [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if len(kinds) == 1:
        if kinds[0] in PLAIN:
            return kinds[0], None
        if typing.get_origin(kinds[0]) is typing.Literal:
            values = list(typing.get_args(kinds[0]))
            if len({type(value) for value in values}) == 1 and type(values[0]) in (int, str):
                return type(values[0]), values
    shown = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    raise ValueError(
        f"the option {name} of {task} has the type {shown}, which no text on the command line becomes: an option is an "
        "int, float, bool or str; what is none of these is no option if it is written without a type"
    )
