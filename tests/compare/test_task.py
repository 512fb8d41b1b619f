"""Tasks: what they must give, and how they are found."""

import dataclasses
import os
import sys
import textwrap

import pytest
from tiny import Tiny

from popriskmin.compare import Task
from popriskmin.compare.task import check_task, load_task_class, shipped_tasks, source_digest

GOOD = """
    import dataclasses
    import helper_beside_it
    from popriskmin.compare import Task, Trial

    @dataclasses.dataclass
    class Mine(Task):
        depth: int = 2
        metrics = {"error": "min"}

        def trial(self, seed):
            return helper_beside_it.value
"""


def write(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_name_and_options():
    @dataclasses.dataclass
    class TwoWordsDPO(Task):
        share: float = 0.5
        metrics = {"x": "max"}

        def trial(self, seed): ...

    assert TwoWordsDPO().name == "two-words-dpo"
    assert TwoWordsDPO(share=1.0).options == {"share": 1.0}


def test_a_task_needs_trial_and_metrics():
    class Without(Task):
        metrics = {"x": "max"}

    with pytest.raises(TypeError, match="trial"):
        Without()

    class Empty(Task):
        def trial(self, seed): ...

    with pytest.raises(ValueError, match=r"Empty.metrics is empty; give for example"):
        check_task(Empty())

    class Direction(Empty):
        metrics = {"loss": "lower"}

    with pytest.raises(ValueError, match=r"Direction.metrics\['loss'\] must be 'max' or 'min'.*got 'lower'"):
        check_task(Direction())
    with pytest.raises(TypeError, match="must be an instance of popriskmin.compare.Task, got 3"):
        check_task(3)


def test_shipped_tasks_are_found_by_name():
    assert "digits" in shipped_tasks()
    assert load_task_class("digits").__name__ == "Digits"
    with pytest.raises(ValueError, match="there is no task 'digit'; the package has .*digits.*ending in .py"):
        load_task_class("digit")


def test_a_file_may_import_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    write(tmp_path, "value = 42", "helper_beside_it.py")
    task = load_task_class(write(tmp_path, GOOD))(depth=3)
    assert task.trial(0) == 42
    assert task.options == {"depth": 3}


def test_a_file_that_is_named_like_a_module_does_not_replace_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    task_class = load_task_class(write(tmp_path, GOOD.replace("import helper_beside_it", ""), "json.py"))
    assert task_class.__name__ == "Mine"
    import json

    assert hasattr(json, "dumps")


def test_files_that_define_no_task_or_two(tmp_path):
    with pytest.raises(ValueError, match="must define one subclass of .*Task, but defines none"):
        load_task_class(write(tmp_path, "from popriskmin.compare import Task"))
    twice = GOOD.replace("import helper_beside_it", "") + "\n    class Other(Mine): pass\n"
    with pytest.raises(ValueError, match="but defines Mine, Other"):
        load_task_class(write(tmp_path, twice))
    with pytest.raises(ValueError, match="there is no file nowhere.py"):
        load_task_class("nowhere.py")


def test_the_digest_follows_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    source = GOOD.replace("import helper_beside_it", "")
    one = source_digest(load_task_class(write(tmp_path, source))())
    again = source_digest(load_task_class(write(tmp_path, source))())
    other = source_digest(load_task_class(write(tmp_path, source + "\n    # changed\n"))())
    assert one == again != other
    assert source_digest(Tiny()) is not None


def test_a_task_without_a_file_has_no_digest():
    namespace = {"Task": Task, "__name__": "typed_at_a_prompt"}
    exec("class Typed(Task):\n    metrics = {'x': 'max'}\n    def trial(self, seed): pass", namespace)
    assert source_digest(namespace["Typed"]()) is None


def test_the_folder_of_this_test_is_not_littered():
    assert "mine.py" not in os.listdir(os.path.dirname(__file__))
