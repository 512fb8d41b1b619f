"""Makes the runs that are not there yet, several at a time through joblib, and keeps each as soon as it is done."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import pickle
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

import joblib
from joblib.externals.loky import get_reusable_executor

from popriskmin.compare.task import Task
from popriskmin.compare.text import exact
from popriskmin.compare.training.arms import Arm
from popriskmin.compare.training.store import Store, settings_of
from popriskmin.compare.training.task_pickle import pickle_task
from popriskmin.compare.training.train import PLAIN, Configuration, Record, Variant, run


@dataclasses.dataclass(frozen=True)
class Job:
    """One run to be made."""

    arm: Arm
    configuration: Configuration
    variant: Variant = PLAIN

    def __str__(self) -> str:
        c, joined = self.configuration, ", training and validation data joined" if self.variant.joined else ""
        return f"{self.arm.name} lr={exact(c.lr)} weight_decay={exact(c.weight_decay)} seed={c.seed}{joined}"

    def settings(self, task: Task, source: str | None = None) -> dict[str, Any]:
        """Return everything that decides what the run gives; see `settings_of`."""
        return settings_of(task, self.arm, self.configuration, source, self.variant)


class RunError(RuntimeError):
    """A run of the task raised, which ends the comparison unless it is to keep going; what was made is kept."""

    def __init__(self, job: Job, error: str) -> None:
        super().__init__(f"the run {job} failed: {error}")
        self.job, self.error = job, error


class Progress(Protocol):
    """What the runner tells of its progress."""

    def start(self, total: int, present: int) -> None:
        """Say that of `total` runs `present` are there already."""

    def done(self, job: Job, records: list[Record]) -> None:
        """Say that a run has ended."""


def make_jobs(
    arms: Sequence[Arm],
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    seeds: Sequence[int],
    variant: Variant = PLAIN,
) -> list[Job]:
    """Return all runs of a comparison, seeds outermost, so that an interrupted one has whole seeds first."""
    return [
        Job(arm, Configuration(lr, decay, seed), variant)
        for seed in seeds
        for lr in dict.fromkeys([*learning_rates, *(lr for arm in arms for lr in arm.learning_rates or ())])
        for decay in dict.fromkeys([*weight_decays, *(decay for arm in arms for decay in arm.weight_decays or ())])
        for arm in arms
        if lr in (arm.learning_rates or learning_rates) and decay in (arm.weight_decays or weight_decays)
    ]


def make_runs(
    task: Task,
    jobs: Sequence[Job],
    store: Store,
    n_jobs: int,
    backend: str,
    progress: Progress,
    source: str | None = None,
    keep_going: bool = True,
) -> dict[Job, list[Record]]:
    """Return the records of every job, read from the store or made now and written to it.

    Arms that follow another arm are made after all others, from the factors that those have recorded.

    Parameters
    ----------
    source
        The task's `source_digest`, where it is known already.
    keep_going
        Whether a run that fails leaves the others to be made.

    Raises
    ------
    RunError
        For the first run that fails, unless `keep_going`.
    """
    pickled = pickle_task(task)
    settings = {job: job.settings(task, source) for job in jobs}
    made: dict[Job, list[Record]] = {}
    for job in jobs:
        records = store.read(settings[job])
        if records is not None:
            made[job] = records
    progress.start(len(jobs), len(made))

    def keep(job: Job, records: list[Record]) -> None:
        store.write(settings[job], records)
        # Read back, so that what is reported does not depend on whether a run was just made.
        made[job] = store.read(settings[job]) or records
        progress.done(job, records)
        if records[-1]["status"] == "failed" and not keep_going:
            raise RunError(job, records[-1]["error"])

    leaders = [job for job in jobs if job.arm.follows is None and job not in made]
    _each(_parallel(pickled, [(job, None) for job in leaders], n_jobs, backend), keep)

    followers: list[tuple[Job, list[float] | None]] = []
    for job in jobs:
        if job.arm.follows is not None and job not in made:
            leader = next(
                records
                for other, records in made.items()
                if (other.arm.name, other.configuration, other.variant)
                == (job.arm.follows, job.configuration, job.variant)
            )
            if leader[-1]["status"] == "failed":
                keep(job, [_failed(f"the run of {job.arm.follows!r} that it follows has failed")])
            else:
                followers.append((job, factors(leader)))
    _each(_parallel(pickled, followers, n_jobs, backend), keep)
    return {job: made[job] for job in jobs}


def _each(runs: Generator[tuple[Job, list[Record]], None, None], keep: Callable[[Job, list[Record]], None]) -> None:
    """Keep each run as it ends. Where one cannot be kept, the others are given up without joblib's remarks on it."""
    try:
        for job, records in runs:
            keep(job, records)
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs.close()


