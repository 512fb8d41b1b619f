"""`report.html`: the whole comparison on one page that needs no network."""

from __future__ import annotations

import datetime
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import torch
from markupsafe import Markup

from popriskmin.compare.report import plots
from popriskmin.compare.report.command import command, wider_command
from popriskmin.compare.report.results import Results
from popriskmin.compare.report.run_summary import MEANING
from popriskmin.compare.report.statements import OPENINGS
from popriskmin.compare.report.statistics import Estimate
from popriskmin.compare.text import brief, exact
from popriskmin.compare.training.arms import Arm
from popriskmin.compare.training.runner import Job
from popriskmin.compare.training.store import write_whole
from popriskmin.compare.training.train import Record
from popriskmin.version import __version__


def write_report(results: Results, records: Mapping[Job, Sequence[Record]]) -> Path:
    """Write `report.html` into the folder of the results and return its path."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"estimate": Estimate.text, "exact": exact, "brief": brief}
    page = environment.get_template("page.html").render(
        results=results,
        colors={arm.name: plots.color_of(arm.name, results.arms) for arm in results.arms},
        direction="higher" if results.direction == "max" else "lower",
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


def _description(results: Results) -> Markup:
    """Return the task's docstring, in which what stands between backticks is code."""
    doc = type(results.task).__doc__ or ""
    if doc.startswith(f"{type(results.task).__name__}("):
        return Markup()  # a dataclass without a docstring gets its signature in place of one
    parts = re.split(r"`+", " ".join(doc.split()))
    return Markup().join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def _costs(results: Results) -> list[dict[str, object]]:
    base = results.cost("adamw")
    rows: list[dict[str, object]] = []
    for arm in results.trained:
        cost = results.cost(arm.name)
        if cost is not None:
            ratio = cost["optimizer_seconds_per_step"] / base["optimizer_seconds_per_step"] if base else None
            rows.append({"arm": arm.name, "ratio": ratio, **cost})
    return rows


def _settings(results: Results) -> dict[str, str]:
    return {
        "Task options": ", ".join(f"{name} = {value}" for name, value in results.task.options.items()) or "none",
        "Options of all optimizers": ", ".join(f"{k} = {v}" for k, v in results.task.optimizer_options.items())
        or "none beside the grid",
        "Learning rates": ", ".join(map(exact, results.learning_rates)),
        "Weight decays": ", ".join(map(exact, results.weight_decays)),
        "Seeds": ", ".join(map(str, results.seeds)),
        "Arms": "; ".join(describe(arm) for arm in results.trained),
        **({"Averages": f"exponential, over about {results.average} steps"} if results.average else {}),
        "Versions": f"popriskmin {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "Written": datetime.date.today().isoformat(),
    }


def describe(arm: Arm) -> str:
    """Describe an arm in words."""
    options = ", ".join(f"{name}={value!r}" for name, value in arm.options.items())
    if arm.kind == "adamw":
        return "adamw is torch.optim.AdamW"
    if arm.kind == "prm":
        return f"{arm.name} is popriskmin.PRM({options})"
    if arm.optimizer is not None:
        rates = f" with learning rates {', '.join(map(exact, arm.learning_rates))}" if arm.learning_rates else ""
        return f"{arm.name} is {arm.optimizer.replace(':', '.')}({options}){rates}"
    return (
        f"{arm.name}, a control that nobody deploys, is AdamW with each step multiplied by the mean q of "
        f"{arm.follows} at the same step of the same run"
    )
