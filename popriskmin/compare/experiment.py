"""`compare`: the whole comparison, from a task to the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from popriskmin.compare.analysis import read_run
from popriskmin.compare.arms import make_arms
from popriskmin.compare.progress import Display, Silent
from popriskmin.compare.report import write_report
from popriskmin.compare.results import Results
from popriskmin.compare.runner import make_jobs, make_runs, prepare_backend
from popriskmin.compare.store import Store
from popriskmin.compare.task import Task, check_task, load_task_class


def compare(
    task: Task | str,
    *,
    lr: Sequence[float] | None = None,
    weight_decay: Sequence[float] | None = None,
    seeds: int | Sequence[int] = 5,
    prm: Sequence[Mapping[str, Any]] = (),
    match_all: bool = False,
    jobs: int = 1,
    backend: str = "loky",
    out: str | Path | None = None,
    progress: bool = True,
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
        Options of further PRM arms, such as `[{"mask": "soft"}]`.
    match_all
        Give each further PRM arm its own AdamW with equal steps.
    jobs
        Runs at a time. Each computes on one thread.
    backend
        Joblib's backend: "loky", processes on this machine; "dask" or "ray" for a cluster.
    out
        Folder for `results.json`, `report.html` and `runs/`; None means `runs/<task>`.
    progress
        Whether to show progress on standard error.

    Returns
    -------
    Results
        With `frame` and `curves` as pandas frames, and `print()`.

    Raises
    ------
    ValueError
        For arguments that cannot work, before anything is trained.

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
        task = load_task_class(task)()
    check_task(task)
    learning_rates = _numbers("lr", task.learning_rates if lr is None else lr)
    weight_decays = _numbers("weight_decay", task.weight_decays if weight_decay is None else weight_decay)
    seed_list = _seeds(seeds)
    if not (isinstance(jobs, int) and jobs >= 1):
        raise ValueError(f"jobs must be a whole number >= 1, got {jobs!r}")
    arms = make_arms(prm, match_all)
    prepare_backend(backend, jobs)
    folder = Path("runs") / task.name if out is None else Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, but {folder} is a file")

    all_jobs = make_jobs(arms, learning_rates, weight_decays, seed_list)
    with Display(Console(stderr=True)) if progress else Silent() as display:
        records = make_runs(task, all_jobs, Store(folder / "runs"), jobs, backend, display)
    runs = [read_run(job, records[job], task.metrics) for job in all_jobs]
    results = Results.of_runs(task, arms, learning_rates, weight_decays, seed_list, runs, folder)
    results.write()
    write_report(results, records)
    return results


def _numbers(name: str, values: Sequence[float]) -> list[float]:
    """Return the distinct values of a grid in ascending order."""
    if isinstance(values, (int, float)):
        values = [values]
    numbers = sorted({float(value) for value in values})
    if not numbers or numbers[0] < 0 or not all(value < float("inf") for value in numbers):
        raise ValueError(f"{name} must be one or more finite numbers >= 0, got {list(values)}")
    return numbers


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    listed = list(range(seeds)) if isinstance(seeds, int) else sorted(set(seeds))
    if not listed or not all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in listed):
        raise ValueError(f"seeds must be a number of seeds >= 1, or a list of whole numbers >= 0, got {seeds!r}")
    return listed
