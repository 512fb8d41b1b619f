"""SGD and Muon with the mask around them and without: what `popriskmin.Masked` does.

    python experiments/masked.py run --runs runs/masked                     # resumes after a kill
    python experiments/masked.py report --runs runs/masked --out docs/results/masked

Three tasks of `popriskmin compare`: a table with 500 columns that say nothing, digits with
wrong labels, and text, where AdamW has nothing to fear. Every arm has learning rates of its
own and no weight decay, and is chosen and stopped on validation data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from popriskmin.compare import compare
from popriskmin.compare.loading import load_task_class, make_task

SEEDS = 5
TASKS: dict[str, dict[str, Any]] = {
    "table": {"data": "wine", "probes": 500},
    "digits": {},
    "text": {"steps": 200},
}
ADAMW_RATES = {"table": (1e-3, 3e-3, 1e-2, 3e-2), "digits": (1e-3, 3e-3, 1e-2), "text": (1e-3, 3e-3, 1e-2)}
PAIRS = {"SGD": ("sgd", "masked sgd"), "Muon": ("muon", "masked muon"), "AdamW": ("adamw", "prm")}
PATH = "masked_arms:"


def arms(task: str) -> tuple[dict[str, Any], dict[str, Sequence[float]]]:
    """Return the optimizers and their learning rates, to which the best may be at no end."""
    given = {
        "sgd": (PATH + "SGD", {}),
        "masked sgd": (PATH + "MaskedSGD", {}),
        "muon": (PATH + "Muon", {}),
        "masked muon": (PATH + "MaskedMuon", {}),
    }
    sgd, muon = ((0.1, 0.3, 1.0), (3e-3, 1e-2, 3e-2)) if task == "text" else ((0.01, 0.03, 0.1), (1e-3, 3e-3, 1e-2))
    wider = (3 * sgd[-1], 3 * muon[-1])  # a mask takes shorter steps
    return given, {"sgd": sgd, "masked sgd": (*sgd, wider[0]), "muon": muon, "masked muon": (*muon, wider[1])}


def run(runs: Path) -> None:
    """Make the runs that are missing."""
    for name, options in TASKS.items():
        given, rates = arms(name)
        compare(
            make_task(load_task_class(name), options),
            lr=ADAMW_RATES[name],
            weight_decay=(0.0,),
            seeds=SEEDS,
            prm=[],
            arms=given,
            arm_lr=rates,
            out=runs / name,
            progress=False,
        ).print()


if __name__ == "__main__":
    import sys

    run(Path(sys.argv[1]))
