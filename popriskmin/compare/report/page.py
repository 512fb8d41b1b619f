"""`report.html`: the whole comparison on one page that needs no network."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch

from popriskmin.compare.flags import PLAIN, flags_for, option_fields
from popriskmin.compare.loading import given_path
from popriskmin.compare.report import plots
from popriskmin.compare.report.analysis import OPENINGS
from popriskmin.compare.report.notes import extended
from popriskmin.compare.report.results import Results
from popriskmin.compare.report.terminal import MEANING, format_estimate
from popriskmin.compare.text import brief, exact
from popriskmin.compare.training.arms import Arm, make_arms, make_rivals
from popriskmin.compare.training.runner import Job
from popriskmin.compare.training.store import write_whole
from popriskmin.compare.training.train import Record
from popriskmin.version import __version__


def write_report(results: Results, records: Mapping[Job, Sequence[Record]]) -> Path:
    """Write `report.html` into the folder of the results and return its path."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"estimate": format_estimate, "exact": exact, "brief": brief}
    page = environment.get_template("page.html").render(
        results=results,
        colors={arm.name: plots.color_of(arm.name, results.arms) for arm in results.arms},
        direction="higher" if results.task.metrics[results.metric] == "max" else "lower",
        description=_description(results),
        meaning=MEANING,
        openings=OPENINGS,
        curves=plots.learning_curves(results) if results.has_an_answer else None,
        by_learning_rate=plots.by_learning_rate(results),
        by_budget=plots.by_budget(results),
        mask=plots.mask_by_layer(results, records),
        costs=_costs(results),
        command=command(results),
        wider=wider_command(results),
        settings=_settings(results),
        troubled=[run for run in results.runs if not run.finished and not run.job.arm.averaged],
    )
    path = results.folder / "report.html"
    write_whole(path, page)
    return path


def _description(results: Results) -> str:
    doc = type(results.task).__doc__ or ""
    # A dataclass without a docstring gets its signature for one.
    return "" if doc.startswith(f"{type(results.task).__name__}(") else " ".join(doc.split())


def _costs(results: Results) -> list[dict[str, Any]]:
    base = results.cost("adamw")
    rows = []
    for arm in results.arms:
        cost = None if arm.averaged else results.cost(arm.name)
        if cost is not None:
            ratio = cost["optimizer_seconds_per_step"] / base["optimizer_seconds_per_step"] if base else None
            rows.append({"arm": arm.name, "ratio": ratio, **cost})
    return rows


def wider_command(results: Results) -> str:
    """Return the command, or call, of the grid extended where an arm chose at its edge; empty where none did."""
    if not results.has_an_answer:
        return ""
    given = list(results.learning_rates), list(results.weight_decays)
    rates, decays, own = extended(results.arms, results.selections, *given)
    arms = [
        dataclasses.replace(arm, learning_rates=tuple(own[arm.name])) if arm.name in own else arm
        for arm in results.arms
    ]
    if (rates, decays) == given and arms == list(results.arms):
        return ""
    return command(dataclasses.replace(results, learning_rates=rates, weight_decays=decays, arms=arms))


def command(results: Results) -> str:
    """Return the command that repeats the comparison, or the call in Python where no command can."""
    path, options = given_path(results.task), results.task.options
    # None is said by leaving the flag away, so it must be the default.
    defaults = {field.name: field.default for field in option_fields(type(results.task))}
    sayable = all(isinstance(v, PLAIN) or (v is None and defaults[name] is None) for name, v in options.items())
    if path is None or not sayable:
        return _call(results)
    words = ["popriskmin", "compare", path]
    words += ["--lr", *map(exact, results.learning_rates)]
    words += ["--weight-decay", *map(exact, results.weight_decays)]
    seeds = list(results.seeds)
    words += ["--seeds", str(len(seeds))] if seeds == list(range(len(seeds))) else ["--seed-list", *map(str, seeds)]
    further = [] if _as_the_task_has_them(results) else _further(results)
    if not further and not _as_the_task_has_them(results):
        words.append("--only")
    for arm in further:
        if arm.kind == "prm":
            words += ["--prm", *arm.name.split(" ")[1:]]
        elif arm.optimizer is not None:
            given = (f"{name}={str(value).replace(' ', '')}" for name, value in arm.options.items())
            words += ["--arm", f"{arm.name}={arm.optimizer}", *given]
            words += ["--arm-lr", arm.name, *map(exact, arm.learning_rates)] if arm.learning_rates else []
    if _match_all(results):
        words.append("--match-all")
    words += ["--average", str(results.average)] if results.average else []
    words += ["--spend-validation"] if results.by_joined else []
    words += flags_for(options)
    if results.folder != _default_folder(results):
        words += ["--out", str(results.folder)]
    return shlex.join(words)


