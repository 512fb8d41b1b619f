"""`compare`: the whole comparison, from a task to the answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from rich.console import Console

from popriskmin.compare.loading import load_task_class, make_task
from popriskmin.compare.report.analysis import analyse
from popriskmin.compare.report.page import write_report
from popriskmin.compare.report.references import read_references
from popriskmin.compare.report.results import Results
from popriskmin.compare.report.run_summary import read_run
from popriskmin.compare.report.train_on_validation import jobs_of_joined
from popriskmin.compare.task import Task, check_task
from popriskmin.compare.training.arms import REFERENCES, check_common_options, make_arms, make_rivals
from popriskmin.compare.training.fingerprint import source_digest
from popriskmin.compare.training.pack import export_runs, import_runs
from popriskmin.compare.training.progress import Display, Silent
from popriskmin.compare.training.runner import Job, make_jobs, make_runs, prepare_backend
from popriskmin.compare.training.store import Store, prepare_folder
from popriskmin.compare.training.train import Configuration, Record, Variant


def compare(
    task: Task | str,
    *,
    lr: Sequence[float] | None = None,
    weight_decay: Sequence[float] | None = None,
    seeds: int | Sequence[int] = 5,
    prm: Sequence[Mapping[str, Any]] | None = None,
    match_all: bool = False,
    average: int = 0,
    spend_validation: bool = False,
    arms: Mapping[str, Any] | None = None,
    arm_lr: Mapping[str, Sequence[float]] | None = None,
    jobs: int = 1,
    backend: str = "loky",
    out: str | Path | None = None,
    import_from: str | Path | None = None,
    export_to: str | Path | None = None,
    progress: bool = True,
    keep_going: bool = False,
) -> Results:
    """Train with AdamW, with PRM, and with AdamW whose steps are as large as PRM's, and say which was better.

    All arms get the same grid, seeds, initial weights and batches. Each arm's configuration is chosen on validation
    data; all figures come from test data. Runs are kept as they end: the same call again makes only those that are
    missing.

    Parameters
    ----------
    task
        A `Task`, the name of one that comes with the package, or the path of a file that defines one.
    lr, weight_decay
        The grid; None takes the task's own.
    seeds
        How many, or which.
    prm
        Options of further PRM arms, such as `[{"mask": "soft"}]`. With neither `prm` nor `arms`, the task's own further
        arms are taken, of which most tasks have none; `[]` leaves them away.
    match_all
        Give each further PRM arm its own AdamW with equal steps.
    average
        Over about so many steps keep an exponential average of every arm's weights, and measure it beside them, as an
        arm of its own; 0 for none.
    spend_validation
        Train each arm once more at the configuration with its best final value, on training and validation data
        joined and to the last step, beside stopping early. The task must have a method `joined`.
    arms
        Other optimizers as arms, by name: the import path or class of each and its options, such as
        `{"sgd": ("torch.optim:SGD", {"momentum": 0.9})}`.
    arm_lr
        By the name of an arm of `arms`, its own learning rates in place of `lr`.
    jobs
        Runs at a time. Each computes on one thread.
    backend
        Joblib's backend: "loky", processes on this machine; "dask" or "ray" for a cluster.
    out
        Folder for `results.json`, `report.html` and `runs/`; None means `runs/<task>`.
    import_from
        A file of finished runs, written by `export_to` on any machine, to take up before the others are made.
    export_to
        A file into which the comparison's runs are packed at its end.
    progress
        Whether to show progress on standard error.
    keep_going
        Make the other runs where one fails, and report it as failed, instead of ending with its error.

    Returns
    -------
    Results
        With `frame` and `curves` as pandas frames, and `print()`.

    Raises
    ------
    ValueError
        For arguments that cannot work, before anything is trained.
    RunError
        With the first error that the task raises, unless `keep_going`. The runs that were made are kept.

    Examples
    --------
    >>> import tempfile
    >>> from popriskmin.tasks.digits import Digits
    >>> results = compare(Digits(epochs=1), lr=[1e-3], weight_decay=[0.01], seeds=1,
    ...                   out=tempfile.mkdtemp(), progress=False)
    >>> sorted(results.frame["arm"])
    ['adamw', 'adamw-matched', 'prm']
    """
    if isinstance(task, str):
        task = make_task(load_task_class(task), {})
    check_task(task)
    learning_rates = _numbers("lr", task.learning_rates if lr is None else lr)
    weight_decays = _numbers("weight_decay", task.weight_decays if weight_decay is None else weight_decay)
    seed_list = _seeds(seeds)
    jobs = _count("jobs", jobs)
    variant = Variant(average=_count("average", average, least=0))
    if spend_validation and type(task).joined is Task.joined:
        raise ValueError(
            f"{type(task).__name__} does not say how its training and validation data are joined: spend_validation "
            "needs a method joined(self, seed) that returns a Trial"
        )
    if prm is None and arms is None:
        prm, arms = task.default_prm, task.default_arms
    prm = () if prm is None else prm
    every_arm = make_arms(_options_of_arms(prm), match_all)
    own_rates = {name: _numbers(f"the learning rates of {name}", rates) for name, rates in (arm_lr or {}).items()}
    every_arm += make_rivals(_rivals(arms or {}), own_rates, every_arm)
    check_common_options(task.optimizer_options, every_arm)
    if out is not None and not str(out).strip():
        raise ValueError(f"out must name a folder, got {out!r}")
    prepare_backend(backend, jobs)
    folder = Path("runs") / task.name if out is None else Path(out)
    for path in (folder, folder / "runs"):
        prepare_folder(path)
    if export_to is not None:
        prepare_folder(Path(export_to).parent)
        if Path(export_to).is_dir():
            raise ValueError(f"the file to export to is a folder: {export_to}")

    all_jobs = make_jobs(every_arm, learning_rates, weight_decays, seed_list, variant)
    if type(task).references is not Task.references:
        all_jobs += [Job(REFERENCES, Configuration(0.0, 0.0, seed)) for seed in seed_list]
    # Of the task as it is before its code runs, which may change data that it shares.
    source = source_digest(task)
    store = Store(folder / "runs")
    if import_from is not None:
        import_runs(store, all_jobs[0].settings(task, source), import_from)

    def made(wanted: Sequence[Job]) -> dict[Job, list[Record]]:
        with Display(Console(stderr=True)) if progress else Silent() as display:
            return make_runs(task, wanted, store, jobs, backend, display, source, keep_going)

    records = made(all_jobs)
    trained = [job for job in all_jobs if job.arm != REFERENCES]
    runs = [read_run(job, records[job], task.metrics) for job in trained]
    if average:
        runs += [read_run(job, records[job], task.metrics, averaged=True) for job in trained]
        every_arm += [arm.of_averages for arm in every_arm]
    selections = analyse(runs, every_arm, task.metrics)
    joined = made(jobs_of_joined(every_arm, selections, seed_list)) if spend_validation else {}
    results = Results.of_runs(
        task,
        every_arm,
        learning_rates,
        weight_decays,
        seed_list,
        runs,
        folder,
        source,
        selections,
        read_references({job.configuration.seed: records[job] for job in all_jobs if job.arm == REFERENCES}),
        [read_run(job, found, task.metrics) for job, found in joined.items()],
    )
    note = _replaced(folder / "results.json", results.to_dict()) if progress else None
    if note:
        Console(stderr=True).print(note, highlight=False, markup=False, soft_wrap=True)
    results.write()
    write_report(results, records)
    if export_to is not None:
        export_runs(store, [job.settings(task, source) for job in (*all_jobs, *joined)], export_to)
    return results


def _count(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number that is at least so large."""
    if not (isinstance(value, Integral) and int(value) >= least):
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    return int(value)


