"""Makes the runs that are missing, several at a time, and keeps each as it ends."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import pickle
import platform
import re
import signal
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from types import TracebackType

import cloudpickle
import joblib
from joblib.externals.loky import get_reusable_executor

from popriskmin.compare.task import Task
from popriskmin.compare.text import describe, exact
from popriskmin.compare.training.arms import Arm
from popriskmin.compare.training.store import Settings, Store, settings_of
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

    def settings(self, task: Task, source: str | None = None) -> Settings:
        """Return all that decides what the run gives; see `settings_of`."""
        return settings_of(task, self.arm, self.configuration, source, self.variant)


class RunError(RuntimeError):
    """A run failed, which ends the comparison unless it is to keep going."""

    def __init__(self, job: Job, error: str) -> None:
        super().__init__(f"the run {job} failed: {error}")
        self.job, self.error = job, error


class Progress:
    """The runner tells it how far it is; this one shows nothing."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

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
    """Return all runs of a comparison, seed by seed, so that whole seeds are made first."""
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
    """Return the records of every job, read from the store, or made now and written to it.

    Arms that follow another arm are made after it, from the factors that it has recorded.

    Parameters
    ----------
    source
        The task's `source_digest`, where it is known already.
    keep_going
        Whether the other runs are made where one fails.

    Raises
    ------
    RunError
        For the first run that fails, unless `keep_going`.
    """
    workers = _Workers(task, n_jobs, backend)
    settings = {job: job.settings(task, source) for job in jobs}
    made: dict[Job, list[Record]] = {}
    for job in jobs:
        records = store.read(settings[job])
        if records is not None:
            made[job] = records
    progress.start(len(jobs), len(made))

    def keep(job: Job, records: list[Record]) -> None:
        store.write(settings[job], records)
        # Read back, so that the report does not depend on whether a run was just made.
        made[job] = store.read(settings[job]) or records
        progress.done(job, records)
        if records[-1]["status"] == "failed" and not keep_going:
            raise RunError(job, records[-1]["error"])

    _each(workers.make({job: None for job in jobs if job.arm.follows is None and job not in made}), keep)
    traces: dict[Job, list[float] | None] = {}
    for job in jobs:
        if job.arm.follows is not None and job not in made:
            leader = _leader(job, made)
            if leader[-1]["status"] == "failed":
                keep(job, [_failed(f"the run of {job.arm.follows!r} that it follows has failed")])
            else:
                traces[job] = factors(leader)
    _each(workers.make(traces), keep)
    return {job: made[job] for job in jobs}


def _leader(job: Job, made: dict[Job, list[Record]]) -> list[Record]:
    """Return the records of the run that a run follows."""
    place = (job.arm.follows, job.configuration, job.variant)
    return next(records for one, records in made.items() if (one.arm.name, one.configuration, one.variant) == place)


def _each(runs: Generator[tuple[Job, list[Record]], None, None], keep: Callable[[Job, list[Record]], None]) -> None:
    """Keep each run as it ends. Where one cannot be kept, joblib's warnings are silenced."""
    try:
        for job, records in runs:
            keep(job, records)
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs.close()


def factors(records: Sequence[Record]) -> list[float]:
    """Return the factor of every step, up to the first without one, where a run diverged."""
    trace = []
    for record in records:
        if record["kind"] == "step":
            if record.get("factor") is None:
                break
            trace.append(record["factor"])
    return trace


def _failed(error: str) -> Record:
    return {"kind": "end", "status": "failed", "error": error, "seconds": 0.0}


@dataclasses.dataclass(frozen=True)
class _Call:
    """One run as it is sent to a worker.

    The task and the job are bytes, so that a worker that lacks a module of theirs can say
    so itself. `caller` is the process that sends it, `path` its folders of modules, and
    `file` the task's own file.
    """

    number: int
    task: bytes
    job: bytes
    trace: list[float] | None
    caller: int
    path: list[str]
    file: str | None