def factors(records: Sequence[Record]) -> list[float]:
    """Return the factor of every step up to the first that has none, where a run diverged."""
    trace = []
    for record in records:
        if record["kind"] == "step":
            if record.get("factor") is None:
                break
            trace.append(record["factor"])
    return trace


def _failed(error: str) -> Record:
    return {"kind": "end", "status": "failed", "error": error, "seconds": 0.0}


def _run_pickled(pickled: bytes, job: Job, trace: list[float] | None, caller: int) -> tuple[Job, list[Record]]:
    if os.getppid() == caller:
        _die_with(caller)
    task = pickle.loads(pickled)  # noqa: S301 - made by this process's parent
    return job, run(task, job.arm, job.configuration, trace, job.variant)


@functools.cache
def _die_with(parent: int) -> None:
    """Watch, once per process, for the end of the parent: a killed comparison must leave no workers behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _parallel(
    pickled: bytes, work: list[tuple[Job, list[float] | None]], n_jobs: int, backend: str
) -> Generator[tuple[Job, list[Record]], None, None]:
    """Yield runs as they end. A worker process that dies takes no other run with it."""
    waiting = dict(work)

    def call(jobs: list[Job], n: int) -> Iterator[tuple[Job, list[Record]]]:
        calls = [joblib.delayed(_run_pickled)(pickled, job, waiting[job], os.getpid()) for job in jobs]
        for job, records in _call(calls, n, backend):
            del waiting[job]
            yield job, records

    try:
        while waiting:
            try:
                yield from call(list(waiting), n_jobs)
            except Exception:
                if n_jobs == 1:
                    raise
                # It is not known whose worker died: the runs that were under way are made again, each alone.
                for job in list(waiting)[:n_jobs]:
                    try:
                        yield from call([job], n_jobs)
                    except Exception as error:
                        del waiting[job]
                        text = "".join(traceback.format_exception_only(error)).strip()
                        yield job, [_failed(f"its process died: {text}")]
    except (KeyboardInterrupt, GeneratorExit):
        if backend == "loky":
            get_reusable_executor().shutdown(wait=True, kill_workers=True)
        raise


def _call(calls: list[Any], n_jobs: int, backend: str) -> Iterator[tuple[Job, list[Record]]]:
    with joblib.parallel_config(backend=backend, n_jobs=n_jobs):
        active, _ = joblib.parallel.get_active_backend()
        common = {"batch_size": 1, "pre_dispatch": "n_jobs", "max_nbytes": None}
        if active.supports_return_generator:
            yield from joblib.Parallel(return_as="generator_unordered", **common)(calls)
        else:
            # Such a backend gives all results at once: few runs at a time, so that few are lost by an interruption.
            for start in range(0, len(calls), 2 * n_jobs):
                yield from joblib.Parallel(**common)(calls[start : start + 2 * n_jobs])


def prepare_backend(backend: str, n_jobs: int) -> None:
    """Make a backend of joblib usable: for "dask" connect, for "ray" register it.

    Raises
    ------
    ValueError
        For a name that joblib does not know, or a backend whose package is not installed.
    """
    try:
        if backend == "ray":
            importlib.import_module("ray.util.joblib").register_ray()
        elif backend == "dask":
            distributed = importlib.import_module("distributed")
            try:
                distributed.get_client()
            except ValueError:
                # DASK_SCHEDULER_ADDRESS or dask's configuration names a cluster; else a local one is started.
                address = importlib.import_module("dask").config.get("scheduler-address", None)
                distributed.Client(address) if address else distributed.Client(
                    n_workers=n_jobs, threads_per_worker=1, dashboard_address=None
                )
        known = sorted({*joblib.parallel.BACKENDS, "dask", "ray"})
    except ImportError as error:
        raise ValueError(f"--backend {backend} needs a package that is not installed: {error}") from error
    if backend not in known:
        raise ValueError(f"backend must be one of {', '.join(known)}, got {backend!r}")