def _numbers(name: str, values: Sequence[float]) -> list[float]:
    """Return the distinct values of a grid in ascending order."""
    try:
        listed = [values] if isinstance(values, Real) else list(values)
        numbers = [] if any(isinstance(value, str) for value in listed) else sorted({float(value) for value in listed})
    except (TypeError, ValueError):
        numbers = []
    if not numbers or numbers[0] < 0 or not all(value < float("inf") for value in numbers):
        raise ValueError(f"{name} must be one or more finite numbers >= 0, got {values!r}")
    return numbers


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    message = f"seeds must be a number of seeds >= 1, or a list of whole numbers >= 0, got {seeds!r}"
    if isinstance(seeds, Integral):
        listed: list[Any] = list(range(int(seeds)))
    elif isinstance(seeds, Iterable):
        listed = list(seeds)
    else:
        raise ValueError(message)
    if not listed or not all(isinstance(seed, Integral) and 0 <= int(seed) < 2**32 for seed in listed):
        raise ValueError(message)
    return sorted({int(seed) for seed in listed})


def _options_of_arms(prm: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if isinstance(prm, (str, Mapping)) or not all(isinstance(options, Mapping) for options in prm):
        raise ValueError(f'prm must be a list with a dict for each arm, such as [{{"mask": "soft"}}], got {prm!r}')
    return list(prm)


def _rivals(arms: Mapping[str, Any]) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """Return every arm as a pair; one without options may be given by its optimizer alone."""
    pairs = {name: (value, {}) if isinstance(value, (str, type)) else value for name, value in arms.items()}
    for name, pair in pairs.items():
        if not (isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[1], Mapping)):
            raise ValueError(f'arms[{name!r}] must be such as ("torch.optim:SGD", {{"momentum": 0.9}}), got {pair!r}')
    return pairs


def _replaced(path: Path, data: Mapping[str, Any]) -> str | None:
    """Return what to say where a file holds results that the new ones do not: those of another comparison."""
    try:
        former = json.loads(path.read_text(encoding="utf-8"))
        options = data["task_options"]
        lost = [f"{name}={value}" for name, value in former["task_options"].items() if options.get(name) != value]
        for name in ("learning_rates", "weight_decays", "seeds"):
            lost += [f"{name.replace('_', ' ')[:-1]} {value}" for value in former[name] if value not in data[name]]
        names = [arm["name"] for arm in data["arms"]]
        lost += [arm["name"] for arm in former["arms"] if arm["name"] not in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is none, or it is not one of ours
        return None
    if not lost:
        return None
    return (
        f"{path.parent} held the results of another comparison ({', '.join(lost)}), which these replace. Its runs are "
        "kept: its command brings them back, and with another --out both stay."
    )
