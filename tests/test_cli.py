"""The command line: help, errors, and the whole way to a report."""

import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest

from popriskmin import cli
from popriskmin.cli import main
from popriskmin.version import __version__

TINY = os.path.join(os.path.dirname(__file__), "tiny.py")


def run(capsys, *arguments):
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_help_names_the_commands(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert "compare" in out
    assert run(capsys, "--version")[1] == f"popriskmin {__version__}\n"


def test_info_says_what_is_usable_and_why_the_rest_is_not(capsys, monkeypatch):
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert f"popriskmin {__version__}" in out
    assert re.search(r"(?m)^cpu: +(fused, (baseline|AVX2|AVX-512), \d+ threads|foreach; no fused step: )", out)
    assert re.search(r"(?m)^cuda: +foreach; ", out)
    assert re.search(r"(?m)^compare: +installed", out)
    monkeypatch.setattr(cli, "COMPARE_NEEDS", ("numpy", "no_such_module"))
    cure = "get all it needs with, in a clone of the repository: pip install -e '.[compare]'"
    assert f"missing no_such_module; {cure}" in run(capsys, "info")[1]
    status, _, err = run(capsys, "info", "--all")
    assert status == 2
    assert "unrecognized arguments: --all" in err


def test_help_of_compare_with_and_without_a_task(capsys):
    status, out, _ = run(capsys, "compare", "--help")
    assert status == 0
    assert "--weight-decay" in out
    assert "--noise" not in out
    told = " ".join(out.split())
    assert "installed tasks; TASK --help shows a task's options: digits " in told
    assert "mask=snr|soft" in told
    assert "debias=on|off" in told
    assert "sequential, dask or ray" in told
    status, out, _ = run(capsys, "compare", "digits", "--help")
    assert status == 0
    assert "options of Digits" in out
    assert "--noise FLOAT" in out
    assert "replaced at random (default: 0.4)" in out
    assert "reduction=per_param|per_tensor" in " ".join(out.split())
    assert "--noise" in run(capsys, "compare", TINY, "-h")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "name a task: digits"),
        (["compare", "digit"], "there is no task 'digit'"),
        (["compare", "missing.py"], "there is no file missing.py"),
        (["compare", TINY, "--prm", "softnes=1"], "PRM has no option 'softnes': did you mean softness?"),
        (["compare", TINY, "--prm", "variance=given"], "variance must be streaming"),
        (["compare", TINY, "--prm", "soft"], "given as NAME=VALUE, such as mask=soft, got 'soft'"),
        (["compare", TINY, "--seeds", "0"], "seeds must be a number of seeds >= 1"),
        (["compare", TINY, "--lr", "-1"], "lr must be one or more finite numbers >= 0"),
        (["compare", TINY, "--lr", "fast"], "invalid float value: 'fast'"),
        (["compare", TINY, "--nois", "1"], "popriskmin compare: error: unrecognized arguments: --nois 1; did you mean"),
        (["compare", TINY, "--nois=1"], "did you mean --noise?"),
        (["compare", TINY, "--zzz"], "unrecognized arguments: --zzz\n"),
        (["compare", "--prm", "mask=soft", "digits"], "the task goes first: popriskmin compare digits --prm mask=soft"),
        (["compare", "--lr", "1e-3", "digits"], "it goes first: popriskmin compare digits --lr 1e-3"),
        (["compare", TINY, "--prm", "foreach=on", "differentiable=on"], "foreach=True does not support"),
        (["compare", TINY, "--out", ""], "out must name a folder, got ''"),
        (["compare", "digits", "--noise", "40"], "noise must be a share from 0 to 1, got 40.0"),
        (["compare", "digits", "--imbalance", "0.5"], "imbalance must be from 1 to 50, got 0.5"),
        (["compare", "digits", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["compare", TINY, "--backend", "condor"], "backend must be one of"),
        (["compair"], "invalid choice: 'compair'"),
    ],
)
def test_wrong_arguments(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_a_comparison(capsys, tmp_path):
    arguments = ["compare", TINY, "--seeds", "2", "--lr", "0.1", "0.01", "--steps", "6", "--prm", "mask=soft",
                 "--out", str(tmp_path / "out")]  # fmt: skip
    status, out, err = run(capsys, *arguments)
    assert status == 0
    assert "tiny: test error, lower is better" in out
    assert "prm mask=soft" in out
    assert "2 seeds are too few for a verdict, 5 would do" in out
    assert out.rstrip().endswith(f"The numbers: {tmp_path / 'out' / 'results.json'}")
    assert "16 runs\n" in err
    assert "[16/16] adamw-matched lr=0.1" in err
    assert " s left" in err
    status, again, err = run(capsys, *arguments)
    assert status == 0
    assert again == out
    assert "16 runs, 16 of them kept from before" in err


@pytest.mark.usefixtures("no_pictures")
def test_a_failed_run_makes_the_status_1(capsys, tmp_path):
    arguments = ["compare", TINY, "--trouble", "raise", "--seeds", "1", "--out", str(tmp_path), "--keep-going"]
    status, out, err = run(capsys, *arguments)
    assert status == 1
    assert "ArithmeticError: the task is broken" in err
    assert "adamw: 2 of 2 runs failed." in out
    assert "There is nothing to compare" in out


@pytest.mark.usefixtures("no_pictures")
def test_a_broken_task_ends_at_its_first_error(capsys, tmp_path):
    """With the line of the user's file, and the runs that were made."""
    folder = tmp_path / "out"
    assert run(capsys, "compare", TINY, "--seeds", "1", "--lr", "0.1", "--out", str(folder))[0] == 0
    arguments = ["compare", TINY, "--trouble", "raise", "--seeds", "3", "--out", str(folder)]
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert err.count("failed, ") == 1
    said = err[err.index("popriskmin compare: adamw lr=0.01 weight_decay=0 seed=0 failed") :]
    assert 'tiny.py", line' in said
    assert 'raise ArithmeticError("the task is broken")' in said
    assert said.endswith("finished runs are kept; --keep-going makes the others all the same\n")
    assert "Traceback" not in said
    assert len(list((folder / "runs").iterdir())) == 4  # three that were made, and the one that failed
    assert (folder / "results.json").exists()


def test_a_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    status, _, err = run(capsys, "compare", TINY, "--seeds", "1", "--out", str(tmp_path))
    assert status == 2
    assert err == f"popriskmin compare: out must be a folder, but {tmp_path / 'runs'} is a file\n"
    assert (tmp_path / "runs").read_text() == "not a folder"


def test_without_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "joblib", None)
    for name in [name for name in sys.modules if name.startswith("popriskmin.compare")]:
        monkeypatch.delitem(sys.modules, name)
    status, _, err = run(capsys, "compare", "digits")
    assert status == 1
    assert "pip install -e '.[compare]'" in err


