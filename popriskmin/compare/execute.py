"""`compare`: from a plan to its runs, and from the runs to the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from popriskmin.compare.comparison import Comparison, plan, whole_number
from popriskmin.compare.report.analysis import analyse
from popriskmin.compare.report.results import Results
from popriskmin.compare.report.run_summary import read_references, read_run
from popriskmin.compare.report.train_on_validation import jobs_of_joined
from popriskmin.compare.task import Options, Task
from popriskmin.compare.training.arms import REFERENCES
from popriskmin.compare.training.progress import Display
from popriskmin.compare.training.runner import Job, Progress, make_jobs, make_runs, prepare_backend
from popriskmin.compare.training.store import Store, export_runs, import_runs, prepare_folder
from popriskmin.compare.training.train import Configuration, Record, Variant


def compare(
    task: Task | str,
    *,
    lr: Sequence[float] | None = None,
    weight_decay: Sequence[float] | None = None,
    seeds: int | Sequence[int] = 5,
    prm: Sequence[Options] | None = None,
    match_all: bool = False,
    average: int = 0,
    spend_validation: bool = False,
    arms: Options | None = None,
    arm_lr: Mapping[str, Sequence[float]] | None = None,
    jobs: int = 1,
    backend: str = "loky",
    out: str | Path | None = None,
    import_from: str | Path | None = None,
    export_to: str | Path | None = None,
    progress: bool = True,
    keep_going: bool = False,
) -> Results:
    """Train with AdamW, with PRM, and with AdamW at PRM's step size, and say which is better.

    All arms get the same grid, seeds, initial weights and batches. Validation data chooses
    each arm's configuration; the values that are reported come from test data. Runs are kept
    as they end: the same call again makes only those that are missing.

    Parameters
    ----------
    task
        A `Task`, the name of an installed one, or the path of a file that defines one.
    lr, weight_decay
        The grid; None takes the task's own.
    seeds
        The number of seeds, or a list of them.
    prm
        Options of further PRM arms, such as `[{"mask": "soft"}]`. Without `prm` and `arms`
        the task's own further arms are taken, which few tasks have; `[]` omits them.
    match_all
        Give each further PRM arm its own AdamW with equal steps.
    average
        A number of steps. Keep an exponential average of every arm's weights over about
        so many, and measure it as an arm of its own; 0 for none.
    spend_validation
        Train each arm once more on training and validation data together, to the last step,
        at the configuration with its best final value. The task must have a method `joined`.
    arms
        Other optimizers as arms: by name, the import path or class and its options, such as
        `{"sgd": ("torch.optim:SGD", {"momentum": 0.9})}`.
    arm_lr
        By the name of an arm of `arms`, its own learning rates in place of `lr`.
    jobs
        The number of runs at a time. Each computes on one thread.
    backend
        Joblib's backend: "loky", processes on this machine; "dask" or "ray" for a cluster.
    out
        The folder for `results.json`, `report.html` and `runs/`; None means `runs/<task>`.
    import_from
        A file of finished runs, written by `export_to`, which are then not made again.
    export_to
        A file into which the comparison's runs are packed at its end. Both serve to train on
        one machine and to report on another.
    progress
        Whether to show progress on standard error.
    keep_going
        Make the other runs where one fails, and report it as failed, instead of raising.

    Returns
    -------
    Results
        With `frame` and `curves` as pandas frames, and `print()`.

    Raises
    ------
    ValueError
        For arguments that cannot work, before anything is trained.
    RunError
        With the first error that the task raises, unless `keep_going`. Finished runs are
        kept.

    Examples
    --------
    >>> import tempfile
    >>> from popriskmin.tasks.digits import Digits
    >>> results = compare(Digits(epochs=1), lr=[1e-3], weight_decay=[0.01], seeds=1,
    ...                   out=tempfile.mkdtemp(), progress=False)
    >>> sorted(results.frame["arm"])
    ['adamw', 'adamw-matched', 'prm']
    """
    from popriskmin.compare.report.page import write_report  # matplotlib takes a second, which each worker would wait

    comparison = plan(
        task, lr=lr, weight_decay=weight_decay, seeds=seeds, prm=prm, match_all=match_all, average=average,
        spend_validation=spend_validation, arms=arms, arm_lr=arm_lr, out=out,
    )  # fmt: skip
    runs = _Runs(comparison, whole_number("jobs", jobs), backend, progress, keep_going)
    _prepare_folders(comparison.folder, export_to)
    every_job = jobs_of(comparison)
    if import_from is not None:
        import_runs(runs.store, every_job[0].settings(comparison.task, comparison.source), import_from)
    runs.make(every_job)
    results = _answer(comparison, runs)
    note = _replaced(comparison.folder / "results.json", results) if progress else None
    if note:
        Console(stderr=True).print(note, highlight=False, markup=False, soft_wrap=True)
    results.write()
    write_report(results, runs.records)
    if export_to is not None:
        export_runs(runs.store, [job.settings(comparison.task, comparison.source) for job in runs.records], export_to)
    return results


class _Runs:
    """The runs of a comparison, made by joblib and kept in its folder."""

    def __init__(self, comparison: Comparison, jobs: int, backend: str, progress: bool, keep_going: bool) -> None:
        prepare_backend(backend, jobs)
        self.comparison, self.jobs, self.backend = comparison, jobs, backend
        self.progress, self.keep_going = progress, keep_going
        self.store = Store(comparison.folder / "runs")
        self.records: dict[Job, list[Record]] = {}

    def make(self, jobs: Sequence[Job]) -> None:
        """Make the runs of these jobs that are missing, and take up their records."""
        task, source = self.comparison.task, self.comparison.source
        with Display(Console(stderr=True)) if self.progress else Progress() as display:
            made = make_runs(task, jobs, self.store, self.jobs, self.backend, display, source, self.keep_going)
        self.records.update(made)


def _prepare_folders(folder: Path, export_to: str | Path | None) -> None:
    for path in (folder, folder / "runs"):
        prepare_folder(path)
    if export_to is not None:
        prepare_folder(Path(export_to).parent)
        if Path(export_to).is_dir():
            raise ValueError(f"the file to export to is a folder: {export_to}")


def jobs_of(comparison: Comparison) -> list[Job]:
    """Return the runs of a comparison, those of the task's references at the end."""
    grid = (comparison.learning_rates, comparison.weight_decays, comparison.seeds)
    jobs = make_jobs(comparison.trained, *grid, Variant(average=comparison.average))
    if type(comparison.task).references is not Task.references:
        jobs += [Job(REFERENCES, Configuration(0.0, 0.0, seed)) for seed in comparison.seeds]
    return jobs


