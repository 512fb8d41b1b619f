"""Making runs: what is kept, in which order, and what happens to the others when one goes wrong."""

import json
import os
import pickle
import sys
import threading
import types

import pytest
from tiny import Tiny

from popriskmin.compare.loading import load_task_class
from popriskmin.compare.training.arms import make_arms
from popriskmin.compare.training.runner import Progress, factors, make_jobs, make_runs, pickle_task, prepare_backend
from popriskmin.compare.training.store import Store, settings_of
from popriskmin.tasks.digits import Digits


class Recorder(Progress):
    def __init__(self):
        self.events = []

    def start(self, total, present):
        self.events.append((total, present))

    def done(self, job, records):
        self.events.append((str(job), records[-1]["status"]))


def all_jobs(seeds=(0, 1), rates=(0.01, 0.1), **kwargs):
    return make_jobs(make_arms(**kwargs), rates, [0.0], seeds)


def without_times(records):
    return [{k: v for k, v in record.items() if "seconds" not in k} for record in records]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Return the runs of the task with nothing going wrong, made one after another in this process."""
    store = Store(tmp_path_factory.mktemp("expected"))
    made = make_runs(Tiny(), all_jobs(), store, 1, "loky", Progress())
    return {str(job): without_times(records) for job, records in made.items()}


def test_every_run_is_made_and_kept(tmp_path, expected):
    store, progress = Store(tmp_path), Recorder()
    made = make_runs(Tiny(), all_jobs(), store, 1, "loky", progress)
    assert len(made) == len(expected) == 12
    assert progress.events[0] == (12, 0)
    assert {status for _, status in progress.events[1:]} == {"finished"}
    # AdamW and PRM first, then what follows PRM.
    assert [name.startswith("adamw-matched") for name, _ in progress.events[1:]] == [False] * 8 + [True] * 4
    for job, records in made.items():
        assert store.read(settings_of(Tiny(), job.arm, job.configuration)) == records


def test_nothing_is_made_twice(tmp_path):
    store, progress = Store(tmp_path), Recorder()
    make_runs(Tiny(), all_jobs(seeds=(0,)), store, 1, "loky", Progress())
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    make_runs(Tiny(), all_jobs(seeds=(0, 1)), store, 1, "loky", progress)
    assert progress.events[0] == (12, 6)
    assert len(progress.events) == 1 + 6
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_the_matched_arm_takes_the_factors_of_its_own_run(tmp_path):
    made = make_runs(Tiny(), all_jobs(prm=[{"mask": "soft"}], match_all=True), Store(tmp_path), 1, "loky", Progress())
    by_name = {str(job): factors(records) for job, records in made.items()}
    followed = [name for name in by_name if name.startswith("adamw-matched")]
    assert len(followed) == 8
    for name in followed:
        assert by_name[name] == by_name[name.replace("adamw-matched", "prm")]
        assert len(by_name[name]) == 12
    assert len({tuple(by_name[name]) for name in followed}) == 8


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_the_results_do_not_depend_on_jobs_and_backend(tmp_path, expected, backend):
    """Multiprocessing cannot hand out results one by one, as some cluster backends cannot either."""
    made = make_runs(Tiny(), all_jobs(), Store(tmp_path), 2, backend, Progress())
    assert {str(job): without_times(records) for job, records in made.items()} == expected


def test_a_dask_cluster(tmp_path, expected):
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    # In this process: what a worker in another lacks is tried with loky.
    cluster = distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None)
    with cluster, distributed.Client(cluster):
        prepare_backend("dask", 2)
        made = make_runs(Tiny(), all_jobs(), Store(tmp_path), 2, "dask", Progress())
    assert {str(job): without_times(records) for job, records in made.items()} == expected


def test_one_bad_run_does_not_stop_the_others(tmp_path, expected):
    store, progress = Store(tmp_path), Recorder()
    made = make_runs(Tiny(trouble="raise"), all_jobs(), store, 1, "loky", progress)
    assert {records[-1]["status"] for records in made.values()} == {"failed"}
    followers = [records[-1]["error"] for job, records in made.items() if job.arm.follows]
    assert set(followers) == {"the run of 'prm' that it follows has failed"}
    # Failed runs are kept for whoever looks, and made again.
    assert len(list(tmp_path.iterdir())) == 12
    again = Recorder()
    make_runs(Tiny(trouble="raise"), all_jobs(), store, 1, "loky", again)
    assert again.events[0] == (12, 0)


def test_a_worker_that_dies_takes_no_other_run_with_it(tmp_path, expected):
    progress = Recorder()
    # One that dies is enough: each takes two workers with it, and each worker imports torch.
    jobs = [job for job in all_jobs(rates=[0.1]) if job.configuration.seed == 0 or job.arm.name == "adamw"]
    made = make_runs(Tiny(trouble="die"), jobs, Store(tmp_path / "runs"), 2, "loky", progress)
    status = {str(job): records[-1]["status"] for job, records in made.items()}
    assert {name for name, value in status.items() if value == "failed"} == {n for n in status if n.endswith("seed=1")}
    died = next(r[-1]["error"] for j, r in made.items() if j.configuration.seed == 1)
    assert died.startswith("its process died: ")
    assert len(progress.events) == 1 + 4
    for job, records in made.items():
        if job.configuration.seed == 0:
            assert without_times(records) == expected[str(job)]


def test_a_run_that_died_once_gets_another_try(tmp_path, expected):
    task = Tiny(trouble="die", scratch=str(tmp_path / "has died"))
    made = make_runs(task, all_jobs(rates=[0.1])[:4], Store(tmp_path / "runs"), 2, "loky", Progress())
    assert os.path.exists(task.scratch)
    assert {records[-1]["status"] for records in made.values()} == {"finished"}
    assert all(without_times(records) == expected[str(job)] for job, records in made.items())


def test_a_worker_that_lacks_a_module_says_which(tmp_path, monkeypatch):
    """As on a cluster whose workers have an older environment: here no file has the module, only this process."""
    here_alone = types.ModuleType("here_alone")
    exec("class Noise:\n    level = 0.5", here_alone.__dict__)
    monkeypatch.setitem(sys.modules, "here_alone", here_alone)
    task = Tiny()
    task.extra = here_alone.Noise()
    jobs = [job for job in all_jobs(rates=[0.1]) if not job.arm.follows]
    made = make_runs(task, jobs, Store(tmp_path), 2, "loky", Progress(), keep_going=True)
    assert len(made) == 4
    for records in made.values():
        assert records[-1]["status"] == "failed"
        assert "has no module 'here_alone', which the task or an arm needs; install it there" in records[-1]["error"]
    # With one job there is no worker that could lack it.
    made = make_runs(task, jobs[:1], Store(tmp_path), 1, "loky", Progress())
    assert {records[-1]["status"] for records in made.values()} == {"finished"}


def test_seeds_come_first_so_that_what_is_there_is_whole(tmp_path):
    assert [job.configuration.seed for job in all_jobs(seeds=(4, 7))] == [4] * 6 + [7] * 6


def test_a_task_that_cannot_be_sent_to_a_worker(tmp_path):
    task = Tiny()
    task.held = (i for i in range(3))
    with pytest.raises(ValueError, match=r"Tiny holds something that cannot be sent .*generator.*make it in trial"):
        make_runs(task, all_jobs(), Store(tmp_path), 1, "loky", Progress())
    assert not list(tmp_path.iterdir())


def test_runs_that_cannot_be_kept_end_without_remarks_of_joblib(tmp_path, monkeypatch, recwarn):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(OSError, match="No space left"):
        make_runs(Tiny(), all_jobs(), Store(tmp_path), 2, "threading", Progress())
    assert not [warning for warning in recwarn if "cancelled" in str(warning.message)]


def test_unknown_backends_are_named():
    with pytest.raises(ValueError, match="backend must be one of .*loky.*got 'condor'"):
        prepare_backend("condor", 1)


def test_a_backend_that_is_not_installed(monkeypatch):
    import importlib

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match="backend ray needs a package that is not installed: No module named 'ray"):
        prepare_backend("ray", 1)


def test_records_are_one_json_line_each(tmp_path):
    make_runs(Tiny(), all_jobs(seeds=(0,)), Store(tmp_path), 1, "loky", Progress())
    for path in tmp_path.iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["kind"] for line in lines].count("step") == 12
        assert (lines[0]["kind"], lines[-1]["kind"]) == ("settings", "end")


RAISES = """from popriskmin.compare import Task


class Mine(Task):
    metrics = {"loss": "min"}
    learning_rates = weight_decays = (0.1,)

    def trial(self, seed):
        raise ArithmeticError("too hot")
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_names_the_users_file_and_line_from_a_worker_too(tmp_path, jobs):
    path = tmp_path / "mine.py"
    path.write_text(RAISES)
    task = load_task_class(str(path))()
    jobs_to_do = make_jobs(make_arms()[:1], [0.1], [0.0], (0, 1))
    made = make_runs(task, jobs_to_do, Store(tmp_path / "runs"), jobs, "loky", Progress(), keep_going=True)
    for records in made.values():
        assert f'File "{path}", line 9' in records[-1]["error"]


def test_a_task_of_the_package_goes_by_its_name():
    task = Digits()
    pickled = pickle_task(task)
    assert pickle.loads(pickled) == task
    assert len(pickled) < 1000  # no code in it


def test_what_cannot_be_sent_is_named():
    task = Digits()
    task.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"Digits holds something that cannot be sent .* make it in trial\(seed\)"):
        pickle_task(task)
