"""The command that repeats a comparison, and the one with a wider grid."""

from __future__ import annotations

import shlex
from pathlib import Path

from popriskmin.compare.comparison import Comparison
from popriskmin.compare.flags import PLAIN, flags_for, option_fields
from popriskmin.compare.loading import given_path
from popriskmin.compare.report.notes import extended
from popriskmin.compare.report.results import Results
from popriskmin.compare.text import exact
from popriskmin.compare.training.arms import Arm, make_arms, make_rivals


def wider_command(results: Results) -> str:
    """Return the command with the grid extended beyond edges that were chosen.

    It is empty where no arm chose at an edge.
    """
    if not results.has_an_answer:
        return ""
    wider = extended(results, results.selections)
    grids = [(one.learning_rates, one.weight_decays, one.arms) for one in (wider, results)]
    return "" if grids[0] == grids[1] else command(wider)


def command(comparison: Comparison) -> str:
    """Return the command that repeats the comparison, or else the call in Python."""
    task = comparison.task
    path, options = given_path(task), task.options
    # Leaving a flag away says None, so None must be the default.
    defaults = {field.name: field.default for field in option_fields(type(task))}
    sayable = all(isinstance(v, PLAIN) or (v is None and defaults[name] is None) for name, v in options.items())
    if path is None or not sayable:
        return _call(comparison)
    seeds = list(comparison.seeds)
    by_number = seeds == list(range(len(seeds)))
    words = ["popriskmin", "compare", path]
    words += ["--lr", *map(exact, comparison.learning_rates)]
    words += ["--weight-decay", *map(exact, comparison.weight_decays)]
    words += ["--seeds", str(len(seeds))] if by_number else ["--seed-list", *map(str, seeds)]
    words += _words_of_arms(comparison)
    words += ["--match-all"] if _match_all(comparison) else []
    words += ["--average", str(comparison.average)] if comparison.average else []
    words += ["--spend-validation"] if comparison.spend_validation else []
    words += flags_for(options)
    words += ["--out", str(comparison.folder)] if comparison.folder != _default_folder(comparison) else []
    return shlex.join(words)


def _words_of_arms(comparison: Comparison) -> list[str]:
    if _as_the_task_has_them(comparison):
        return []
    words = [] if comparison.further else ["--only"]
    for arm in comparison.further:
        if arm.kind == "prm":
            words += ["--prm", *arm.name.split(" ")[1:]]
        elif arm.optimizer is not None:
            options = (f"{name}={str(value).replace(' ', '')}" for name, value in arm.options.items())
            words += ["--arm", f"{arm.name}={arm.optimizer}", *options]
            words += ["--arm-lr", arm.name, *map(exact, arm.learning_rates)] if arm.learning_rates else []
    return words


def _call(comparison: Comparison) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in comparison.task.options.items())
    arguments = [f"{type(comparison.task).__name__}({options})"]
    for name, values in (("lr", comparison.learning_rates), ("weight_decay", comparison.weight_decays)):
        arguments.append(f"{name}={list(values)!r}")
    arguments.append(f"seeds={list(comparison.seeds)!r}")
    arguments += [] if _as_the_task_has_them(comparison) else _arguments_of_arms(comparison.further)
    arguments += ["match_all=True"] if _match_all(comparison) else []
    arguments += [f"average={comparison.average}"] if comparison.average else []
    arguments += ["spend_validation=True"] if comparison.spend_validation else []
    arguments += [f"out={str(comparison.folder)!r}"] if comparison.folder != _default_folder(comparison) else []
    return f"compare({', '.join(arguments)})"


def _arguments_of_arms(further: list[Arm]) -> list[str]:
    prm = [dict(arm.options) for arm in further if arm.kind == "prm"]
    rivals = {arm.name: (arm.optimizer, dict(arm.options)) for arm in further if arm.optimizer is not None}
    rates = {arm.name: list(arm.learning_rates) for arm in further if arm.learning_rates}
    arguments = [f"prm={prm!r}"] if prm or not further else []
    arguments += [f"arms={rivals!r}"] if rivals else []
    return arguments + ([f"arm_lr={rates!r}"] if rates else [])


def _as_the_task_has_them(comparison: Comparison) -> bool:
    """Return whether the arms beyond the three are the task's own further arms."""
    task, further = comparison.task, [arm for arm in comparison.further if arm.kind != "adamw-matched"]
    own = [*make_arms(task.default_prm)[3:]]
    own += make_rivals(task.default_arms, {}, own)
    return further == own and [arm.options for arm in further] == [arm.options for arm in own]


def _match_all(comparison: Comparison) -> bool:
    return any(arm.kind == "adamw-matched" for arm in comparison.further)


def _default_folder(comparison: Comparison) -> Path:
    return Path("runs") / comparison.task.name
