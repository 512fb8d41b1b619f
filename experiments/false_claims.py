"""Count how often a comparison claims a difference that is not there.

    python experiments/false_claims.py

Two arms that do not differ, and the intervals of their difference over the seeds:
Student's, which `popriskmin compare` takes, and a bootstrap's percentiles at the
widened level of Hesterberg ("What Teachers Should Know About the Bootstrap", 2015),
which it took before. Then pages of eight statements, with and without Holm's
correction.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
from scipy import stats

from popriskmin.compare.report.statistics import LEVEL, holm, interval, p_value


def draw(kind: str, seeds: int, rng: np.random.Generator) -> np.ndarray:
    """Return differences by seed: normal, or of two accuracies on 500 test examples."""
    if kind == "normal":
        return rng.normal(size=seeds)
    one, other = rng.binomial(500, 0.93, (2, seeds)) / 500
    return np.asarray(one - other)


def widened_bootstrap(values: np.ndarray, rng: np.random.Generator, resamples: int = 2000) -> tuple[float, float]:
    """Return percentiles of resampled means at Hesterberg's level."""
    n = len(values)
    tail = float(stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(1 - LEVEL / 2, n - 1)))
    low, high = np.quantile(values[rng.integers(0, n, (resamples, n))].mean(1), [tail, 1 - tail])
    return float(low), float(high)


def excludes_zero(bounds: tuple[float, float] | None) -> bool:
    """Return whether an interval would be read as a difference."""
    return bounds is not None and not bounds[0] <= 0 <= bounds[1]


def main() -> None:
    """Print shares of false claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000, help="comparisons simulated for each line")
    draws = parser.parse_args().draws
    rng = np.random.default_rng(7)
    print("one statement      seeds  bootstrap  Student")
    for kind in ("normal", "accuracy"):
        for seeds in (3, 4, 5, 8):
            found = [draw(kind, seeds, rng) for _ in range(draws)]
            bootstrap = np.mean([excludes_zero(widened_bootstrap(values, rng)) for values in found])
            student = np.mean([excludes_zero(interval(list(values))) for values in found])
            print(f"{kind:17} {seeds:6} {bootstrap:10.1%} {student:8.1%}")
    print("\na page of eight    seeds  uncorrected  Holm")
    for name, shared in (("independent", 0.0), ("correlated by 0.8", 0.8)):
        for seeds in (5, 8):
            pages = []
            for _ in range(draws):
                common, own = rng.normal(size=(1, seeds)), rng.normal(size=(8, seeds))
                pages.append([p_value(row) for row in math.sqrt(shared) * common + math.sqrt(1 - shared) * own])
            uncorrected = np.mean([any(p is not None and p < LEVEL for p in page) for page in pages])
            corrected = np.mean([any(p is not None and p < LEVEL for p in holm(page)) for page in pages])
            print(f"{name:17} {seeds:6} {uncorrected:12.1%} {corrected:5.1%}")


if __name__ == "__main__":
    main()
