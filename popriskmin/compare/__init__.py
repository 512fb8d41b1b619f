"""A fair comparison of PRM with AdamW on a task of your own.

Needs, in a clone of the repository, `pip install -e '.[compare]'`.
"""

from popriskmin.compare.execute import compare
from popriskmin.compare.report.results import Results
from popriskmin.compare.task import Task, Trial

__all__ = ["Results", "Task", "Trial", "compare"]
