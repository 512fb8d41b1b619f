"""Digests: what makes a task another one."""

import sys

import pytest
import torch
from tiny import Tiny

from popriskmin.compare import Task
from popriskmin.compare.loading import load_task_class
from popriskmin.compare.training.fingerprint import source_digest

FILE = """
from popriskmin.compare import Task

class Mine(Task):
    metrics = {"x": "max"}
    def trial(self, seed): ...
"""


def test_the_digest_follows_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])

    def digest_of(text):
        (tmp_path / "mine.py").write_text(text, encoding="utf-8")
        return source_digest(load_task_class(str(tmp_path / "mine.py"))())

    assert digest_of(FILE) == digest_of(FILE) != digest_of(FILE + "# ändert sich")
    assert source_digest(Tiny()) is not None


TYPED = """
import dataclasses

SCALE = {scale}
DATA = torch.arange({data})
NAMES = {{"a", "b", "c", "d"}}

def helper(x):
    return [y + {add} for y in x]

@dataclasses.dataclass
class Typed(Task):
    noise: float = 0.5
    metrics = {{"x": "{better}"}}

    def trial(self, seed):
        return helper([SCALE, DATA, NAMES & {{"x", "y"}}]){comment}
"""
GIVEN = {"scale": 1.0, "data": 3, "add": 1, "better": "max", "comment": ""}


def typed_class(**changes):
    """Return a task that has no file, in a namespace of its own."""
    namespace = {"Task": Task, "torch": torch, "__name__": "typed_at_a_prompt"}
    exec(compile(TYPED.format(**{**GIVEN, **changes}), "<cell>", "exec"), namespace)
    return namespace["Typed"]


def test_a_task_without_a_file_stays_itself_within_a_session(monkeypatch):
    import types

    # dataclasses looks its module up.
    monkeypatch.setitem(sys.modules, "typed_at_a_prompt", types.ModuleType("typed_at_a_prompt"))
    one = typed_class()
    assert source_digest(one()) == source_digest(one())


@pytest.mark.parametrize(
    ("name", "value"), [("SCALE", 2.0), ("DATA", torch.arange(4)), ("helper", len), ("NAMES", {"x"})]
)
def test_a_task_without_a_file_changes_with_all_it_uses(monkeypatch, name, value):
    import types

    monkeypatch.setitem(sys.modules, "typed_at_a_prompt", types.ModuleType("typed_at_a_prompt"))
    one = typed_class()
    before = source_digest(one())
    one.trial.__globals__[name] = value
    assert source_digest(one()) != before


def test_the_content_of_data_files_belongs_to_the_source(tmp_path):
    class Reads(Task):
        metrics = {"error": "min"}
        path = str(tmp_path / "data.csv")

        @property
        def files(self):
            return [self.path]

        def trial(self, seed):
            raise AssertionError

    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    first = source_digest(Reads())
    assert source_digest(Reads()) == first
    (tmp_path / "data.csv").write_text("a,b\n1,3\n")
    assert source_digest(Reads()) != first
