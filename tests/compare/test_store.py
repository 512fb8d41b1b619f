"""Runs on disk."""

import json
import os
import re
from pathlib import Path

import pytest
from tiny import Tiny

from popriskmin.compare.arms import make_arms
from popriskmin.compare.store import Store, plain, settings_of, write_whole
from popriskmin.compare.train import Configuration, run

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


@pytest.mark.parametrize("content", ["", "nonsense\n", '{"kind": "settings"}\n{"kind": "step"}\n'])
def test_a_damaged_file_is_named(tmp_path, content):
    store = Store(tmp_path)
    settings = settings_of(Tiny(), ADAMW, SETTING)
    store.path(settings).write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(store.path(settings)))} .*delete it to make it again"):
        store.read(settings)


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.txt"
    write_whole(path, "one")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_files_have_the_usual_permissions(tmp_path):
    write_whole(tmp_path / "a.txt", "x")
    (tmp_path / "b.txt").write_text("x")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_plain():
    value = {"a": (1, 2.5, float("nan")), "b": [float("inf"), None, True], 3: {"c": "x"}}
    assert plain(value) == {"a": [1, 2.5, None], "b": [None, None, True], "3": {"c": "x"}}
