"""Tables: estimators as scikit-learn has them, and reading and encoding what they learn from."""

from popriskmin.tabular.estimators import PRMClassifier, PRMRegressor
from popriskmin.tabular.numbers import read_numbers

__all__ = ["PRMClassifier", "PRMRegressor", "read_numbers"]
