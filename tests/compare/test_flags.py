"""The options of a task on the command line."""

import argparse
import dataclasses
from typing import Literal

import pytest

from popriskmin.compare import Task
from popriskmin.compare.flags import add_task_options, flags_for


def parser_for(**options):
    """Return a parser with the options of a task that has these fields: pairs of type and default or field."""
    fields = [(name, *given) for name, given in options.items()]
    own = {"metrics": {"x": "max"}, "trial": lambda self, seed: None}
    kind = dataclasses.make_dataclass("Mine", fields, bases=(Task,), namespace=own)
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("--jobs", type=int)
    add_task_options(parser, kind)
    return parser


def test_what_is_parsed_is_what_was_written():
    parser = parser_for(
        flag=(bool, True), share=(float | None, None), clip=(float, 1.0), word=(str, "a"), depth=(int, 2),
        mode=(Literal["fast", "slow"], "fast"),
    )  # fmt: skip
    options = {"flag": False, "share": 0.5, "clip": float("-inf"), "word": "-b c", "depth": -3, "mode": "slow"}
    found = vars(parser.parse_args(["t", *flags_for(options)]))
    assert {name: found[name] for name in options} == options
    found = vars(parser.parse_args(["t"]))
    assert (found["flag"], found["share"], found["mode"]) == (True, None, "fast")
    with pytest.raises(SystemExit):
        parser.parse_args(["t", "--mode", "fats"])


def test_percent_signs_in_help_and_defaults():
    field = dataclasses.field(default="5%", metadata={"help": "share in %, %s or %(prog)s"})
    assert "share in %, %s or %(prog)s (default: 5%)" in parser_for(share=(str, field)).format_help()


def test_defaults_from_a_factory():
    parser = parser_for(depth=(int, dataclasses.field(default_factory=lambda: 3)))
    assert parser.parse_args(["t"]).depth == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": (int, 3)}, "the option jobs of Mine would hide --jobs"),
        ({"task": (str, "x")}, "the option task of Mine would hide the argument task"),
        ({"flag": (bool, True), "no_flag": (bool, True)}, "the option no_flag of Mine would hide --no-flag"),
        ({"depth": (int,)}, "the option depth of Mine needs a default value"),
        ({"widths": (tuple, (64, 64))}, "the option widths of Mine has the type tuple, .* int, float, bool or str"),
        ({"widths": (list[int], None)}, r"has the type list\[int\]"),
        ({"mixed": (int | str, 3)}, r"has the type int \| str"),
        ({"lost": ("NoSuchType", 3)}, "the types of the options of Mine cannot be read: .*NoSuchType"),
    ],
)
def test_options_that_cannot_be_flags(options, message):
    with pytest.raises(ValueError, match=message):
        parser_for(**options)
