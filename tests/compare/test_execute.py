"""The whole comparison: from Python, and killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from tiny import Tiny

from popriskmin import cli
from popriskmin.compare import Results, compare

pytestmark = pytest.mark.usefixtures("no_pictures_in_module")
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return compare(Tiny(), seeds=4, weight_decay=[0.0, 0.1], prm=[{"mask": "soft"}], out=folder, **QUIET)


def test_what_it_returns_and_writes(results):
    assert isinstance(results, Results)
    assert sorted(path.name for path in results.folder.iterdir()) == ["report.html", "results.json", "runs"]
    assert len(list((results.folder / "runs").iterdir())) == 4 * 2 * 2 * 4
    written = json.loads((results.folder / "results.json").read_text())
    assert written == results.to_dict()
    assert written["seeds"] == [0, 1, 2, 3]
    assert written["learning_rates"] == [0.01, 0.1]
    assert written["task_options"]["noise"] == 0.5
    assert set(written["selections"]) == {"final", "best", "area"}
    assert set(written["selections"]["final"]) == {"adamw", "prm", "adamw-matched", "prm mask=soft"}
    assert written["state_bytes"] == {"adamw": 88, "prm": 128, "adamw-matched": 88, "prm mask=soft": 128}


def test_no_times_enter_the_results(results):
    assert "seconds" not in (results.folder / "results.json").read_text()


def test_frames(results):
    frame = results.frame
    assert isinstance(frame, pd.DataFrame)
    assert len(frame) == 64
    assert set(frame["status"]) == {"finished"}
    chosen = results.selections["final"]["prm"]
    rows = frame[(frame.arm == "prm") & (frame.lr == chosen.chosen.lr)
                 & (frame.weight_decay == chosen.chosen.weight_decay)]  # fmt: skip
    assert rows["test final error"].mean() == pytest.approx(chosen.test["final"]["error"].mean)
    best = frame[frame.arm == "prm"].groupby(["lr", "weight_decay"])["validation final error"].mean().idxmin()
    assert best == (chosen.chosen.lr, chosen.chosen.weight_decay)
    curves = results.curves
    assert list(curves.columns) == [
        "arm", "lr", "weight_decay", "seed", "step", "validation error", "test error", "validation fit", "test fit",
    ]  # fmt: skip
    assert len(curves) == 64 * 4


@pytest.mark.usefixtures("no_page")
def test_a_later_call_adds_to_an_earlier_one(tmp_path):
    one = compare(Tiny(), lr=[0.01], seeds=3, out=tmp_path, **QUIET)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    more = compare(Tiny(), lr=[0.1, 0.01], seeds=3, out=tmp_path, **QUIET)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert len(more.runs) == 2 * len(one.runs)
    # And what else lies in the folder does not enter.
    again = compare(Tiny(), lr=[0.01], seeds=3, out=tmp_path, **QUIET)
    assert again.to_dict() == one.to_dict()


@pytest.mark.usefixtures("no_page")
def test_the_order_of_arguments_does_not_matter(tmp_path):
    one = compare(Tiny(), lr=[0.1, 0.01], seeds=[2, 0, 1], out=tmp_path / "a", **QUIET)
    other = compare(Tiny(), lr=[0.01, 0.1, 0.1], seeds=3, out=tmp_path / "b", **QUIET)
    assert one.to_dict() == other.to_dict()


def test_a_diverging_arm_is_reported(tmp_path, capsys):
    results = compare(Tiny(trouble="diverge"), lr=[0.5], seeds=3, out=tmp_path, **QUIET)
    assert "diverged" in set(results.frame["status"])
    results.print()
    shown = " ".join(capsys.readouterr().out.split())
    assert "runs diverged." in shown
    assert "diverged at step" in " ".join((tmp_path / "report.html").read_text().split())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": []}, r"lr must be one or more finite numbers >= 0, got \[\]"),
        ({"lr": [-1.0]}, r"lr must be one or more finite numbers >= 0, got \[-1.0\]"),
        ({"lr": "1e-3"}, r"lr must be one or more finite numbers >= 0, got '1e-3'"),
        ({"seeds": 2.5}, "seeds must be a number of seeds >= 1, .*, got 2.5"),
        ({"seeds": "12"}, "seeds must be"),
        ({"prm": {"mask": "soft"}}, r"prm must be a list with a dict for each arm, .*, got {'mask': 'soft'}"),
        ({"prm": "mask=soft"}, "prm must be a list with a dict for each arm"),
        ({"weight_decay": [float("nan")]}, "weight_decay must be one or more finite numbers"),
        ({"seeds": 0}, "seeds must be a number of seeds >= 1, or a list of whole numbers >= 0, got 0"),
        ({"seeds": [-1]}, "seeds must be"),
        ({"jobs": 0}, "jobs must be a whole number >= 1, got 0"),
        ({"backend": "condor"}, "backend must be one of"),
        ({"prm": [{"mask": "sharp"}]}, "mask must be one of"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_trained(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        compare(Tiny(), out=tmp_path / "new", **kwargs, **QUIET)
    assert not (tmp_path / "new").exists()


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="out must be a folder, but .*x is a file"):
        compare(Tiny(), out=tmp_path / "x", **QUIET)
    with pytest.raises(ValueError, match="out must be a folder, but .*x is a file"):
        compare(Tiny(), out=tmp_path / "x" / "below", **QUIET)
    assert (tmp_path / "x").read_text() == "mine"


def test_out_that_is_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="out must name a folder, got ''"):
        compare(Tiny(), out="", **QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_page")
def test_it_is_said_where_the_results_of_another_comparison_are_replaced(tmp_path, capsys):
    def told(**kwargs):
        compare(Tiny(kwargs.pop("noise", 0.5)), lr=kwargs.pop("lr", 0.1), seeds=1, out=tmp_path, **kwargs)
        return [line for line in capsys.readouterr().err.splitlines() if "another comparison" in line]

    assert told() == []
    assert told(lr=[0.1, 0.01], prm=[{"mask": "soft"}]) == []  # it holds all that was there
    assert "another comparison (learning rate 0.01, prm mask=soft), which these replace" in told()[0]
    assert "another comparison (noise=0.5), which these replace" in told(noise=0.7)[0]
    (tmp_path / "results.json").write_text("[]")
    assert told() == []


def test_options_that_all_optimizers_share_are_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(Tiny, "optimizer_options", {"lr": 0.5})
    with pytest.raises(ValueError, match="optimizer_options of the task: lr is not an option"):
        compare(Tiny(), out=tmp_path / "new", **QUIET)
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_never_a_number(tmp_path, capsys):
    results = compare(Tiny(trouble="lost"), lr=0.1, seeds=1, out=tmp_path, **QUIET)
    assert set(results.frame["status"]) == {"diverged"}
    results.print()
    assert "adamw-matched: 1 of 1 runs diverged." in capsys.readouterr().out


def test_a_task_by_name_and_in_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import tiny

    results = compare(tiny.__file__, seeds=1, lr=0.1, **QUIET)
    assert results.folder.as_posix() == "runs/tiny"
    assert (tmp_path / "runs" / "tiny" / "report.html").exists()


def words(out, jobs):
    task = os.path.join(os.path.dirname(__file__), "..", "tiny.py")
    return ["compare", task, "--seeds", "3", "--jobs", jobs, "--out", str(out)]


def finished_runs(folder):
    return len(list(folder.glob("*.jsonl"))) if folder.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert cli.main(words(folder, jobs="1")) == 0
    return folder


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_and_started_again_gives_the_same_results(tmp_path, undisturbed, signal_number, capsys):
    disturbed = tmp_path / "disturbed"
    process = subprocess.Popen(
        [sys.executable, "-m", "popriskmin", *words(disturbed, jobs="2")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TINY_HELD": str(disturbed / "runs")},
        # What runs in the background of a shell ignores Ctrl-C, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while finished_runs(disturbed / "runs") < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal_number) if signal_number == signal.SIGINT else process.kill()
    # Its workers hold the pipes too: this would wait for any that outlived it.
    output = process.communicate(timeout=60)
    if signal_number == signal.SIGINT:
        assert process.returncode == 130
        assert "finished runs are kept, and the same command goes on from there" in output[1]
        assert "Traceback" not in output[1]
    kept = finished_runs(disturbed / "runs")
    assert 4 <= kept < 18
    assert not (disturbed / "results.json").exists()

    capsys.readouterr()
    assert cli.main(words(disturbed, jobs="1")) == 0
    present = int(capsys.readouterr().err.split(" runs, ")[1].split(" of them kept")[0])
    # What ended between the last look and the kill may have been kept too, never less.
    assert kept <= present < 18
    assert (disturbed / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()
    assert sorted(p.name for p in (disturbed / "runs").glob("*.jsonl")) == sorted(
        p.name for p in (undisturbed / "runs").iterdir()
    )


@pytest.fixture(scope="module")
def widened(tmp_path_factory):
    """The same comparison with averages and joined data, in the folder of one without."""
    folder = tmp_path_factory.mktemp("widened")
    compare(Tiny(), seeds=5, out=folder, **QUIET)
    plain = {path.name for path in (folder / "runs").iterdir()}
    return plain, compare(Tiny(), seeds=5, out=folder, average=5, spend_validation=True, **QUIET)


def test_averages_and_joined_data_make_runs_of_their_own(widened):
    plain, results = widened
    names = {path.name for path in (results.folder / "runs").iterdir()}
    assert len(plain) == 30
    chosen = [results.selections["final"][arm].chosen for arm in ("adamw", "prm", "adamw-matched")]
    leaders = 5 * (chosen[1] != chosen[2])
    assert plain < names
    assert len(names) == 30 + 30 + 15 + leaders


def test_averages_are_arms(widened):
    _, results = widened
    assert [arm.name for arm in results.arms] == [
        "adamw", "prm", "adamw-matched", "adamw averaged", "prm averaged", "adamw-matched averaged",
    ]  # fmt: skip
    frame = results.frame
    plain, averaged = (frame[frame.arm == name].reset_index(drop=True) for name in ("adamw", "adamw averaged"))
    assert (plain[["lr", "seed"]] == averaged[["lr", "seed"]]).all().all()
    assert (plain["test final error"] != averaged["test final error"]).all()
    said = {(one.arm, one.rival) for one in results.statements}
    assert {("prm averaged", "adamw averaged"), ("prm averaged", "prm")} <= said
    written = json.loads((results.folder / "results.json").read_text())
    assert written["average"] == 5
    assert set(written["by_joined"]) == {"adamw", "prm", "adamw-matched"}


def test_joined_data_in_page_terminal_and_frame(widened, capsys):
    _, results = widened
    rows = results.frame[results.frame.arm == "prm joined"]
    assert rows["test final error"].mean() == pytest.approx(results.by_joined["prm"].test["error"].mean)
    assert set(rows["steps"]) == {24}
    results.print()
    printed = capsys.readouterr().out
    page = (results.folder / "report.html").read_text()
    assert "joined: trained on training and validation data, after the last step" in printed
    assert "prm joined" in page
    assert "adamw averaged" in printed
    assert "What validation data is worth" in page
    assert "--average 5 --spend-validation" in page


def test_the_same_again_makes_no_run_and_the_same_bytes(widened):
    _, results = widened
    before = (results.folder / "results.json").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in (results.folder / "runs").iterdir()}
    compare(Tiny(), seeds=5, out=results.folder, average=5, spend_validation=True, **QUIET)
    assert (results.folder / "results.json").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in (results.folder / "runs").iterdir()} == times


@pytest.mark.usefixtures("no_page")
def test_joined_runs_are_exported_and_taken_up(widened, tmp_path):
    _, results = widened
    same = {"average": 5, "spend_validation": True, **QUIET}
    compare(Tiny(), seeds=5, out=results.folder, export_to=tmp_path / "runs.gz", **same)
    again = compare(Tiny(), seeds=5, out=tmp_path / "out", import_from=tmp_path / "runs.gz", **same)
    assert again.to_dict() == results.to_dict()


def test_a_task_that_does_not_say_how_to_join(tmp_path):
    with pytest.raises(ValueError, match=r"Starved does not say how .* joined: .* a method joined\(self, seed\)"):
        compare("starved", out=tmp_path, spend_validation=True, **QUIET)


@pytest.mark.parametrize("value", [-1, 2.5, "50"])
def test_wrong_averages(value, tmp_path):
    with pytest.raises(ValueError, match=f"average must be a whole number >= 0, got {value!r}"):
        compare(Tiny(), out=tmp_path, average=value, **QUIET)