def _answer(comparison: Comparison, runs: _Runs) -> Results:
    """Draw the conclusions, for which runs on joined data may have to be made first."""
    metrics, records = comparison.task.metrics, dict(runs.records)
    trained = [job for job in records if job.arm != REFERENCES]
    summaries = [read_run(job, records[job], metrics) for job in trained]
    if comparison.average:
        summaries += [read_run(job, records[job], metrics, averaged=True) for job in trained]
    selections = analyse(comparison, summaries)
    joined = jobs_of_joined(comparison, selections) if comparison.spend_validation else []
    if joined:
        runs.make(joined)
    references = read_references({job.configuration.seed: records[job] for job in records if job.arm == REFERENCES})
    on_joined = [read_run(job, runs.records[job], metrics) for job in joined]
    return Results.of_runs(comparison, summaries, selections, references, on_joined)


def _replaced(path: Path, results: Results) -> str | None:
    """Return a note where a file has results of another comparison, which it will lose."""
    data = results.to_dict()
    try:
        former = json.loads(path.read_text(encoding="utf-8"))
        options = data["task_options"]
        lost = [f"{name}={value}" for name, value in former["task_options"].items() if options.get(name) != value]
        for name in ("learning_rates", "weight_decays", "seeds"):
            lost += [f"{name.replace('_', ' ')[:-1]} {value}" for value in former[name] if value not in data[name]]
        names = [arm["name"] for arm in data["arms"]]
        lost += [arm["name"] for arm in former["arms"] if arm["name"] not in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no file, or not one of ours
        return None
    if not lost:
        return None
    return (
        f"{path.parent} held the results of another comparison ({', '.join(lost)}), which these replace. Its runs are "
        "kept: its command brings them back, and with another --out both stay."
    )