def test_python_dash_m(tmp_path):
    done = subprocess.run([sys.executable, "-m", "popriskmin", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"popriskmin {__version__}\n"


TASK = """
import dataclasses
from popriskmin.compare import Task

@dataclasses.dataclass
class Mine(Task):
    {field}
    metrics = {{"x": "max"}}
    def trial(self, seed):
        {body}
"""


def task_file(folder, field="noise: float = 0.5", body="..."):
    path = folder / "mine.py"
    path.write_text(TASK.format(field=field, body=body))
    return str(path)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("jobs: int = 3", "the option jobs of Mine would hide --jobs"),
        ("task: str = 'x'", "the option task of Mine would hide the argument task"),
        ("widths: tuple = (64, 64)", "the option widths of Mine has the type tuple"),
        ("options: str = 'x'", "the option options of Mine would hide Task.options"),
        ("noise: float = {}['x']", "mine.py, line 7: KeyError: 'x'"),
        ("__post_init__ = lambda self: {}['x']", "mine.py, line 7: KeyError: 'x'"),
        ("optimizer_options = {'lr': 0.5}", "optimizer_options of the task: lr is not an option"),
    ],
)
def test_mistakes_in_the_file_of_a_task(capsys, tmp_path, field, message):
    status, out, err = run(capsys, "compare", task_file(tmp_path, field), "--out", str(tmp_path / "o"))
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "o").exists()


def test_kinds_of_options(capsys, tmp_path):
    path = task_file(
        tmp_path,
        "flag: bool = True; share: float | None = None; word: str = 'a'; width: int = dataclasses.field(init=False)",
        'raise ValueError(f"{self.flag} {self.share!r} {self.word}")',
    )
    arguments = ["compare", path, "--seeds", "1", "--lr", "1", "--out", str(tmp_path / "o")]
    _, _, err = run(capsys, *arguments, "--no-flag", "--share", "0.5", "--word", "b")
    assert "ValueError: False 0.5 b" in err
    _, _, err = run(capsys, *arguments)
    assert "ValueError: True None a" in err


def test_help_with_a_percent_sign(capsys, tmp_path):
    path = task_file(tmp_path, "word: str = dataclasses.field(default='5%', metadata={'help': 'in %'})")
    status, out, _ = run(capsys, "compare", path, "--help")
    assert status == 0
    assert "in % (default: 5%)" in out


@pytest.mark.usefixtures("no_pictures")
def test_a_task_that_leaves_python_fails_and_the_others_go_on(capsys, tmp_path):
    path = task_file(tmp_path, body="import sys; sys.exit(3)")
    arguments = ["--seeds", "2", "--lr", "1", "--out", str(tmp_path / "o"), "--keep-going"]
    status, _, err = run(capsys, "compare", path, *arguments)
    assert status == 1
    assert err.count("SystemExit: 3") == 2 * 2 * 2
    assert "[12/12]" in err


def test_an_interruption_that_python_would_only_print(capsys):
    def run():
        with cli._every_interruption():
            sys.unraisablehook(types.SimpleNamespace(exc_type=KeyboardInterrupt))
            for _ in range(1000):
                time.sleep(0.02)

    # What runs in the background of a shell ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""


def test_an_interruption_before_anything_is_trained(capsys, tmp_path):
    path = tmp_path / "slow.py"
    path.write_text("raise KeyboardInterrupt")
    status, _, err = run(capsys, "compare", str(path))
    assert status == 130
    assert err == "interrupted; finished runs are kept, and the same command goes on from there\n"