class _Workers:
    """Worker processes that make the runs of a task; with one job, this process."""

    def __init__(self, task: Task, n_jobs: int, backend: str) -> None:
        self.task, self.n_jobs, self.backend = pickle_task(task), n_jobs, backend
        self.file = getattr(sys.modules.get(type(task).__module__), "__file__", None)

    def make(self, traces: dict[Job, list[float] | None]) -> Generator[tuple[Job, list[Record]], None, None]:
        """Yield runs as they end. A worker that dies takes no other run with it."""
        waiting = dict(traces)
        try:
            while waiting:
                try:
                    yield from self._call(waiting, list(waiting), self.n_jobs)
                except Exception:
                    if self.n_jobs == 1:
                        raise
                    # The runs that were under way are made again, each alone: any of
                    # their workers may have died.
                    for job in list(waiting)[: self.n_jobs]:
                        try:
                            yield from self._call(waiting, [job], self.n_jobs)
                        except Exception as error:
                            del waiting[job]
                            yield job, [_failed(_why_a_worker_died(error))]
        except (KeyboardInterrupt, GeneratorExit):
            if self.backend == "loky":
                get_reusable_executor().shutdown(wait=True, kill_workers=True)
            raise

    def _call(
        self, waiting: dict[Job, list[float] | None], jobs: list[Job], n_jobs: int
    ) -> Iterator[tuple[Job, list[Record]]]:
        """Yield the runs of these jobs as they end, and take them from the waiting ones."""
        path = [os.path.abspath(folder) for folder in sys.path]
        calls = [
            joblib.delayed(_work)(
                _Call(number, self.task, cloudpickle.dumps(job), waiting[job], os.getpid(), path, self.file)
            )
            for number, job in enumerate(jobs)
        ]
        with joblib.parallel_config(backend=self.backend, n_jobs=n_jobs):
            active, _ = joblib.parallel.get_active_backend()
            common = {"batch_size": 1, "pre_dispatch": "n_jobs", "max_nbytes": None}
            one_by_one = active.supports_return_generator
            # Other backends give all results at once. They get few runs at a time, so that
            # few are lost by an interruption.
            several = len(calls) if one_by_one else 2 * n_jobs
            given = {"return_as": "generator_unordered"} if one_by_one else {}
            for start in range(0, len(calls), several):
                for number, records in joblib.Parallel(**given, **common)(calls[start : start + several]):
                    del waiting[jobs[number]]
                    yield jobs[number], records


def _work(call: _Call) -> tuple[int, list[Record]]:
    """Make a run, in a worker or in the caller's own process."""
    if os.getppid() == call.caller:
        _belong_to(call.caller)
    if os.getpid() != call.caller:
        # The worker may be older than a folder of the path: it serves several comparisons.
        sys.path += [folder for folder in call.path if folder not in sys.path]
    try:
        task, job = pickle.loads(call.task), pickle.loads(call.job)  # noqa: S301 - made by the caller
    except Exception as error:  # unpickling imports modules, which may raise anything
        return call.number, [_failed(_lack(error))]
    records = run(task, job.arm, job.configuration, call.trace, job.variant)
    if records[-1]["status"] == "failed" and call.file is not None:
        records[-1]["error"] = _with_file(records[-1]["error"], task, call.file)
    return call.number, records


def _lack(error: Exception) -> str:
    """Say that this process cannot read the task or the job, and what to do."""
    worker = f"the worker process {os.getpid()} on {platform.node()}"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{worker} has no module {error.name!r}, which the task or an arm needs; install it there, or put the "
            "folder with it on PYTHONPATH"
        )
    return f"{worker} cannot read the task or the arm: {describe(error)}"


def _why_a_worker_died(error: BaseException) -> str:
    """Return the reason for which a worker gave no records, in a line."""
    link: BaseException | None = error
    while link is not None:
        module = re.search(r"No module named '([^']+)'", str(link))
        if module:
            return (
                f"a worker process has no module {module[1]!r}; install popriskmin and what it needs in the workers' "
                "environment"
            )
        link = link.__cause__ or link.__context__
    return f"its process died: {''.join(traceback.format_exception_only(error)).strip()}"


def _with_file(trace: str, task: Task, file: str) -> str:
    """Name the task's file in a traceback whose code has lost it.

    cloudpickle, since 3.1.3, sends code without the name of its file.
    """
    functions = [value for value in vars(type(task)).values() if isinstance(value, types.FunctionType)]
    files = [function.__code__.co_filename for function in functions]
    # dataclasses adds functions of its own, whose "file" is called <string>.
    lost = [name for name in files if not os.path.exists(name) and name != "<string>"]
    return trace.replace(f'File "{lost[0]}"', f'File "{file}"') if lost else trace


@functools.cache
def _belong_to(parent: int) -> None:
    """Watch for the end of the parent, so that a killed comparison leaves no workers, and leave Ctrl-C to it.

    Ctrl-C reaches every process of a terminal; the parent ends its workers itself.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def pickle_task(task: Task) -> bytes:
    """Pickle a task, with its code where workers cannot import it: from a file, a notebook.

    Raises
    ------
    ValueError
        For a task that holds something that cannot be pickled. This is also refused with
        one job, so that a task that works with one works with two.
    """
    module = sys.modules.get(type(task).__module__)
    by_value = module is not None and module.__name__.split(".")[0] not in ("popriskmin", "__main__")
    if by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        pickled: bytes = cloudpickle.dumps(task)
    except Exception as error:  # an attribute of the task may raise anything
        raise ValueError(
            f"{type(task).__name__} holds something that cannot be sent to another process ({describe(error)}); "
            "make it in trial(seed)"
        ) from error
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(module)
    return pickled


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
