import pickle
import subprocess
import sys
import threading

import pytest
from popriskmin.compare.training.task_pickle import pickle_task

from popriskmin.compare.loading import load_task_class
from popriskmin.tasks.digits import Digits

TASK = """
from popriskmin.compare import Task

class Mine(Task):
    metrics = {"loss": "min"}

    def trial(self, seed):
        def loss(model, batch):
            raise ArithmeticError("in a function within a method")
        return loss
"""


READ = """
import pickle, sys

task = pickle.load(sys.stdin.buffer)
assert type(task).__module__ not in sys.modules
try:
    task.trial(0)(None, None)
except ArithmeticError as error:
    print(task.trial.__code__.co_filename, error.__traceback__.tb_next.tb_frame.f_code.co_filename, sep="\\n")
"""


def test_code_that_travels_keeps_the_name_of_its_file(tmp_path):
    """Of methods and of functions within them, in a process that cannot import the module."""
    path = tmp_path / "mine.py"
    path.write_text(TASK)
    pickled = pickle_task(load_task_class(str(path))())
    process = subprocess.run([sys.executable, "-c", READ], input=pickled, stdout=subprocess.PIPE, check=True)
    assert process.stdout.decode().split() == [str(path)] * 2


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
