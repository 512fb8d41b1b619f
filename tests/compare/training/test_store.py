"""Runs on disk."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tiny import Tiny

from popriskmin.compare import compare
from popriskmin.compare.training.arms import make_arms
from popriskmin.compare.training.store import Store, plain, prepare_folder, settings_of, write_whole
from popriskmin.compare.training.train import Configuration, run

pytestmark = pytest.mark.usefixtures("no_pictures_in_module")


ADAMW, PRM_ARM, _ = make_arms()
SETTING = Configuration(lr=0.1, weight_decay=0.0, seed=3)


def test_what_was_written_is_read(tmp_path):
    store = Store(tmp_path / "runs")
    settings = settings_of(Tiny(), PRM_ARM, SETTING)
    assert store.read(settings) is None
    records = run(Tiny(), PRM_ARM, SETTING)
    store.write(settings, records)
    assert store.read(settings) == plain(records)
    assert store.path(settings).name.startswith("prm_lr0.1_wd0_seed3_")
    lines = store.path(settings).read_text().splitlines()
    assert {"kind": "settings", **settings} == json.loads(lines[0])
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [store.path(settings).name]


def test_any_setting_makes_another_run():
    store = Store(Path("runs"))
    arms = make_arms([{"mask": "soft"}])
    settings = [
        settings_of(Tiny(), PRM_ARM, SETTING),
        settings_of(Tiny(noise=0.6), PRM_ARM, SETTING),
        settings_of(Tiny(), ADAMW, SETTING),
        settings_of(Tiny(), arms[3], SETTING),
        settings_of(Tiny(), PRM_ARM, Configuration(0.1, 0.0, 4)),
        settings_of(Tiny(), PRM_ARM, Configuration(0.1, 0.1, 3)),
        settings_of(Tiny(), PRM_ARM, Configuration(0.100001, 0.0, 3)),
    ]
    settings += [{**settings[0], key: "changed"} for key in ("task_source", "popriskmin", "torch", "optimizer_options")]
    paths = {store.path(s) for s in settings}
    assert len(paths) == len(settings)


def test_failed_runs_are_made_again(tmp_path):
    store = Store(tmp_path)
    settings = settings_of(Tiny(), ADAMW, SETTING)
    store.write(settings, [{"kind": "end", "status": "failed", "error": "x"}])
    assert store.path(settings).exists()
    assert store.read(settings) is None
    store.write(settings, [{"kind": "end", "status": "diverged"}])
    assert store.read(settings) == [{"kind": "end", "status": "diverged"}]


@pytest.mark.parametrize(
    "content",
    ["", "nonsense\n", '{"kind": "settings"}\n{"kind": "step"}\n', "[]\n", "null\n", '{"kind": "end"}\n',
     '{"kind": "end", "status": "finished"}\n', '{"kind": 1}\n{"kind": "end", "status": "finished"}\n'],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, content):
    store = Store(tmp_path)
    settings = settings_of(Tiny(), ADAMW, SETTING)
    store.path(settings).write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(store.path(settings)))} .*delete it to make it again"):
        store.read(settings)


def test_the_file_of_another_run_is_not_believed(tmp_path):
    store = Store(tmp_path)
    mine, other = (settings_of(Tiny(), arm, SETTING) for arm in (ADAMW, PRM_ARM))
    store.write(mine, [{"kind": "end", "status": "diverged"}])
    store.path(other).write_bytes(store.path(mine).read_bytes())
    with pytest.raises(ValueError, match="holds another run than its name says; delete it"):
        store.read(other)


def test_settings_that_are_not_finite_differ():
    values = [float("inf"), float("-inf"), float("nan")]
    settings = [settings_of(Tiny(noise=value), ADAMW, SETTING) for value in values]
    assert [found["task_options"]["noise"] for found in settings] == ["inf", "-inf", "nan"]
    assert len({Store(Path("runs")).path(found) for found in settings}) == 3


def test_a_folder_is_tried_out(tmp_path, monkeypatch):
    prepare_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="out must be a folder, but .*file is a file"):
        prepare_folder(tmp_path / "file" / "below")

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match="out must be a folder that can be written to, but .*Permission denied"):
        prepare_folder(tmp_path / "a")


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.txt"
    write_whole(path, "one")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_files_are_utf_8_wherever_they_are_written(tmp_path):
    code = f"""
from pathlib import Path
from popriskmin.compare.training.store import Store, write_whole
store, settings = Store(Path({str(tmp_path)!r})), {{"arm": "a", "lr": 1.0, "weight_decay": 0.0, "seed": 0}}
write_whole(store.folder / "a.txt", {"é∑"!a})
store.write(settings, [{{"kind": "end", "status": "diverged"}}])
print(store.read(settings))
"""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **locale}, check=True)
    assert (tmp_path / "a.txt").read_bytes() == "é∑".encode()


def test_files_have_the_usual_permissions(tmp_path):
    write_whole(tmp_path / "a.txt", "x")
    (tmp_path / "b.txt").write_text("x")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_plain():
    value = {"a": (1, 2.5, float("nan")), "b": [float("inf"), None, True], 3: {"c": "x"}}
    assert plain(value) == {"a": [1, 2.5, None], "b": [None, None, True], "3": {"c": "x"}}
    assert plain(value, setting=True)["a"] == [1, 2.5, "nan"]


QUICK = {"lr": [0.1], "seeds": 1, "progress": False}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    results = compare(Tiny(), out=folder / "one", export_to=folder / "runs.gz", **QUICK)
    return folder / "runs.gz", results


def test_the_same_numbers_on_another_machine(packed, tmp_path, monkeypatch):
    file, results = packed
    monkeypatch.setattr(Tiny, "trial", None)  # nothing is trained again
    again = compare(Tiny(), out=tmp_path / "two", import_from=file, export_to=tmp_path / "again.gz", **QUICK)
    assert again.to_dict() == results.to_dict()
    assert again.frame.equals(results.frame)
    assert (tmp_path / "again.gz").read_bytes() == file.read_bytes()


def test_runs_of_another_comparison_are_refused(packed, tmp_path):
    file, _ = packed
    with pytest.raises(
        ValueError, match="holds runs of another comparison: their task_options is .*0.5.*here it is .*0.7"
    ):
        compare(Tiny(noise=0.7), out=tmp_path, import_from=file, **QUICK)
    assert not list((tmp_path / "runs").iterdir())


def test_files_that_are_not_whole(packed, tmp_path):
    whole = packed[0].read_bytes()
    lines = gzip.decompress(whole).splitlines(keepends=True)
    endless = json.dumps(json.loads(lines[1])[:-1]).encode() + b"\n"
    bad = {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:200] + bytes([whole[200] ^ 255]) + whole[201:],
        "text": b"hello",
        "empty": b"",
        "other": gzip.compress(b"{}\n"),
        "lines": gzip.compress(b"".join(lines[:-1])),
        "endless": gzip.compress(b"".join([lines[0], endless, *lines[2:]])),
    }
    shutil.copytree(packed[1].folder, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "runs").iterdir()}
    for name, content in bad.items():
        path = tmp_path / f"{name}.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.gz is not a file that popriskmin compare --export has written"):
            compare(Tiny(), out=tmp_path / "out", import_from=path, **QUICK)
    with pytest.raises(ValueError, match="absent.gz cannot be read"):
        compare(Tiny(), out=tmp_path / "out", import_from=tmp_path / "absent.gz", **QUICK)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "runs").iterdir()} == before
