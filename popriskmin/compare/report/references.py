"""What a task names beside the optimizers: their test metrics over the seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from popriskmin.compare.report.statistics import estimate
from popriskmin.compare.training.train import Record


@dataclasses.dataclass(frozen=True)
class References:
    """The references of a comparison.

    Attributes
    ----------
    test
        `test[name][metric]`: mean, interval and values, of those that have a finite value with every seed.
    warnings
        What is missing, and why.
    """

    test: Mapping[str, Mapping[str, Any]]
    warnings: Sequence[str]


NONE = References({}, [])


def read_references(by_seed: Mapping[int, Sequence[Record]]) -> References:
    """Collect the references from the records of each seed."""
    values: dict[str, dict[str, list[float]]] = {}
    warnings = []
    for seed, records in by_seed.items():
        end = records[-1]
        if end["status"] == "failed":
            warnings.append(f"references: seed {seed} failed: {end['error'].strip().splitlines()[-1]}")
        for record in records[:-1]:
            for metric, value in record["test"].items():
                values.setdefault(record["name"], {}).setdefault(metric, []).append(
                    math.nan if value is None else value
                )
    test: dict[str, dict[str, Any]] = {}
    for name, metrics in values.items():
        whole = {
            metric: estimate(found)
            for metric, found in metrics.items()
            if len(found) == len(by_seed) and all(map(math.isfinite, found))
        }
        if len(whole) < len(metrics):
            warnings.append(f"references: {name} has no finite value of every metric with every seed.")
        test[name] = whole
    return References(test, warnings)