def _call(results: Results) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in results.task.options.items())
    arguments = [f"{type(results.task).__name__}({options})"]
    for name, values in (("lr", results.learning_rates), ("weight_decay", results.weight_decays)):
        arguments.append(f"{name}={list(values)!r}")
    arguments.append(f"seeds={list(results.seeds)!r}")
    further = [dict(arm.options) for arm in _further(results) if arm.kind == "prm"]
    own = _as_the_task_has_them(results)
    arguments += [f"prm={further!r}"] if (further and not own) or (not _further(results) and not own) else []
    rivals = [arm for arm in ([] if own else _further(results)) if arm.optimizer is not None]
    arguments += [f"arms={ {arm.name: (arm.optimizer, dict(arm.options)) for arm in rivals}!r}"] if rivals else []
    rates = {arm.name: list(arm.learning_rates) for arm in rivals if arm.learning_rates}
    arguments += [f"arm_lr={rates!r}"] if rates else []
    arguments += ["match_all=True"] if _match_all(results) else []
    arguments += [f"average={results.average}"] if results.average else []
    arguments += ["spend_validation=True"] if results.by_joined else []
    arguments += [f"out={str(results.folder)!r}"] if results.folder != _default_folder(results) else []
    return f"compare({', '.join(arguments)})"


def _further(results: Results) -> list[Arm]:
    """Return the arms beyond the three that are always there, without averages."""
    return [arm for arm in results.arms if not arm.averaged][3:]


def _as_the_task_has_them(results: Results) -> bool:
    """Return whether the arms beyond the three are those that the task has by itself."""
    task, mine = results.task, [arm for arm in _further(results) if arm.kind != "adamw-matched"]
    own = [*make_arms(task.default_prm)[3:]]
    own += make_rivals(task.default_arms, {}, own)
    return mine == own and [arm.options for arm in mine] == [arm.options for arm in own]


def _match_all(results: Results) -> bool:
    return any(arm.kind == "adamw-matched" for arm in _further(results))


def _default_folder(results: Results) -> Path:
    return Path("runs") / results.task.name


def _settings(results: Results) -> dict[str, str]:
    return {
        "Task options": ", ".join(f"{name} = {value}" for name, value in results.task.options.items()) or "none",
        "Options of all optimizers": ", ".join(f"{k} = {v}" for k, v in results.task.optimizer_options.items())
        or "none beside the grid",
        "Learning rates": ", ".join(map(exact, results.learning_rates)),
        "Weight decays": ", ".join(map(exact, results.weight_decays)),
        "Seeds": ", ".join(map(str, results.seeds)),
        "Arms": "; ".join(describe(arm) for arm in results.arms if not arm.averaged),
        **({"Averages": f"exponential, over about {results.average} steps"} if results.average else {}),
        "Versions": f"popriskmin {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "Written": datetime.date.today().isoformat(),
    }


def describe(arm: Arm) -> str:
    """Say what an arm is."""
    if arm.kind == "adamw":
        return "adamw is torch.optim.AdamW"
    if arm.kind == "prm":
        options = ", ".join(f"{name}={value!r}" for name, value in arm.options.items())
        return f"{arm.name} is popriskmin.PRM({options})"
    if arm.optimizer is not None:
        options = ", ".join(f"{name}={value!r}" for name, value in arm.options.items())
        rates = f" with learning rates {', '.join(map(exact, arm.learning_rates))}" if arm.learning_rates else ""
        return f"{arm.name} is {arm.optimizer.replace(':', '.')}({options}){rates}"
    return (
        f"{arm.name}, a control that nobody deploys, is AdamW with each step multiplied by the mean q of "
        f"{arm.follows} at the same step of the same run"
    )
