"""Finding tasks, and what is said where a file of the user's is wrong."""

import os
import sys
import textwrap

import pytest
from tiny import Tiny

from popriskmin.compare.loading import given_path, installed_tasks, load_task_class, make_task
from popriskmin.tasks.digits import Digits

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


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_installed_tasks_are_found_by_name():
    assert "digits" in installed_tasks()
    assert load_task_class("digits").__name__ == "Digits"
    with pytest.raises(ValueError, match=r"there is no task 'digit': did you mean digits\?"):
        load_task_class("digit")
    with pytest.raises(
        ValueError, match="there is no task 'q'; installed are .*digits.*a file of your own is given by"
    ):
        load_task_class("q")


@pytest.fixture
def _another_package(tmp_path):
    """A package that brings tasks: what pip would leave of it."""
    write(tmp_path, GOOD.replace("import helper_beside_it", "").replace("helper_beside_it.value", "43"), "theirs.py")
    write(tmp_path, "import not_there_at_all", "broken.py")
    write(tmp_path, "raise RuntimeError('half built')", "raising.py")
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    lines = ["mine = theirs:Mine", "lacking = broken:Task", "raising = raising:Task", "none = json:dumps"]
    (info / "entry_points.txt").write_text("\n".join(["[popriskmin.tasks]", *lines]))
    sys.path.append(str(tmp_path))


@pytest.mark.usefixtures("_another_package")
def test_another_package_brings_tasks():
    assert {"digits", "mine"} < set(installed_tasks())
    task = make_task(load_task_class("mine"), {"depth": 4})
    assert task.trial(0) == 43
    assert given_path(task) == "mine"
    with pytest.raises(ImportError, match="not_there_at_all"):
        load_task_class("lacking")
    with pytest.raises(ValueError, match="raising.*half built"):
        load_task_class("raising")
    with pytest.raises(ValueError, match="the task none must be a subclass of .*Task, but json:dumps is not one"):
        load_task_class("none")


def test_a_file_may_import_what_lies_beside_it(tmp_path):
    write(tmp_path, "value = 42", "helper_beside_it.py")
    task = load_task_class(write(tmp_path, GOOD))(depth=3)
    assert task.trial(0) == 42
    assert task.options == {"depth": 3}


def test_a_file_that_is_named_like_a_module_does_not_replace_it(tmp_path):
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


ALONE = GOOD.replace("import helper_beside_it", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nosuchmodule", r"line 1: ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("x = 1\nnoise float = 3", r"line 2: SyntaxError: invalid syntax"),
        ("import os\nint('x')", r"line 2: ValueError: invalid literal for int"),
        ("import json\n\njson.loads('{')", r"line 3: JSONDecodeError: Expecting property name"),
        ("import sys\nsys.exit('bye')", r"line 2: SystemExit: bye"),
        ("raise RuntimeError", r"line 1: RuntimeError$"),
    ],
)
def test_a_file_that_cannot_be_run_is_told_with_its_line(tmp_path, text, message):
    path = write(tmp_path, text, "broken.py")
    with pytest.raises(ValueError, match=f"^{path}, {message}"):
        load_task_class(path)
    assert "broken" not in sys.modules


def test_an_error_in_a_file_beside_it_is_told_there(tmp_path):
    write(tmp_path, "value = 1 / 0", "helper_of_it.py")
    with pytest.raises(ValueError, match="^helper_of_it.py, line 1: ZeroDivisionError: division by zero"):
        load_task_class(write(tmp_path, "import helper_of_it"))


def test_a_method_that_is_misspelt(tmp_path):
    with pytest.raises(ValueError, match=r"Mine has no method trial\(self, seed\): did you mean it by trail\?"):
        load_task_class(write(tmp_path, ALONE.replace("def trial", "def trail")))


def test_a_base_without_trial_may_stand_beside_the_task(tmp_path):
    text = "\n".join(["from popriskmin.compare import Task", "class Base(Task): pass", "class One(Base):",
                      "    def trial(self, seed): ..."])  # fmt: skip
    assert load_task_class(write(tmp_path, text)).__name__ == "One"


def test_a_task_that_raises_when_it_is_made(tmp_path):
    text = ALONE + "\n        def __post_init__(self):\n            {}['a']\n"
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=f"^{path}, line 15: KeyError: 'a'"):
        make_task(load_task_class(path), {"depth": 3})
    with pytest.raises(ValueError, match=r"^noise must be a share from 0 to 1, got 3$"):
        make_task(Digits, {"noise": 3})


def test_a_task_is_named_as_it_was_given(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", ALONE, "given.py")
    monkeypatch.chdir(tmp_path)
    assert given_path(load_task_class("./sub/given.py")()) == "./sub/given.py"
    assert given_path(Digits()) == "digits"
    monkeypatch.setattr(Tiny, "__module__", "__main__")
    assert given_path(Tiny()) is None


def test_the_folder_of_this_test_is_not_littered():
    assert "mine.py" not in os.listdir(os.path.dirname(__file__))
